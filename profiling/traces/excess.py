"""What one rank takes longer than the others: levels that last, delays that stand out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.profiling.traces.step_table import Cells

__all__ = ["Level", "events_of", "excess_of_ranks", "level_of", "period_of", "tail_threshold_s"]

_FALSE_ALARMS = 0.01
"""Single delays that noise alone may make stand out, in a whole table."""
_TAIL_MARGIN = 1.3
"""Tails of real noise are longer than exponential."""
_FILTER_ITERATIONS = 9
"""Of the running median: delays of up to four iterations in a row are no level."""
_MIN_LEVEL_ITERATIONS = 8
_MIN_STANDARD_ERRORS = 6.0
_GROWTH_OF_A_DRIFT = 0.8
"""Rise over mean above which a level is a drift: 0 for a step, 2 for a straight line from 0."""
_MIN_REGULAR = 0.75
"""Share of a period's iterations that must have a delay, and of delays that must lie on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A stretch of iterations in which a rank is slower throughout."""

    first: int
    last: int
    """Inclusive, as are all columns here."""
    is_growing: bool
    profile_s: Cells
    """(iterations,): its excess, 0 outside the stretch."""


def excess_of_ranks(judged_s: Cells) -> tuple[Cells, Cells]:
    """Seconds over the lower median of the ranks, (ranks, iterations), and how long iterations are.

    The lower median of an even number of ranks, for of two the faster one shows what is usual. The
    second, (iterations,), is that median over its own median, at least 1: in an iteration three
    times as long as usual, noise is three times as large.
    """
    middle = (len(judged_s) - 1) // 2
    usual_s = np.partition(judged_s, middle, axis=0)[middle]
    typical_s = float(np.median(usual_s))
    lengths = np.maximum(usual_s / typical_s, 1.0) if typical_s > 0 else np.ones_like(usual_s)
    return judged_s - usual_s[None, :], lengths


