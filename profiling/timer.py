"""The one way anything is timed: warm up, synchronize, repeat, report median and spread."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from meshwright.errors import BadRequest
from meshwright.records.record import Timing, timing_of

__all__ = ["measure"]


def measure(
    step: Callable[[], object],
    *,
    warmup: int,
    repeats: int,
    synchronize: Callable[[], None] | None = None,
    device: str = "cpu",
) -> Timing:
    """Timing of ``step`` over ``repeats`` runs that follow ``warmup`` unmeasured ones.

    On a CUDA device (``"cuda"``, ``"cuda:1"``) a pair of events on its current stream brackets
    each run; elsewhere ``time.perf_counter`` does.

    Args:
        step: What to time; its result is dropped.
        warmup: Runs before the first measured one, 0 or more.
        repeats: Measured runs, 1 or more.
        synchronize: Called before each run and again before its clock is read: waits until all
            work is done, on other ranks too where the step spans several (a barrier).
        device: Where the step runs.

    Raises:
        BadRequest: ``repeats`` or ``warmup`` has no sense.
    """
    if repeats < 1 or warmup < 0:
        raise BadRequest(f"timer: needs repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")
    for _ in range(warmup):
        step()
    wait = synchronize or _nothing
    if device.split(":")[0] == "cuda":
        return timing_of([_cuda_time_s(step, wait, device) for _ in range(repeats)])
    return timing_of([_host_time_s(step, wait) for _ in range(repeats)])


def _nothing() -> None:
    """Stands for a synchronization that is not needed."""


def _host_time_s(step: Callable[[], object], wait: Callable[[], None]) -> float:
    wait()
    start_s = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start_s


def _cuda_time_s(step: Callable[[], object], wait: Callable[[], None], device: str) -> float:
    import torch  # a CPU measurement needs no torch

    cuda: Any = torch.cuda
    with cuda.device(device):
        start = cuda.Event(enable_timing=True)
        stop = cuda.Event(enable_timing=True)
        wait()
        cuda.synchronize()
        start.record()
        step()
        wait()
        stop.record()
        cuda.synchronize()
    return float(start.elapsed_time(stop)) * 1e-3
