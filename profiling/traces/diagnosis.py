"""Which ranks are slow, since when and by how much, from per-rank times alone.

In a synchronous step the time of the step is equal on all ranks; the slow rank is the one with the
longest compute and the shortest waiting. So ranks are compared by compute where it is known, and by
the step itself only where nothing else is:

    excess[r, t] = compute[r, t] - (lower median over ranks of compute[., t])

The median takes off what all ranks did together. A level of excess that lasts is a persistent slow
rank (or a growing one), found by the interval of greatest sum; what then still stands out of the
noise is a delay: one-off, periodic or irregular. Noise is taken from the calmer half of the ranks,
its tail extrapolated as an exponential. The idea to judge ranks by few numbers per step, with
principal components, clusters and a phase plot, is that of Afzal, Hager, Wellein and Markidis
(arXiv 2205.13963).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from meshwright.profiling.traces.components import cluster_of_rank, principal_components
from meshwright.profiling.traces.excess import (
    Level,
    events_of,
    excess_of_ranks,
    level_of,
    period_of,
    tail_threshold_s,
)
from meshwright.profiling.traces.step_table import Cells, StepTable
from meshwright.profiling.traces.waves import IdleWave, trace_wave

__all__ = ["LEAST_ITERATIONS", "CommonDelay", "Diagnosis", "Pattern", "SlowRank", "diagnose"]

_MIN_SHARE = 0.03
"""Of the typical step: a rank slower by less is not called slow."""
_MIN_EVENT_SHARE = 0.1
"""Of the typical step: a single delay below is not named."""
LEAST_ITERATIONS = 2
"""One cannot tell a slow rank from one whose work was larger or whose host began it late."""
_FEW_ITERATIONS = 20
_MAX_WAVES = 200
_QUANTILES_BELOW_WAVES = {"body_quantile": 0.75, "tail_quantile": 0.9}
"""A wave passes every rank, so the last percent of a rank's waits may be the wave itself."""
_SPREAD_OF_EQUAL_STEPS = 0.01


class Pattern(StrEnum):
    """When a rank is slow."""

    PERSISTENT = "persistent"
    GROWING = "growing"
    PERIODIC = "periodic"
    IRREGULAR = "irregular"
    ONE_OFF = "one_off"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowRank:
    """One rank that is slower than the others, in one pattern."""

    rank: int
    pattern: Pattern
    since_iteration: int
    until_iteration: int
    """The last one it was slow in."""
    num_iterations: int
    """In which it was slow."""
    period_iterations: int | None
    excess_s: float
    """By how much it was slower, median over those iterations; of a growing one, at the end."""
    total_excess_s: float
    step_fraction: float
    """``total_excess_s`` over the time of all steps: what the run would have gained at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonDelay:
    """An iteration in which every rank was late, so that no rank is to blame."""

    iteration: int
    where: str
    """``compute`` (input, garbage collection, a checkpoint) or ``communication`` (the network)."""
    delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What the times say."""

    num_ranks: int
    num_iterations: int
    judged_by: str
    """``compute``, or ``step`` where only step times were given."""
    step_time_s: float
    """Median over ranks and iterations."""
    noise_s: float
    """A delay of one rank in one iteration below this is not told from noise."""
    slow_ranks: tuple[SlowRank, ...]
    """Costliest first."""
    idle_waves: tuple[IdleWave, ...]
    common_delays: tuple[CommonDelay, ...]
    lag_s: float
    """How far apart in time the first and the last rank are at the end, beyond the start."""
    desynchronized: bool
    """Whether that is more than one step."""
    clusters: tuple[tuple[int, ...], ...]
    """Ranks that behave alike, largest group first."""
    component_fractions: tuple[float, ...]
    component_scores: tuple[tuple[float, ...], ...]
    """For each rank, along each principal component."""
    notes: tuple[str, ...]
    """What the times cannot tell."""

    @property
    def is_conclusive(self) -> bool:
        """False where there are too few iterations for a verdict; then no rank is named."""
        return self.num_iterations >= LEAST_ITERATIONS

    @property
    def healthy(self) -> bool:
        """Whether there are iterations enough and nothing is wrong in them."""
        return self.is_conclusive and not (
            self.slow_ranks or self.idle_waves or self.desynchronized
        )


