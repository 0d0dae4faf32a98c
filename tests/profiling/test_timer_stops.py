"""When the Timer stops, what it batches, and what it keeps; on a clock the test turns itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest

from meshwright.errors import BadRequest
from meshwright.profiling.timer import (
    Effort,
    HostClock,
    StopReason,
    Timer,
    clock_of,
    median_interval,
)


class Turned:
    """A clock and steps that turn it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_calls = 0

    def step(self, durations_s: Iterator[float]) -> Callable[[], object]:
        def run() -> None:
            self.now_s += next(durations_s)
            self.num_calls += 1

        return run

    def timer(self, effort: Effort, flush_cache: Callable[[], object] | None = None) -> Timer:
        clock = HostClock(now_s=lambda: self.now_s)
        return Timer(clock, effort=effort, flush_cache=flush_cache)


NO_WARMUP = {"warmup_calls": 1, "warmup_s": 0.0}


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (5, None),  # 2 / 2^5 = 6.3 % lie outside even of all
        (6, (1, 6)),  # 2 / 2^6 = 3.1 %
        (8, (1, 8)),  # 2 (1 + 8) / 2^8 = 7.0 % outside of (2, 7)
        (9, (2, 8)),  # 2 (1 + 9) / 2^9 = 3.9 %
        (20, (6, 15)),  # 2 P(B < 6) = 4.1 %, of the table in David and Nagaraja
    ],
)
def test_interval_of_the_median(count: int, expected: tuple[int, int] | None) -> None:
    assert expected == median_interval([float(value) for value in range(count, 0, -1)])


def test_interval_covers_the_median_as_often_as_it_says() -> None:
    """All 2^10 ways of ten values lying below or above the median: (2, 9) holds in 97.9 %."""
    covered = sum(2 <= sum(below) <= 8 for below in itertools.product((0, 1), repeat=10))

    assert 1 - 2 * 11 / 1024 == covered / 1024
    assert (2.0, 9.0) == median_interval([float(value) for value in range(1, 11)])


def test_equal_repeats_stop_at_the_least() -> None:
    turned = Turned()
    measured = turned.timer(Effort(min_repeats=9, budget_s=1.0, **NO_WARMUP)).measure(
        turned.step(itertools.repeat(0.01))
    )

    assert StopReason.PRECISE == measured.stopped_by
    assert 9 == measured.timing.num_repeats
    assert 0.01 == pytest.approx(measured.timing.median_s)
    assert 0.0 == pytest.approx(measured.relative_half_width_fraction)


def test_goes_on_until_the_interval_is_narrow() -> None:
    """Two wide and two slow repeats of nine make (2, 8) too wide; later ones are alike.

    Of n repeats with 2 at 20 ms and 2 at 5 ms, the rest at 10 ms, the interval is narrow as soon as
    it leaves out 2 on each side: rank 3 needs n = 12, as 2 P(B < 3) = 2 (1 + 12 + 66) / 2^12.
    """
    turned = Turned()
    durations = itertools.chain(
        [0.01, 0.01],  # the first call, and the one of warming up
        [0.005, 0.02, 0.005, 0.02],
        itertools.repeat(0.01),
    )
    measured = turned.timer(Effort(min_repeats=9, budget_s=10.0, **NO_WARMUP)).measure(
        turned.step(durations)
    )

    assert StopReason.PRECISE == measured.stopped_by
    assert 12 == measured.timing.num_repeats
    assert 0.01 == pytest.approx(measured.timing.median_s)


def test_outliers_are_kept_and_do_not_move_the_median() -> None:
    turned = Turned()
    durations = itertools.chain([0.01] * 4, [1.0], itertools.repeat(0.01))
    measured = turned.timer(Effort(min_repeats=9, budget_s=10.0, **NO_WARMUP)).measure(
        turned.step(durations)
    )

    assert 1 == sum(time_s > 0.5 for time_s in measured.timing.times_s)
    assert 0.01 == pytest.approx(measured.timing.median_s)


def test_most_repeats_end_it() -> None:
    turned = Turned()
    measured = turned.timer(
        Effort(min_repeats=9, max_repeats=15, budget_s=1e9, **NO_WARMUP)
    ).measure(turned.step(itertools.cycle([0.01, 0.03])))

    assert StopReason.REPEATS == measured.stopped_by
    assert 15 == measured.timing.num_repeats
    assert measured.relative_half_width_fraction is not None
    assert measured.relative_half_width_fraction > 0.02


