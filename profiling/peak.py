"""Peak memory of one call: what it holds at its fullest beyond what was there before.

On CUDA the allocator counts (``torch.cuda.max_memory_allocated``). On the CPU the profiler's
memory events do: every allocation and release of torch's CPU allocator, workspaces inside operators
included; what libraries below allocate for themselves (packed matrices of oneDNN) is not seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PeakMemory", "measure_peak_memory", "saved_for_backward_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """Bytes of one call, over what was allocated before it."""

    peak_bytes: int
    """At the fullest moment."""
    kept_bytes: int
    """Afterwards, while the result is held: the result and what it keeps alive."""

    @property
    def workspace_bytes(self) -> int:
        """Needed during the call only."""
        return self.peak_bytes - self.kept_bytes


def measure_peak_memory(step: Callable[[], object], *, device: str) -> PeakMemory:
    """Memory of one call of ``step`` on ``"cpu"`` or a CUDA device; its result is dropped."""
    if device.split(":")[0] == "cuda":
        return _cuda_peak(step, device)
    changes = _cpu_changes(step)
    live_bytes = peak_bytes = 0
    for change_bytes in changes:
        live_bytes += change_bytes
        peak_bytes = max(peak_bytes, live_bytes)
    return PeakMemory(peak_bytes=peak_bytes, kept_bytes=max(0, live_bytes))


def _cuda_peak(step: Callable[[], object], device: str) -> PeakMemory:
    cuda: Any = torch.cuda
    cuda.synchronize(device)
    cuda.reset_peak_memory_stats(device)
    before_bytes = cuda.memory_allocated(device)
    result = step()
    cuda.synchronize(device)
    after_bytes = cuda.memory_allocated(device)
    peak_bytes = cuda.max_memory_allocated(device)
    del result
    return PeakMemory(
        peak_bytes=peak_bytes - before_bytes, kept_bytes=max(0, after_bytes - before_bytes)
    )


def _cpu_changes(step: Callable[[], object]) -> list[int]:
    """Bytes taken (positive) and given back (negative) during one call, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would announce itself on stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = step()
    profiled: Any = profiler.profiler
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiled.kineto_results.events()
        if event.name() == "[memory]"
    ]
    del result
    return [num_bytes for _, num_bytes in sorted(events, key=lambda event: event[0])]


def saved_for_backward_bytes(step: Callable[[], object], *, weights: tuple[Tensor, ...]) -> int:
    """Bytes of distinct storages one forward call saves for its backward, ``weights`` left out."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = step()
    del result
    return sum(found.values())
