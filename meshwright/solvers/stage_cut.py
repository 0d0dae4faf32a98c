"""Cutting a chain into stages whose segments each choose a strategy under the stage's memory.

For a price of memory mu every segment takes the strategy with the least ``time + mu bytes``
(``price_rows``); a row of such strategies costs every stage (first, last) a difference of prefix
sums. The stage takes the cheapest row that fits, or where a row is just too large, the mixture of
it and the next that just fits: what a linear relaxation of the stage's knapsack gives. Then, as
Alpa does (arXiv 2201.12023, section 5.2), for every bound on the slowest stage a dynamic program
finds the least sum::

    best(p, j) = min over i of best(p - 1, i) + stage(p, i, j)    with stage(p, i, j) <= bound
    step       = best(P, V) + (M - 1) bound
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import FloatArray, IntArray
from meshwright.space.linear import LinearCosts

__all__ = ["Rows", "StageTimes", "best_cuts", "price_rows", "stage_times"]

_NUM_BOUNDS = 40
_SLACK = 1.5
"""Bounds are tried up to so many times the least possible one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Strategies by price of memory; arrays of shape (families, prices, V).

    A family allows some shardings; along its prices memory falls and time rises.
    """

    strategy: IntArray
    time_s: FloatArray
    """With the tail's share and resharding."""
    fixed_bytes: FloatArray
    kept_bytes: FloatArray
    spare_bytes: FloatArray


def price_rows(costs: LinearCosts, *, num_microbatches: int, in_flight: float, num: int) -> Rows:
    """Rows for ``num`` prices of memory between none and all that matters.

    Args:
        costs: what strategies cost.
        num_microbatches: of a step.
        in_flight: micro-batches a middle stage holds.
        num: prices.
    """
    time_s = costs.step_s(num_microbatches)
    num_bytes = costs.stage_bytes(in_flight) + costs.spare_bytes / len(time_s)
    prices = _prices(time_s, num_bytes, num)
    num_shardings = costs.resharding_s.shape[1]
    families: list[tuple[int, ...]] = [(sharding,) for sharding in range(num_shardings)]
    if num_shardings > 1:
        families.append(tuple(range(num_shardings)))
    found = []
    for family in families:
        allowed = np.isin(costs.sharding_of, family)
        total = time_s + prices[:, None, None] * num_bytes
        total = np.where(allowed, total, np.inf)
        if len(family) > 1:
            found.append(_with_resharding(costs, total))
        else:
            found.append(np.argmin(total, axis=2))
    strategy = np.stack(found)
    segment = np.arange(len(time_s))
    sharding = costs.sharding_of[strategy]
    seconds = time_s[segment, strategy]
    seconds[:, :, 1:] += costs.resharding_s[segment[1:], sharding[:, :, :-1], sharding[:, :, 1:]]
    return Rows(
        strategy=strategy,
        time_s=seconds,
        fixed_bytes=costs.fixed_bytes[segment, strategy],
        kept_bytes=costs.kept_bytes[segment, strategy],
        spare_bytes=costs.spare_bytes[segment, strategy],
    )