def tail_threshold_s(
    excess_s: Cells, *, body_quantile: float = 0.9, tail_quantile: float = 0.99
) -> float:
    """What noise in the calmer half of the ranks exceeds at most once in a hundred tables.

    The tail between the two quantiles, extrapolated as an exponential; a normal distribution falls
    off faster, so this is on the safe side. Noise of heavier tails holds delays of its own, which
    are named. What is looked for must not fill the part beyond ``tail_quantile`` of the calm ranks.
    """
    tails_s = np.quantile(excess_s, tail_quantile, axis=1)
    calm = np.argsort(tails_s, kind="stable")[: max(1, len(tails_s) // 2)]
    body_s, tail_s = np.quantile(excess_s[calm], (body_quantile, tail_quantile))
    scale_s = (tail_s - body_s) / np.log((1.0 - body_quantile) / (1.0 - tail_quantile))
    beyond = np.log(max((1.0 - tail_quantile) * excess_s.size / _FALSE_ALARMS, 1.0))
    return float(_TAIL_MARGIN * (tail_s + scale_s * beyond))


def events_of(residual_s: Cells, *, threshold_s: Cells) -> list[tuple[int, int]]:
    """(row, column) of each delay above its iteration's threshold, by row, then column."""
    rows, columns = np.nonzero(residual_s > threshold_s)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def level_of(excess_s: Cells, *, min_level_s: float) -> Level | None:
    """The stretch in which a rank's excess is lastingly above ``min_level_s``, if there is one.

    It is the interval with the greatest sum of (excess - half the least level), of the running
    median, so that single delays make no level.
    """
    num_iterations = len(excess_s)
    if num_iterations < _MIN_LEVEL_ITERATIONS:
        return None
    smooth_s = _running_median(excess_s)
    noise_s = _noise_s(excess_s)
    least_s = max(
        min_level_s, _MIN_STANDARD_ERRORS * 1.25 * noise_s / np.sqrt(_MIN_LEVEL_ITERATIONS)
    )
    first, last = _greatest_interval(smooth_s - 0.5 * least_s)
    length = last - first + 1
    if length < _MIN_LEVEL_ITERATIONS:
        return None
    inside_s = smooth_s[first : last + 1]
    error_s = 1.25 * noise_s / np.sqrt(length)
    if float(np.median(inside_s)) < max(min_level_s, _MIN_STANDARD_ERRORS * error_s):
        return None
    columns = np.arange(num_iterations, dtype=np.float64)
    slope_s, offset_s = np.polyfit(columns[first : last + 1], inside_s, 1)
    rise_s = slope_s * (length - 1)
    if rise_s > _GROWTH_OF_A_DRIFT * float(inside_s.mean()):
        first = max(0, min(first, round(-offset_s / slope_s)))
        line_s = np.clip(offset_s + slope_s * columns, 0.0, None)
        profile_s = np.where((columns >= first) & (columns <= last), line_s, 0.0)
        return Level(first=first, last=last, is_growing=True, profile_s=profile_s)
    level_s = float(np.median(excess_s[first : last + 1]))
    first = _edge(excess_s, first, level_s)
    last = num_iterations - 1 - _edge(excess_s[::-1], num_iterations - 1 - last, level_s)
    profile_s = np.where((columns >= first) & (columns <= last), level_s, 0.0)
    return Level(first=first, last=last, is_growing=False, profile_s=profile_s)


def period_of(columns: list[int], *, num_iterations: int) -> int | None:
    """The period of delays at ``columns``; None where they are too few or keep none.

    Most iterations of the period must have a delay and most delays lie on it, one iteration
    early or late allowed.
    """
    if len(columns) < 3:
        return None
    gaps = np.diff(columns)
    period = int(np.median(gaps))
    if period < 2:
        return None
    phases = np.array(columns) - columns[0]
    # Least squares over whole numbers of periods: a delay missed leaves the rest in place.
    turns = np.rint(phases / period)
    period_exact = float((phases @ turns) / max(turns @ turns, 1.0))
    off = np.abs(phases - turns * period_exact)
    on_time = off <= min(1.0, 0.25 * period)
    expected = (columns[-1] - columns[0]) / period_exact + 1
    if on_time.mean() < _MIN_REGULAR or on_time.sum() < _MIN_REGULAR * expected:
        return None
    spans_enough = columns[-1] - columns[0] + period >= 0.25 * num_iterations
    return round(period_exact) if spans_enough or len(columns) >= 5 else None


def _running_median(row_s: Cells) -> Cells:
    half = _FILTER_ITERATIONS // 2
    padded = np.pad(row_s, half, mode="reflect" if len(row_s) > half else "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, _FILTER_ITERATIONS)
    return np.asarray(np.median(windows, axis=1), dtype=np.float64)


def _noise_s(row_s: Cells) -> float:
    """Standard deviation of the noise, from differences of neighbors: blind to levels."""
    return float(1.4826 * np.median(np.abs(np.diff(row_s))) / np.sqrt(2.0))


def _greatest_interval(values: Cells) -> tuple[int, int]:
    """First and last index of the contiguous run with the greatest sum (Kadane)."""
    best, best_first, best_last = -np.inf, 0, 0
    running, first = 0.0, 0
    for index, value in enumerate(values.tolist()):
        if running <= 0.0:
            running, first = 0.0, index
        running += value
        if running > best:
            best, best_first, best_last = running, first, index
    return best_first, best_last


def _edge(row_s: Cells, near: int, level_s: float) -> int:
    """Where the level begins: the least-squares step within a filter's width of ``near``."""
    low = max(0, near - _FILTER_ITERATIONS)
    window = np.clip(row_s[low : near + _FILTER_ITERATIONS + 1], -level_s, 2.0 * level_s)
    # Starting at i, the cells before are to be 0 and those from it on the level.
    before = np.concatenate([[0.0], np.cumsum(window**2)])
    after = np.concatenate([np.cumsum(((window - level_s) ** 2)[::-1])[::-1], [0.0]])
    return min(low + int((before + after).argmin()), near + _FILTER_ITERATIONS, len(row_s) - 1)
