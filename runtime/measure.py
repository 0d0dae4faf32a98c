"""What a rank measures: step time, and the bytes it holds by cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from meshwright.profiling.timer import measure
from meshwright.records.record import Timing
from meshwright.records.report import RankMemory
from meshwright.runtime.memory import StorageTracker
from meshwright.runtime.session import RankSession

__all__ = ["METHOD", "Measurement", "measure_memory", "measure_steps"]

METHOD = "perf_counter around the whole step, barrier of all ranks before and after"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Steps of one rank, timed."""

    timing: Timing
    losses: tuple[float, ...]
    """Of every step, warm-up included; empty on ranks of a stage without the loss."""


def measure_steps(
    session: RankSession, batch: Mapping[str, Tensor], *, warmup: int, repeats: int
) -> Measurement:
    """Time ``repeats`` steps on the rank's own batch; all ranks must come here together."""
    losses: list[Tensor] = []

    def step() -> None:
        result = session.step(batch)
        if result.loss is not None:
            losses.append(result.loss)

    timing = measure(
        step,
        warmup=warmup,
        repeats=repeats,
        synchronize=dist.barrier,
        device=str(session.device),
    )
    return Measurement(timing=timing, losses=tuple(float(loss) for loss in losses))


def measure_memory(session: RankSession, batch: Mapping[str, Tensor]) -> RankMemory:
    """Bytes the rank holds, from one step without the optimizer; all ranks come together.

    Parameters and optimizer state are what lies in memory between steps: run at least one full
    step before, for optimizers make their state in the first. Gradients are those the optimizer
    reads, or the running sums over micro-batches where these are larger. Activations are
    everything else that operators made and had not freed at the fullest moment.
    """
    with StorageTracker() as tracker:
        result = session.step(batch, update=False, keep_gradients=True)
        peak_bytes = tracker.peak_bytes
    gradient_bytes = _num_bytes(result.gradients)
    if session.num_microbatches > 1:
        sums = [session.program.values[value] for value in session.program.running_sums]
        gradient_bytes = max(gradient_bytes, sum(spec.num_bytes for spec in sums))
    return RankMemory(
        rank=session.rank,
        parameter_bytes=session.state.parameter_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=session.state.optimizer_bytes,
        activation_bytes=max(0, peak_bytes - gradient_bytes),
    )


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