def diagnose(table: StepTable, *, min_share: float = _MIN_SHARE) -> Diagnosis:
    """What is wrong with the ranks of ``table``.

    Args:
        table: Times of all ranks.
        min_share: Of the typical step: the least a lastingly slow rank is slower by.
    """
    by_compute = table.compute_s is not None
    judged_s = table.step_s if table.compute_s is None else table.compute_s
    step_time_s = float(np.median(table.step_s))
    excess_s, lengths = excess_of_ranks(judged_s)
    levels = [level_of(row_s, min_level_s=min_share * step_time_s) for row_s in excess_s]
    residual_s = excess_s - np.array(
        [np.zeros_like(row) if level is None else level.profile_s
         for row, level in zip(excess_s, levels, strict=True)]
    )  # fmt: skip
    # By step times alone what travels shows in every rank, and is no noise either.
    quantiles = {} if by_compute else _QUANTILES_BELOW_WAVES
    noise_s = max(
        tail_threshold_s(residual_s / lengths, **quantiles), _MIN_EVENT_SHARE * step_time_s
    )
    is_conclusive = table.num_iterations >= LEAST_ITERATIONS
    events = events_of(residual_s, threshold_s=noise_s * lengths) if is_conclusive else []
    waves, explained = _waves(table, events, residual_s, by_compute=by_compute)
    slow = [
        _lasting(table.ranks[row], level, table) for row, level in enumerate(levels) if level
    ] + _delays(
        table, [item for item in events if item not in explained], residual_s
    )  # fmt: skip
    components = principal_components(table.step_s if table.wait_s is None else table.wait_s)
    labels = cluster_of_rank(components.scores)
    lag_s = _lag_s(table.step_s)
    return Diagnosis(
        num_ranks=table.num_ranks,
        num_iterations=table.num_iterations,
        judged_by="compute" if by_compute else "step",
        step_time_s=step_time_s,
        noise_s=noise_s,
        slow_ranks=tuple(sorted(slow, key=lambda item: (-item.total_excess_s, item.rank))),
        idle_waves=tuple(
            replace(
                wave,
                source_rank=table.ranks[wave.source_rank],
                iteration=table.iterations[wave.iteration],
            )
            for wave in waves
        ),
        common_delays=_common_delays(table, step_time_s=step_time_s),
        lag_s=lag_s,
        desynchronized=is_conclusive and lag_s > step_time_s,
        clusters=tuple(
            tuple(rank for rank, at in zip(table.ranks, labels, strict=True) if at == label)
            for label in sorted(set(labels))
        ),
        component_fractions=components.explained_fraction,
        component_scores=tuple(map(tuple, components.scores.tolist())),
        notes=_notes(table),
    )


def _lasting(rank: int, level: Level, table: StepTable) -> SlowRank:
    profile_s = level.profile_s[level.first : level.last + 1]
    total_s = float(profile_s.sum())
    return SlowRank(
        rank=rank,
        pattern=Pattern.GROWING if level.is_growing else Pattern.PERSISTENT,
        since_iteration=table.iterations[level.first],
        until_iteration=table.iterations[level.last],
        num_iterations=len(profile_s),
        period_iterations=None,
        excess_s=float(profile_s[-1]),
        total_excess_s=total_s,
        step_fraction=_fraction(total_s, table),
    )


