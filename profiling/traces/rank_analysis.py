"""All that one rank's profiler trace tells, small enough to keep for every rank of a job."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from meshwright.profiling.traces.collectives import CollectiveCall, collectives_of
from meshwright.profiling.traces.columns import RankTrace
from meshwright.profiling.traces.nesting import nesting_of
from meshwright.profiling.traces.operators import (
    OperatorTimes,
    launching_operators,
    operator_times,
)
from meshwright.profiling.traces.rank_sets import RankCalls
from meshwright.profiling.traces.timeline import (
    Iteration,
    Shares,
    device_shares,
    iterations_of,
)

__all__ = ["DeviceTimes", "RankAnalysis", "analyze"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTimes:
    """One device over the iterations of its rank."""

    device: int
    """-1 where the host stands in for devices."""
    name: str
    """As the driver calls it; empty where the trace does not say."""
    num_kernels: int
    num_streams: int
    shares: tuple[Shares, ...]
    """One for each iteration."""
    after_s: float
    """Busy time after the last iteration ended for the host: launched in it, done later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAnalysis:
    """What ``analyze`` found in one trace."""

    file_name: str
    num_bytes: int
    num_events: int
    num_dropped: int
    num_negative: int
    num_begin_end: int
    rank: int | None
    world_size: int | None
    backend: str
    versions: dict[str, str]
    """Of libraries, where the trace says."""
    zero_ns: int
    """Nanoseconds since 1970 at the trace's zero, by the file's own clock."""
    span_ns: int
    iterations: tuple[Iteration, ...]
    iterations_by: str
    """How they were told, in words."""
    marked: bool
    """False where the whole trace had to stand for one iteration."""
    devices: tuple[DeviceTimes, ...]
    operators: OperatorTimes
    calls: tuple[CollectiveCall, ...]
    peak_memory_bytes: dict[int, int]
    has_shapes: bool

    @property
    def main_device(self) -> DeviceTimes | None:
        """The device that was busy longest."""
        return max(
            self.devices,
            key=lambda one: sum(share.span_s - share.idle_s for share in one.shares),
            default=None,
        )

    @property
    def median_step_s(self) -> float:
        """Of the iterations."""
        return statistics.median((one.end_ns - one.start_ns) * 1e-9 for one in self.iterations)

    def rank_calls(self, origin_ns: int) -> RankCalls:
        """Its collectives, for comparison with other ranks; the rank must be known."""
        assert self.rank is not None, f"{self.file_name} has no rank"
        return RankCalls(rank=self.rank, zero_ns=self.zero_ns - origin_ns, calls=self.calls)


def analyze(trace: RankTrace) -> RankAnalysis:
    """Iterations, shares, operators and collectives of one rank."""
    iterations, iterations_by = iterations_of(trace)
    marked = not iterations_by.startswith("none")
    nesting = nesting_of(trace.operators)
    launched_by = launching_operators(trace, nesting)
    shares = device_shares(trace, iterations)
    base_ns = trace.keys.get("baseTimeNanoseconds")
    ends = [part.end_ns.max() for part in (trace.operators, trace.work) if len(part)]
    world_size = trace.distributed.get("world_size")
    known_world = isinstance(world_size, int) and 0 < world_size < 2**24
    backend = trace.distributed.get("backend")
    return RankAnalysis(
        file_name=trace.file_name,
        num_bytes=trace.num_bytes,
        num_events=trace.num_events,
        num_dropped=trace.num_dropped,
        num_negative=trace.num_negative,
        num_begin_end=trace.num_begin_end,
        rank=trace.rank,
        world_size=world_size if known_world else None,
        backend=backend if isinstance(backend, str) and len(backend) < 100 else "",
        versions=_versions(trace),
        zero_ns=int(trace.zero_us) * 1000 + (base_ns if isinstance(base_ns, int) else 0),
        span_ns=int(max(ends, default=0)),
        iterations=tuple(iterations),
        iterations_by=iterations_by,
        marked=marked,
        devices=tuple(
            _device_times(trace, device, found, iterations) for device, found in shares.items()
        ),
        operators=operator_times(trace, nesting, launched_by),
        calls=tuple(collectives_of(trace, nesting, launched_by, iterations if marked else [])),
        peak_memory_bytes=trace.peak_memory_bytes,
        has_shapes=any(dims for dims, _ in trace.shapes),
    )


def _device_times(
    trace: RankTrace, device: int, shares: tuple[Shares, ...], iterations: list[Iteration]
) -> DeviceTimes:
    work = trace.work
    here = work.device == device
    end_ns = max((one.end_ns for one in iterations), default=0)
    late = here & (work.end_ns > end_ns)
    after_ns = (work.end_ns[late] - np.maximum(work.start_ns[late], end_ns)).sum()
    return DeviceTimes(
        device=device,
        name=trace.device_name(device),
        num_kernels=int((here & (work.kind == 0)).sum()),
        num_streams=len(np.unique(work.stream[here])),
        shares=shares,
        after_s=float(after_ns) * 1e-9,
    )


def _versions(trace: RankTrace) -> dict[str, str]:
    found = {
        "nccl": trace.distributed.get("nccl_version"),
        "cuda_runtime": trace.keys.get("cuda_runtime_version"),
        "cuda_driver": trace.keys.get("cuda_driver_version"),
    }
    return {name: str(value)[:40] for name, value in found.items() if isinstance(value, str | int)}
