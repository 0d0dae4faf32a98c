"""One candidate made into tensors and calls, timed, and written down as a Record."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.cluster.catalog import name_of_driver
from meshwright.cluster.cpu import read_machine_cpu
from meshwright.profiling.allocator import keep_freed_memory
from meshwright.profiling.operators.candidate import Candidate, Direction, DtypeName
from meshwright.profiling.operators.catalog import FAMILIES
from meshwright.profiling.operators.family import Built, Family, Maker
from meshwright.profiling.peak import measure_peak_memory, saved_for_backward_bytes
from meshwright.profiling.timer import Effort, Measured, Timer, clock_of
from meshwright.records import Kind, Record, Scalar, record_of_timing
from meshwright.units import format_bytes

__all__ = [
    "OperatorBench",
    "candidate_problem",
    "compiler_problem",
    "dtype_problem",
    "estimated_bytes",
    "free_bytes",
    "make_step",
    "problem_within",
]

_VERB = "profile ops"
_CPU_FLUSH_BYTES = 2**27
"""Above the last-level cache of any one socket that is common."""
_CUDA_FLUSH_BYTES = 2**28
_MAX_CUDA_CALLS = 100
"""Of a repeat; most operators are several kernels."""
_WITHOUT_BACKWARD = {DtypeName.FP8}


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorBench:
    """Measures candidates on one device, each in the same way."""

    device: str
    """``"cpu"`` or ``"cuda"``."""
    effort: Effort
    flush_cache: bool = False
    processor_time: bool = False
    """Of the CPU; see ``HostClock``."""
    keep_memory: bool = False
    """On the CPU, make the process keep what it frees, for good; see ``keep_freed_memory``."""
    seed: int = 0

    @property
    def device_name(self) -> str:
        """By the catalog's name, or the driver's where the catalog does not know it."""
        return _device_name(self.device)

    @property
    def conditions(self) -> dict[str, Scalar]:
        """Keys of Records, beside device and software, that measurements must share to compare."""
        on_cpu = self.device == "cpu"
        return {
            "num_threads": torch.get_num_threads() if on_cpu else None,
            "cache_flushed": self.flush_cache,
            "clock": "process_time" if on_cpu and self.processor_time else None,
        }

    def measure(self, candidate: Candidate) -> Record:
        """Time one candidate, then its memory; whatever the operator raises passes through."""
        family = FAMILIES[candidate.op]
        keeps = self.keep_memory and self.device == "cpu" and keep_freed_memory()
        with _precision(candidate.dtype):
            step = make_step(family, candidate, device=self.device, seed=self.seed)
            measured = self._timer().measure(step.call)
            memory = measure_peak_memory(step.call, device=self.device)
            saved_bytes = _saved_bytes(step, candidate)
        work = family.work_of(candidate)
        return record_of_timing(
            measured.timing,
            kind=Kind.OPERATOR,
            name=candidate.op,
            device=self.device_name,
            verb=_VERB,
            method=_method(measured, candidate, self.device, keeps_memory=keeps),
            extra={
                **candidate.extra(),
                **self.conditions,
                "num_calls": measured.num_calls,
                "flops": work.flop,
                "bytes": work.bytes,
                "peak_memory_bytes": memory.peak_bytes,
                "workspace_bytes": memory.workspace_bytes,
                "saved_bytes": saved_bytes,
            },
        )

    def _timer(self) -> Timer:
        clock = clock_of(self.device, processor_time=self.processor_time)
        effort = self.effort
        if self.device.startswith("cuda"):
            effort = replace(effort, max_calls=min(effort.max_calls, _MAX_CUDA_CALLS))
        flush = _flusher(self.device) if self.flush_cache else None
        return Timer(clock, effort=effort, flush_cache=flush)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What is timed."""

    call: Callable[[], object]
    weights: tuple[Tensor, ...]
    """Inputs that are parameters: all but the first."""


def make_step(family: Family, candidate: Candidate, *, device: str, seed: int = 0) -> _Step:
    """The call to time: forward with gradients asked for, as in training, or backward alone.

    Backward is ``torch.autograd.grad`` over a graph that is kept, with respect to every
    differentiable input.
    """
    built = family.build(candidate.sizes, Maker(candidate.dtype, device, seed))
    if candidate.compiled:
        built = _compiled(built, candidate)
    weights = built.inputs[1:]
    if candidate.direction is not Direction.BWD:
        return _Step(call=lambda: built.call(*built.inputs), weights=weights)
    result = built.call(*built.inputs)
    wanted = [tensor for tensor in built.inputs if tensor.requires_grad]
    gradient = torch.rand_like(result)

    def backward() -> object:
        return torch.autograd.grad(result, wanted, gradient, retain_graph=True)

    if candidate.compiled:
        with _keeping_buffers():
            backward()  # compiles it
    return _Step(call=backward, weights=weights)