def test_the_fewest_repeats_are_made_whatever_the_budget() -> None:
    turned = Turned()
    measured = turned.timer(Effort(budget_s=0.01, fewest_repeats=3, **NO_WARMUP)).measure(
        turned.step(itertools.repeat(1.0))
    )

    assert StopReason.BUDGET == measured.stopped_by
    assert 3 == measured.timing.num_repeats


def test_an_interruption_leaves_what_was_repeated() -> None:
    """A first call, one to warm up, four repeats, then Ctrl-C in the fifth."""

    def durations() -> Iterator[float]:
        yield from [0.1] * 6
        raise KeyboardInterrupt

    turned = Turned()
    timer = turned.timer(Effort(budget_s=10.0, **NO_WARMUP))
    with pytest.raises(KeyboardInterrupt):
        timer.measure(turned.step(durations()))

    assert timer.unfinished is not None
    assert StopReason.INTERRUPTED == timer.unfinished.stopped_by
    assert [pytest.approx(0.1)] * 4 == list(timer.unfinished.timing.times_s)
    assert timer.unfinished.method.endswith(", interrupted")


def test_budget_is_not_exceeded() -> None:
    """Calls of 0.1 s in 1 s: one to warm up and nine more; a further one would not fit."""
    turned = Turned()
    measured = turned.timer(
        Effort(min_repeats=30, max_repeats=30, budget_s=1.05, **NO_WARMUP)
    ).measure(turned.step(itertools.repeat(0.1)))

    assert StopReason.BUDGET == measured.stopped_by
    assert 9 == measured.timing.num_repeats
    assert turned.now_s - 0.1 <= 1.05  # the first call is extra


def test_a_call_longer_than_the_budget_is_made_twice() -> None:
    turned = Turned()
    measured = turned.timer(Effort(budget_s=1.0)).measure(turned.step(itertools.repeat(5.0)))

    assert 2 == turned.num_calls
    assert (5.0,) == measured.timing.times_s
    assert StopReason.BUDGET == measured.stopped_by
    assert measured.relative_half_width_fraction is None


def test_a_slow_first_call_costs_no_budget() -> None:
    """Loading a library takes 30 s once; the operator itself 10 ms."""
    turned = Turned()
    durations = itertools.chain([30.0], itertools.repeat(0.01))
    measured = turned.timer(Effort(budget_s=1.0)).measure(turned.step(durations))

    assert StopReason.PRECISE == measured.stopped_by
    assert 0.01 == pytest.approx(max(measured.timing.times_s))


def test_short_calls_are_batched() -> None:
    """Calls of 3 us: 334 make the least repeat of 1 ms."""
    turned = Turned()
    measured = turned.timer(Effort(min_repeat_s=1e-3, **NO_WARMUP)).measure(
        turned.step(itertools.repeat(3e-6))
    )

    assert math.ceil(1e-3 / 3e-6) == measured.num_calls
    assert 3e-6 == pytest.approx(measured.timing.median_s)
    assert turned.num_calls == 2 + measured.num_calls * measured.timing.num_repeats
    assert "repeats of 334 calls" in measured.method


def test_calls_of_a_repeat_are_limited() -> None:
    turned = Turned()
    measured = turned.timer(Effort(max_calls=100, **NO_WARMUP)).measure(
        turned.step(itertools.repeat(3e-6))
    )

    assert 100 == measured.num_calls


def test_the_cache_is_flushed_before_every_call_and_not_timed() -> None:
    turned = Turned()
    flushes: list[int] = []

    def flush() -> None:
        flushes.append(turned.num_calls)
        turned.now_s += 0.5

    measured = turned.timer(Effort(budget_s=60.0, **NO_WARMUP), flush).measure(
        turned.step(itertools.repeat(3e-6))
    )

    assert 1 == measured.num_calls
    assert list(range(turned.num_calls)) == flushes
    assert 3e-6 == pytest.approx(max(measured.timing.times_s))
    assert "cache flushed" in measured.method


def test_efforts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(BadRequest, match="1 <= min_repeats <= max_repeats"):
        Effort(min_repeats=10, max_repeats=5)


def test_processor_time_does_not_count_sleep() -> None:
    import time

    counted = HostClock(processor_time=True)
    counted_s = counted.time_s(lambda: time.sleep(0.05), num_calls=1, before=None)

    assert counted_s < 0.02
    assert "process_time" in counted.method
    assert "perf_counter" in clock_of("cpu").method
