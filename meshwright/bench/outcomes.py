"""What became of the rows of a table of runs, and what a set of them says in figures.

Groups are runs of one job (``MeasuredRun.job_key``). A group counts for ranks and regret where two
or more different plans of it ran and were timed; runs of one plan count once, by their median.
Plans that ran out of memory have no time, so they count in ``oom_confusion`` and ``oom_choices``
only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.bench.metrics import (
    covered_fraction,
    relative_errors,
    relative_errors_of,
    spearman,
)
from meshwright.bench.regret import RULES, Score, merged, regret

__all__ = ["Choices", "Outcome", "Summary", "summarize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run that was measured and predicted."""

    run_id: str
    source: str
    gpu: str
    group: str
    """Equal for runs of one job."""
    plan: str
    """Equal for runs of a group that did the same."""
    measured_s: float | None
    """Of a step; None where it was not timed."""
    predicted_s: float
    interval_s: tuple[float, float]
    measured_bytes: float | None
    predicted_bytes: float
    capacity_bytes: float
    fits: bool
    """Predicted."""
    ran: bool | None
    """Measured; None where nothing tells."""
    rules: Mapping[str, Score]
    """What the rules of thumb think of the plan."""
    breakdown: Mapping[str, float]
    """Seconds by cause."""
    memory_breakdown: Mapping[str, float]
    """Bytes by cause."""
    trust: Sequence[str]
    """Where the predicted time comes from: measured, learned, analytic."""
    assumptions: Sequence[str]
    labels: Mapping[str, str]
    """Cells of the row as text."""

    @property
    def error(self) -> float | None:
        """Of the step time, ``predicted / measured - 1``."""
        return None if self.measured_s is None else self.predicted_s / self.measured_s - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Regret of one way to choose, over groups; None where there is no group."""

    regret_top1_mean: float | None
    regret_top1_p95: float | None
    regret_top3_mean: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of some runs; None where nothing was left to compute one from."""

    n: int
    """Runs with a measured step time."""
    mape: float | None
    median_ape: float | None
    p90_ape: float | None
    bias: float | None
    interval_coverage: float | None
    groups: int
    spearman_in_group: float | None
    """Mean over the groups in which not all measured times are equal."""
    regret_top1_mean: float | None
    regret_top1_p95: float | None
    regret_top3_mean: float | None
    regret_fitting_top1_mean: float | None
    """As top-1, but plans predicted not to fit come after all others."""
    oom_choices: int
    """Groups whose first plan, those predicted not to fit last, was measured out of memory."""
    memory_n: int
    """Runs with a measured peak memory."""
    memory_median_error: float | None
    """Median of absolute relative errors."""
    memory_bias: float | None
    oom_confusion: Mapping[str, int]
    """Runs by what was predicted and what happened."""
    baselines: Mapping[str, Choices]
    """The same groups chosen by rules of thumb."""


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    """All figures of these runs."""
    timed = [one for one in outcomes if one.measured_s is not None]
    errors = relative_errors_of(
        relative_errors([one.predicted_s for one in timed], [one.measured_s or 0 for one in timed])
    )
    coverage = covered_fraction(
        [one.measured_s or 0 for one in timed],
        [one.interval_s[0] for one in timed],
        [one.interval_s[1] for one in timed],
    )
    groups = _groups(timed)
    rhos = [spearman(list(group.predicted_s), list(group.measured_s)) for group in groups]
    known = [rho for rho in rhos if rho is not None]
    chosen = _choices(groups, lambda group: [(time_s,) for time_s in group.predicted_s])
    fitting = _choices(groups, _fitting_first)
    weighed = [one for one in outcomes if one.measured_bytes]
    memory = relative_errors_of(
        relative_errors(
            [one.predicted_bytes for one in weighed], [one.measured_bytes or 0 for one in weighed]
        )
    )
    return Summary(
        n=errors.n,
        mape=errors.mape,
        median_ape=errors.median_ape,
        p90_ape=errors.p90_ape,
        bias=errors.bias,
        interval_coverage=coverage,
        groups=len(groups),
        spearman_in_group=float(np.mean(known)) if known else None,
        regret_top1_mean=chosen.regret_top1_mean,
        regret_top1_p95=chosen.regret_top1_p95,
        regret_top3_mean=chosen.regret_top3_mean,
        regret_fitting_top1_mean=fitting.regret_top1_mean,
        oom_choices=_oom_choices(outcomes),
        memory_n=memory.n,
        memory_median_error=memory.median_ape,
        memory_bias=memory.bias,
        oom_confusion=_confusion(outcomes),
        baselines={rule: _choices(groups, _by_rule(rule)) for rule in RULES},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Different plans of one job, each timed."""

    measured_s: Sequence[float]
    predicted_s: Sequence[float]
    fits: Sequence[bool]
    rules: Sequence[Mapping[str, Score]]


def _groups(timed: Sequence[Outcome]) -> list[_Group]:
    found = []
    for members in _by_group(timed).values():
        plans = [one.plan for one in members]
        measured_s = merged(plans, np.array([one.measured_s for one in members], dtype=float))
        if len(measured_s) < 2:
            continue
        first = {one.plan: one for one in reversed(members)}
        predicted_s = merged(plans, np.array([one.predicted_s for one in members]))
        found.append(
            _Group(
                measured_s=list(measured_s.values()),
                predicted_s=[predicted_s[plan] for plan in measured_s],
                fits=[first[plan].fits for plan in measured_s],
                rules=[first[plan].rules for plan in measured_s],
            )
        )
    return found


def _by_group(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for one in outcomes:
        found.setdefault(one.group, []).append(one)
    return found


def _fitting_first(group: _Group) -> list[Score]:
    return [
        (float(not fits), time_s)
        for fits, time_s in zip(group.fits, group.predicted_s, strict=True)
    ]


def _by_rule(rule: str) -> Callable[[_Group], list[Score]]:
    return lambda group: [scores[rule] for scores in group.rules]


def _choices(groups: Sequence[_Group], scores_of: Callable[[_Group], list[Score]]) -> Choices:
    if not groups:
        return Choices(regret_top1_mean=None, regret_top1_p95=None, regret_top3_mean=None)
    top1, top3 = (
        [regret(group.measured_s, scores_of(group), num_tries=tries) for group in groups]
        for tries in (1, 3)
    )
    return Choices(
        regret_top1_mean=float(np.mean(top1)),
        regret_top1_p95=float(np.quantile(top1, 0.95)),
        regret_top3_mean=float(np.mean(top3)),
    )


def _oom_choices(outcomes: Sequence[Outcome]) -> int:
    """Groups with plans of both ends count."""
    count = 0
    for members in _by_group([one for one in outcomes if one.ran is not None]).values():
        ran = {one.plan for one in members if one.ran}
        if ran and len({one.plan for one in members}) > len(ran):
            first = min(members, key=lambda one: (not one.fits, one.predicted_s))
            count += first.plan not in ran
    return count


def _confusion(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return {
        f"predicted_{'fits' if fits else 'oom'}_{'ran' if ran else 'oom'}": sum(
            one.fits is fits and one.ran is ran for one in outcomes
        )
        for fits in (True, False)
        for ran in (True, False)
    }
