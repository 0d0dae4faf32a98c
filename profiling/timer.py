"""The one way anything is timed: warm up, synchronize, repeat, report median and spread.

A repeat is one call, or for short steps a batch of calls long enough that the resolution of the
clock does not matter; its time is that of one call. Repeats go on until the confidence interval of
the median is narrow. The interval needs no assumption about the distribution: of ``n`` ordered
repeats the median lies between the ``k``-th smallest and the ``k``-th largest with probability
``1 - 2 P(B < k)``, ``B`` binomial(n, 1/2) (David and Nagaraja, Order Statistics, 7.1). Every
repeat is kept, outliers too.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from meshwright.errors import BadRequest
from meshwright.records.record import Timing, timing_of

__all__ = [
    "Clock",
    "CudaClock",
    "Effort",
    "HostClock",
    "Measured",
    "StopReason",
    "Timer",
    "clock_of",
    "measure",
    "median_interval",
]

_WARMUP_SHARE = 0.25
"""Of the budget that warming up may take, beyond the first call."""
_SPIN_CYCLES_PER_S = 2e9
"""About what GPUs clock at; only decides how long the queue is held up."""
_MAX_SPIN_S = 0.05


class Clock(Protocol):
    """What tells how long calls take on one device."""

    method: str
    """In words, for the Record."""

    def now_s(self) -> float:
        """Seconds of the host since some moment; for budgets."""
        ...

    def time_s(
        self, step: Callable[[], object], *, num_calls: int, before: Callable[[], object] | None
    ) -> float:
        """Seconds of ``num_calls`` calls together; ``before`` runs first and is not timed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to go on; the defaults suit one operator."""

    relative_half_width_fraction: float = 0.02
    """Half the width of the interval of the median, over the median, that is narrow enough."""
    confidence_fraction: float = 0.95
    min_repeats: int = 9
    """Before the interval is looked at."""
    max_repeats: int = 201
    budget_s: float = 1.0
    """For warming up and repeats, beyond the first call."""
    fewest_repeats: int = 1
    """Made whatever they take."""
    min_repeat_s: float = 1e-3
    """A repeat makes as many calls as last this long."""
    max_calls: int = 1000
    """Of a repeat. Where launches are held up, fewer: a device's queue holds about 1,000 kernels,
    and what comes after waits for the host."""
    warmup_calls: int = 3
    warmup_s: float = 0.02
    """Warming up goes on for both, calls and seconds."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_repeats <= self.max_repeats or self.budget_s <= 0:
            raise BadRequest(
                "timer: needs 1 <= min_repeats <= max_repeats and a budget above 0 s, got "
                f"{self.min_repeats}, {self.max_repeats} and {self.budget_s} s"
            )