def _compiled(built: Built, candidate: Candidate) -> Built:
    if not built.can_compile:
        raise NotImplementedError(f"{candidate.op}: there is nothing to compile")
    torch._dynamo.reset()  # what was compiled for the candidate before
    call = torch.compile(built.call, dynamic=False, fullgraph=True)
    with _keeping_buffers():
        call(*built.inputs)
    return replace(built, call=call)


def _keeping_buffers() -> Any:
    """A backward pass that is called again must not reuse the memory of what forward saved."""
    import torch._functorch.config as functorch_config

    return functorch_config.patch(donated_buffer=False)


def _saved_bytes(step: _Step, candidate: Candidate) -> int | None:
    if candidate.direction is not Direction.FWD or candidate.compiled:
        return None
    return saved_for_backward_bytes(step.call, weights=step.weights)


@contextmanager
def _precision(dtype: DtypeName) -> Iterator[None]:
    """Products of fp32 in full, or rounded to TF32."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = dtype is DtypeName.TF32
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def _flusher(device: str) -> Callable[[], object]:
    num_bytes = _CUDA_FLUSH_BYTES if device.startswith("cuda") else _CPU_FLUSH_BYTES
    return torch.empty(num_bytes, dtype=torch.uint8, device=device).zero_


def _method(measured: Measured, candidate: Candidate, device: str, *, keeps_memory: bool) -> str:
    reached = measured.relative_half_width_fraction
    width = "unknown" if reached is None else f"{100 * reached:.1f} %"
    memory = "CUDA allocator" if device.startswith("cuda") else "profiler events of the allocator"
    how = ", torch.autograd.grad on a kept graph" if candidate.direction is Direction.BWD else ""
    how += ", freed memory kept by the process" if keeps_memory else ""
    return (
        f"{measured.method}{how}; stopped: {measured.stopped_by}, half width of the median's 95 % "
        f"interval {width}; memory: {memory}"
    )


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return "cpu"
    return name_of_driver(torch.cuda.get_device_name(device))


def dtype_problem(dtype: DtypeName, device: str) -> str:
    """Why the device has no such element type; empty where it has."""
    if not device.startswith("cuda"):
        return "the CPU has no TF32" if dtype is DtypeName.TF32 else ""
    capability = torch.cuda.get_device_capability(device)
    least = {DtypeName.TF32: (8, 0), DtypeName.BF16: (8, 0), DtypeName.FP8: (8, 9)}
    if capability < least.get(dtype, (0, 0)):
        return f"compute capability {capability[0]}.{capability[1]} has no {dtype}"
    return ""


def candidate_problem(candidate: Candidate, *, device: str) -> str:
    """Why a candidate cannot be measured here, known before it is tried; else empty."""
    family = FAMILIES[candidate.op]
    if candidate.dtype not in family.dtypes:
        return f"{candidate.op} has no {candidate.dtype}"
    if candidate.direction is Direction.BWD and candidate.dtype in _WITHOUT_BACKWARD:
        return f"{candidate.dtype} is measured forward only"
    variant = str(candidate.sizes.get("variant", ""))
    if variant.endswith(("_to_device", "_to_host")) and not device.startswith("cuda"):
        return "the CPU has no memory beside the host's"
    if candidate.op == "cast" and variant == f"to_{candidate.dtype}":
        return f"a cast of {candidate.dtype} {variant} does nothing"
    return dtype_problem(candidate.dtype, device)


def problem_within(device: str, most_bytes: int) -> Callable[[Candidate], str]:
    """Why a candidate cannot be measured on ``device`` in ``most_bytes`` of memory; else empty."""

    def problem(candidate: Candidate) -> str:
        if found := candidate_problem(candidate, device=device):
            return found
        if estimated_bytes(candidate) > most_bytes:
            return f"needs more than the {format_bytes(most_bytes)} one operator may take"
        return ""

    return problem


def free_bytes(device: str) -> int:
    """Memory that is free on the device; of a host without such a figure, half of what it has."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    memory_bytes = read_machine_cpu().memory_bytes
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return memory_bytes // 2
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", text, flags=re.MULTILINE)
    return min(memory_bytes, int(found[1]) * 1024) if found else memory_bytes // 2


def compiler_problem(device: str) -> str:
    """Why torch.compile cannot work here; empty where it may."""
    if device.startswith("cuda"):
        return "" if torch.cuda.get_device_capability(device) >= (7, 0) else "Triton needs sm_70"
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile on the CPU needs a C++ compiler, and there is none; install g++"
    return ""


def estimated_bytes(candidate: Candidate) -> int:
    """Roughly what a candidate holds at its fullest, inputs and gradients included."""
    family = FAMILIES[candidate.op]
    forward = Direction.FWD if candidate.direction is Direction.BWD else candidate.direction
    moved_bytes = family.work(candidate.sizes, forward, max(2, candidate.dtype.num_bytes)).bytes
    if candidate.direction is Direction.BWD:
        return 3 * moved_bytes
    return 2 * moved_bytes if candidate.direction is Direction.FWD else moved_bytes