def _prices(time_s: FloatArray, num_bytes: FloatArray, num: int) -> FloatArray:
    """(num,) seconds per byte, ascending from 0: where some segment would change its mind."""
    kinds = np.unique(np.concatenate([time_s, num_bytes], axis=1), axis=0)
    seconds, sizes = np.split(kinds, 2, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (seconds[:, :, None] - seconds[:, None, :]) / (
            sizes[:, None, :] - sizes[:, :, None]
        )
    slope = np.unique(slope[np.isfinite(slope) & (slope > 0)])
    if not len(slope):
        return np.zeros(1)
    between = np.sqrt(slope[1:] * slope[:-1])
    every = np.concatenate([[0.0], between, [slope[-1] * 2]])
    if len(every) <= num:
        return every
    return np.asarray(every[np.unique(np.linspace(0, len(every) - 1, num).round().astype(int))])


def _with_resharding(costs: LinearCosts, total: FloatArray) -> IntArray:
    """(prices, V) best strategies with resharding between neighbors: Viterbi over shardings."""
    num_prices, count, _ = total.shape
    num_shardings = costs.resharding_s.shape[1]
    own = np.empty((num_prices, count, num_shardings))
    choice = np.empty((num_prices, count, num_shardings), dtype=np.int64)
    for sharding in range(num_shardings):
        where = np.flatnonzero(costs.sharding_of == sharding)
        best = np.argmin(total[:, :, where], axis=2)
        choice[:, :, sharding] = where[best]
        own[:, :, sharding] = np.take_along_axis(total, where[best][:, :, None], axis=2)[:, :, 0]
    reached = own[:, 0]
    came = np.zeros((num_prices, count, num_shardings), dtype=np.int64)
    for segment in range(1, count):
        through = reached[:, :, None] + costs.resharding_s[segment]
        came[:, segment] = np.argmin(through, axis=1)
        reached = np.min(through, axis=1) + own[:, segment]
    path = np.empty((num_prices, count), dtype=np.int64)
    path[:, -1] = np.argmin(reached, axis=1)
    rows = np.arange(num_prices)
    for segment in range(count - 1, 0, -1):
        path[:, segment - 1] = came[rows, segment, path[:, segment]]
    return np.take_along_axis(choice, path[:, :, None], axis=2)[:, :, 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Of every run of segments as a stage; arrays of shape (stages, V + 1, V + 1)."""

    time_s: FloatArray
    """From the first segment to the one before the last index; infinite where nothing fits."""
    row: IntArray
    """Number of the row that fits, families times prices."""
    share: FloatArray
    """Share of the stage that may use the row before it, by bytes."""


def stage_times(
    rows: Rows, *, in_flight: FloatArray, capacity_bytes: FloatArray, always_bytes: float
) -> StageTimes:
    """The best of all rows for every stage and run of segments.

    Args:
        rows: strategies by price of memory.
        in_flight: (P,) micro-batches each stage holds.
        capacity_bytes: (P,)
        always_bytes: what any stage needs besides.
    """
    families, num_prices, count = rows.strategy.shape
    time_s = _runs(rows.time_s)
    fixed, kept = _runs(rows.fixed_bytes), _runs(rows.kept_bytes)
    spare = rows.spare_bytes.max(axis=2)[:, :, None, None] + always_bytes
    shape = (len(in_flight), count + 1, count + 1)
    best = StageTimes(
        time_s=np.full(shape, np.inf),
        row=np.zeros(shape, dtype=np.int64),
        share=np.zeros(shape),
    )
    is_run = np.triu(np.ones(shape[1:], dtype=np.bool_), 1)
    known: dict[tuple[float, float], int] = {}
    for stage, key in enumerate(zip(in_flight.tolist(), capacity_bytes.tolist(), strict=True)):
        if key in known:
            for array in (best.time_s, best.row, best.share):
                array[stage] = array[known[key]]
            continue
        known[key] = stage
        room = key[1] - spare
        need = fixed + key[0] * kept
        for family in range(families):
            _improve(best, stage, family, time_s[family], need[family], room[family], is_run)
    del num_prices
    return best


def _improve(
    best: StageTimes,
    stage: int,
    family: int,
    time_s: FloatArray,
    need: FloatArray,
    room: FloatArray,
    is_run: np.ndarray,
) -> None:
    """Take the runs that one family does better; arrays of shape (prices, V + 1, V + 1)."""
    fits = need <= room
    row = np.argmax(fits, axis=0)
    able = fits.any(axis=0) & is_run
    before = np.maximum(row - 1, 0)

    def at(array: FloatArray, which: IntArray) -> FloatArray:
        return np.asarray(np.take_along_axis(array, which[None], axis=0)[0])

    wide = np.broadcast_to(room, need.shape)
    saved = at(need, before) - at(need, row)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (np.minimum(at(wide, row), at(wide, before)) - at(need, row)) / saved
    share = np.where((row > 0) & (saved > 0), np.clip(share, 0.0, 1.0), 0.0)
    mixed = at(time_s, row) * (1 - share) + at(time_s, before) * share
    better = able & (mixed < best.time_s[stage])
    best.time_s[stage][better] = mixed[better]
    best.row[stage][better] = row[better] + family * len(need)
    best.share[stage][better] = share[better]


def _runs(amount: FloatArray) -> FloatArray:
    """(..., V + 1, V + 1) sums from the first index up to the second."""
    total = np.concatenate([np.zeros((*amount.shape[:-1], 1)), np.cumsum(amount, axis=-1)], axis=-1)
    return np.asarray(total[..., None, :] - total[..., :, None])


def best_cuts(
    times: StageTimes, *, num_microbatches: int, num: int
) -> tuple[tuple[float, tuple[int, ...]], ...]:
    """The ``num`` best cuts found, as (estimated seconds, first segment of each stage)."""
    num_stages, size, _ = times.time_s.shape
    count = size - 1
    if num_stages == 1:
        seconds = float(times.time_s[0, 0, count]) * num_microbatches
        return ((seconds, (0,)),) if np.isfinite(seconds) else ()
    least = _least_bound(times)
    if least is None:
        return ()
    found: dict[tuple[int, ...], float] = {}
    bounds = least * np.linspace(1.0, _SLACK, _NUM_BOUNDS) * (1 + 1e-9)
    for bound in bounds if num_microbatches > 1 else [np.inf]:
        cut = _least_sum(times.time_s, float(bound))
        if cut is not None:
            seconds = cut[0] + (num_microbatches - 1) * cut[1]
            found[cut[2]] = min(seconds, found.get(cut[2], np.inf))
    ranked = sorted((seconds, starts) for starts, seconds in found.items())
    return tuple(ranked[:num])


def _least_bound(times: StageTimes) -> float | None:
    """The least time of the slowest stage: a dynamic program on the maximum."""
    reached = times.time_s[0, 0]
    for stage in range(1, len(times.time_s)):
        reached = np.min(np.maximum(reached[:, None], times.time_s[stage]), axis=0)
    return float(reached[-1]) if np.isfinite(reached[-1]) else None


def _least_sum(time_s: FloatArray, bound_s: float) -> tuple[float, float, tuple[int, ...]] | None:
    """Sum, slowest stage and starts of the cut of least sum under a bound."""
    allowed = np.where(time_s <= bound_s, time_s, np.inf)
    reached = allowed[0, 0]
    came = []
    for stage in range(1, len(time_s)):
        through = reached[:, None] + allowed[stage]
        came.append(np.argmin(through, axis=0))
        reached = np.min(through, axis=0)
    if not np.isfinite(reached[-1]):
        return None
    ends = [len(reached) - 1]
    for back in reversed(came):
        ends.append(int(back[ends[-1]]))
    starts = tuple(reversed(ends[1:]))
    starts = (0, *starts) if len(time_s) > 1 else (0,)
    bounds = [*starts, len(reached) - 1]
    slowest = max(float(time_s[p, bounds[p], bounds[p + 1]]) for p in range(len(time_s)))
    return float(reached[-1]), slowest, starts