def _delays(table: StepTable, events: list[tuple[int, int]], residual_s: Cells) -> list[SlowRank]:
    """The delays of each rank that has any, as one pattern."""
    found: list[SlowRank] = []
    for row in sorted({row for row, _ in events}):
        columns = [column for at, column in events if at == row]
        period = period_of(columns, num_iterations=table.num_iterations)
        pattern = Pattern.IRREGULAR if period is None else Pattern.PERIODIC
        delays_s = residual_s[row, columns]
        found.append(
            SlowRank(
                rank=table.ranks[row],
                pattern=Pattern.ONE_OFF if len(columns) == 1 else pattern,
                since_iteration=table.iterations[columns[0]],
                until_iteration=table.iterations[columns[-1]],
                num_iterations=len(columns),
                period_iterations=period,
                excess_s=float(np.median(delays_s)),
                total_excess_s=float(delays_s.sum()),
                step_fraction=_fraction(float(delays_s.sum()), table),
            )
        )
    return found


def _waves(
    table: StepTable, events: list[tuple[int, int]], residual_s: Cells, *, by_compute: bool
) -> tuple[list[IdleWave], set[tuple[int, int]]]:
    """Waves that delays sent out, earliest first, and the delays that are only a wave passing.

    By step times alone a passing wave looks like a delay of every rank it reaches; there the
    earliest is the source and the others are explained by it.
    """
    waits_s = table.step_s if table.wait_s is None else table.wait_s
    late_s = waits_s - np.median(waits_s, axis=1, keepdims=True)
    noise_s = tail_threshold_s(late_s, **_QUANTILES_BELOW_WAVES)
    waves: list[IdleWave] = []
    explained: set[tuple[int, int]] = set()
    for row, column in sorted(events, key=lambda item: item[1])[:_MAX_WAVES]:
        if (row, column) in explained:
            continue
        delay_s = float(residual_s[row, column])
        traced = trace_wave(
            late_s, row=row, column=column, delay_s=delay_s,
            threshold_s=max(noise_s, 0.25 * delay_s),
        )  # fmt: skip
        if traced is None:
            continue
        waves.append(traced[0])
        if not by_compute:
            explained |= traced[1]
    return waves, explained


def _common_delays(table: StepTable, *, step_time_s: float) -> tuple[CommonDelay, ...]:
    """Iterations in which even the least affected ranks were late by half a step."""
    if table.compute_s is None or table.wait_s is None:
        return ()
    found: list[CommonDelay] = []
    for where, cells_s in (("compute", table.compute_s), ("communication", table.wait_s)):
        # The shortest wait is that of the slowest rank: if it too was long, the network was slow.
        least_s = cells_s.min(axis=0)
        late_s = least_s - float(np.median(least_s))
        threshold_s = max(
            0.5 * step_time_s, tail_threshold_s(late_s[None, :], **_QUANTILES_BELOW_WAVES)
        )
        found += [
            CommonDelay(
                iteration=table.iterations[column], where=where, delay_s=float(late_s[column])
            )
            for column in np.flatnonzero(late_s > threshold_s).tolist()
        ]
    return tuple(sorted(found, key=lambda item: item.iteration))


def _lag_s(step_s: Cells) -> float:
    """How far the ends of the ranks' last steps lie apart, were the first ones begun together."""
    ends_s = step_s.sum(axis=1)
    return float(ends_s.max() - ends_s.min())


def _fraction(total_s: float, table: StepTable) -> float:
    run_s = float(np.median(table.step_s, axis=0).sum())
    return total_s / run_s if run_s > 0 else 0.0


def _notes(table: StepTable) -> tuple[str, ...]:
    notes = list(table.notes)
    if LEAST_ITERATIONS <= table.num_iterations < _FEW_ITERATIONS:
        notes.append(
            f"{table.num_iterations} iterations show neither what is noise nor what lasts; record "
            f"{_FEW_ITERATIONS} or more"
        )
    if table.compute_s is not None:
        return tuple(notes)
    spread_s = np.ptp(table.step_s, axis=0)
    if float(np.median(spread_s)) <= _SPREAD_OF_EQUAL_STEPS * float(np.median(table.step_s)):
        notes.append(
            "step times are equal on all ranks, as in every synchronous step: without waiting or "
            "compute times a slow rank cannot be told from the others"
        )
    else:
        notes.append(
            "only step times were given: a rank that waits looks as slow as the one waited for"
        )
    return tuple(notes)