class StopReason(StrEnum):
    """Why no further repeat was made."""

    PRECISE = "precise"
    REPEATS = "repeats"
    BUDGET = "budget"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the Timer found out about one step."""

    timing: Timing
    """Of one call."""
    num_calls: int
    """In each repeat."""
    relative_half_width_fraction: float | None
    """Reached; None where there were too few repeats for an interval."""
    stopped_by: StopReason
    method: str
    """For the Record."""


class Timer:
    """Times steps on one device, each as long as its effort allows."""

    def __init__(
        self,
        clock: Clock,
        *,
        effort: Effort | None = None,
        flush_cache: Callable[[], object] | None = None,
    ) -> None:
        """With ``flush_cache``, called before every repeat, a repeat is a single call."""
        self.clock = clock
        self.effort = effort or Effort()
        self._flush_cache = flush_cache
        self.unfinished: Measured | None = None
        """What Ctrl-C left of the last measurement; None where it ended or had no repeat."""

    def measure(self, step: Callable[[], object]) -> Measured:
        """Time ``step``; what it returns is dropped. Whatever it raises passes through."""
        self.unfinished = None
        times_s: list[float] = []
        num_calls = 1
        try:
            with _no_garbage_collection():
                self._repeat_s(step, 1)  # loads and compiles what may be
                start_s = self.clock.now_s()
                call_s, times_s = self._warm_up(step, start_s)
                num_calls = self._num_calls(call_s)
                stopped_by = self._stop(times_s, num_calls, self.clock.now_s() - start_s)
                while stopped_by is None:
                    times_s.append(self._repeat_s(step, num_calls))
                    stopped_by = self._stop(times_s, num_calls, self.clock.now_s() - start_s)
        except KeyboardInterrupt:
            if times_s:
                self.unfinished = self._measured(times_s, num_calls, StopReason.INTERRUPTED)
            raise
        return self._measured(times_s, num_calls, stopped_by)

    def _measured(
        self, times_s: Sequence[float], num_calls: int, stopped_by: StopReason
    ) -> Measured:
        flushed = ", cache flushed before each repeat" if self._flush_cache else ""
        cut = ", interrupted" if stopped_by is StopReason.INTERRUPTED else ""
        return Measured(
            timing=timing_of(times_s),
            num_calls=num_calls,
            relative_half_width_fraction=_relative_half_width(
                times_s, self.effort.confidence_fraction
            ),
            stopped_by=stopped_by,
            method=f"{self.clock.method}, median of repeats of {num_calls} calls{flushed}{cut}",
        )

    def _repeat_s(self, step: Callable[[], object], num_calls: int) -> float:
        together_s = self.clock.time_s(step, num_calls=num_calls, before=self._flush_cache)
        return together_s / num_calls

    def _warm_up(self, step: Callable[[], object], start_s: float) -> tuple[float, list[float]]:
        """Shortest call in seconds; where calls are long, the one made counts as a repeat."""
        effort = self.effort
        times_s = [self._repeat_s(step, 1)]
        if times_s[0] >= _WARMUP_SHARE * effort.budget_s and self._num_calls(times_s[0]) == 1:
            return times_s[0], times_s
        while True:
            spent_s = self.clock.now_s() - start_s
            enough = len(times_s) >= effort.warmup_calls and spent_s >= effort.warmup_s
            if enough or spent_s >= _WARMUP_SHARE * effort.budget_s:
                return min(times_s), []
            times_s.append(self._repeat_s(step, 1))

    def _num_calls(self, call_s: float) -> int:
        if self._flush_cache is not None:
            return 1
        most = self.effort.max_calls
        if call_s * most <= self.effort.min_repeat_s:
            return most
        return max(1, math.ceil(self.effort.min_repeat_s / call_s))

    def _stop(self, times_s: Sequence[float], num_calls: int, spent_s: float) -> StopReason | None:
        effort = self.effort
        if not times_s:
            return None
        if len(times_s) >= effort.min_repeats:
            reached = _relative_half_width(times_s, effort.confidence_fraction)
            if reached is not None and reached <= effort.relative_half_width_fraction:
                return StopReason.PRECISE
        if len(times_s) >= effort.max_repeats:
            return StopReason.REPEATS
        # Whether another repeat still fits.
        if len(times_s) < effort.fewest_repeats:
            return None
        if spent_s + num_calls * statistics.median(times_s) > effort.budget_s:
            return StopReason.BUDGET
        return None


def median_interval(
    times_s: Sequence[float], *, confidence_fraction: float = 0.95
) -> tuple[float, float] | None:
    """Interval, in the unit of ``times_s``, that holds the median with the given confidence.

    None where there are too few: 95 % needs 6.
    """
    rank = _interval_rank(len(times_s), confidence_fraction)
    if rank == 0:
        return None
    ordered = sorted(times_s)
    return ordered[rank - 1], ordered[-rank]


@functools.cache
def _interval_rank(count: int, confidence_fraction: float) -> int:
    """Largest ``k`` with ``2 P(B < k) <= 1 - confidence``; 0 where there is none."""
    allowed = (1 - confidence_fraction) / 2 * 2**count
    below = 0
    for rank in range(count // 2 + 1):
        below += math.comb(count, rank)
        if below > allowed:
            return rank
    return count // 2


def _relative_half_width(times_s: Sequence[float], confidence_fraction: float) -> float | None:
    interval = median_interval(times_s, confidence_fraction=confidence_fraction)
    if interval is None:
        return None
    low, high = interval
    middle = statistics.median(times_s)
    return (high - low) / 2 / middle if middle > 0 else 0.0


class HostClock:
    """``time.perf_counter`` around the calls, for work that is done when the call returns."""

    def __init__(
        self,
        *,
        wait: Callable[[], object] | None = None,
        now_s: Callable[[], float] = time.perf_counter,
        processor_time: bool = False,
    ) -> None:
        """A clock of the host.

        Args:
            wait: Runs before the calls and, timed, after them: until all work is done.
            now_s: The clock, in seconds.
            processor_time: Count what the process has used of the processor, all its threads
                together, so that others on a busy machine count less; right for one thread only.
        """
        self.now_s = now_s
        self._counted_s = time.process_time if processor_time else now_s
        self._wait = wait or _nothing
        what = "process_time" if processor_time else "perf_counter"
        self.method = f"{what} around the calls"

    def time_s(
        self, step: Callable[[], object], *, num_calls: int, before: Callable[[], object] | None
    ) -> float:
        """Seconds of the host from before the first call until after the last and ``wait``."""
        if before is not None:
            before()
        self._wait()
        start_s = self._counted_s()
        for _ in range(num_calls):
            step()
        self._wait()
        return self._counted_s() - start_s


class CudaClock:
    """A pair of CUDA events around the calls, on the current stream of the device.

    With ``hold_queue`` the device spins while the host enqueues the calls, so that the time is what
    the device takes and not what launching takes. A step that waits for the device defeats this.
    """

    def __init__(
        self, device: str, *, wait: Callable[[], object] | None = None, hold_queue: bool = False
    ) -> None:
        """``wait`` as for ``HostClock``; what it does on the stream is timed."""
        import torch  # a CPU measurement needs no torch

        self._cuda: Any = torch.cuda
        self._device = device
        self._wait = wait or _nothing
        self._enqueue_s: float | None = 0.0 if hold_queue else None
        self.method = "CUDA events around the calls" + (
            ", launches hidden behind a spinning kernel" if hold_queue else ""
        )

    def now_s(self) -> float:
        """Seconds of the host."""
        return time.perf_counter()

    def time_s(
        self, step: Callable[[], object], *, num_calls: int, before: Callable[[], object] | None
    ) -> float:
        """Seconds of the device between the events."""
        cuda = self._cuda
        with cuda.device(self._device):
            start = cuda.Event(enable_timing=True)
            stop = cuda.Event(enable_timing=True)
            self._wait()
            cuda.synchronize()
            if before is not None:
                before()
            if self._enqueue_s:
                spin_s = min(1.2 * self._enqueue_s * num_calls, _MAX_SPIN_S)
                cuda._sleep(int(spin_s * _SPIN_CYCLES_PER_S))
            start.record()
            enqueue_start_s = time.perf_counter()
            for _ in range(num_calls):
                step()
            enqueue_s = time.perf_counter() - enqueue_start_s
            self._wait()
            stop.record()
            cuda.synchronize()
        if self._enqueue_s is not None:
            self._enqueue_s = enqueue_s / num_calls
        return float(start.elapsed_time(stop)) * 1e-3


def clock_of(device: str, *, processor_time: bool = False) -> Clock:
    """The clock for operators on ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

    ``processor_time`` is for the CPU; see ``HostClock``.
    """
    if device.split(":")[0] == "cuda":
        return CudaClock(device, hold_queue=True)
    return HostClock(processor_time=processor_time)


def measure(
    step: Callable[[], object],
    *,
    warmup: int,
    repeats: int,
    synchronize: Callable[[], None] | None = None,
    device: str = "cpu",
) -> Timing:
    """Timing of ``step`` over ``repeats`` single calls that follow ``warmup`` unmeasured ones.

    For what must be called a number of times known before, such as a step of all ranks together;
    ``Timer`` decides for itself. On a CUDA device (``"cuda"``, ``"cuda:1"``) a pair of events on
    its current stream brackets each run; elsewhere ``time.perf_counter`` does.

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
    on_cuda = device.split(":")[0] == "cuda"
    clock: Clock = CudaClock(device, wait=synchronize) if on_cuda else HostClock(wait=synchronize)
    for _ in range(warmup):
        step()
    return timing_of([clock.time_s(step, num_calls=1, before=None) for _ in range(repeats)])


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a repeat would be measured with it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _nothing() -> None:
    """Stands for a synchronization that is not needed."""
