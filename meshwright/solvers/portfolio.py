"""The portfolio: every proposer proposes, the cheapest plan that fits wins.

The plan returned is the fastest by the model, with two exceptions. Plans whose times differ by less
than ``_TIE`` count as equal; then the simpler one wins: no pipeline before a pipeline, no tensor
parallelism before some, less ZeRO, less recompute. And at ``-O1``, where the model fits one device,
plain data parallelism wins unless something is faster by more than ``_PLAIN_MARGIN``; ``-O2`` was
asked for the fastest.

Proposers compare sums of parts. Where measured steps correct these (``cost.corrected``), the
``_RERANKED`` fastest plans, the plain ones and every rule of thumb are corrected at the end, and
only they can win: so by the corrected price, too, no rule is faster than the plan returned.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from meshwright.errors import NoFeasiblePlan
from meshwright.plans.plan import AXIS_NAMES, ParallelPlan, Recompute
from meshwright.solvers.rules import RULES
from meshwright.space.pinned import guilty_pin, respecting
from meshwright.space.search import Candidate, Proposer, SearchContext, SolveResult, SolveStatus
from meshwright.units import format_bytes, format_seconds

__all__ = ["Alternative", "PortfolioResult", "SolverReport", "run_portfolio"]

_TIE = 0.005
"""Relative difference in time that no data sheet model can tell apart."""

_PLAIN_MARGIN = {"O1": 0.05, "O2": _TIE}
"""By level: plain data parallelism wins unless something is faster by more than this, for it is
what the user would run without us."""

_RERANKED = 32
"""Plans that are corrected by measured steps at the end."""

_BASELINES = frozenset(rule.name for rule in RULES)

_QUICK = _BASELINES | {"exhaustive"}
"""Proposers asked again to find out which pin leaves no plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A plan that was not chosen, and why."""

    candidate: Candidate
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverReport:
    """How one solver did."""

    name: str
    seconds: float
    evaluations: int
    """Plans priced."""
    status: SolveStatus
    best_s: float | None
    """Step time of its best plan that fits, before measured steps correct it."""
    bound_s: float | None
    """No plan of its space is faster; ``None``: it knows no bound."""
    is_proven: bool
    """Its best plan reaches the bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortfolioResult:
    """The winner, what it beat, and how the search went."""

    winner: Candidate
    reason: str
    """Why the winner won."""
    alternatives: tuple[Alternative, ...]
    """Runners-up, best first, then the rules of thumb not among them."""
    evaluations: int
    seconds: float
    is_complete: bool
    """No proposer left anything out."""
    solvers: tuple[SolverReport, ...]


def run_portfolio(
    context: SearchContext,
    proposers: Sequence[Proposer],
    *,
    top: int,
    deadline_s: float | None = None,
) -> PortfolioResult:
    """The best plan of all proposers, and the ``top`` best with it.

    Raises:
        NoFeasiblePlan: nothing fits; says what the plan nearest to it needs.
    """
    start_s = time.monotonic()
    results = []
    for proposer in proposers:
        context.report(f"asking {proposer.name}")
        results.append(proposer.propose(context, deadline_s))
    everything = _reranked(context, respecting(context, _distinct(results)), top)
    fitting = _by_time(everything)
    feasible = [c for c in fitting if context.allow_unrunnable or not c.plan.unrunnable]
    if not feasible:
        if fitting:
            raise NoFeasiblePlan(_nothing_runs(context, proposers, fitting[0]))
        if context.pins.texts:
            raise NoFeasiblePlan(_pins_leave_nothing(context, proposers, everything))
        raise NoFeasiblePlan(_nothing_fits(context, everything, results))
    limit_s = feasible[0].time_s * (1 + _TIE)
    margin = _PLAIN_MARGIN[context.level]
    plain_limit_s = feasible[0].time_s * (1 + margin)
    plain = [c for c in feasible if _is_plain(c.plan) and c.time_s <= plain_limit_s]
    if plain:
        # Devices that bring nothing are taken too, but never to go slower.
        limit_s = plain[0].time_s * (1 + _TIE)
    winner = min(
        (c for c in plain or feasible if c.time_s <= limit_s),
        key=lambda c: (
            (-c.plan.mesh.num_devices, c.time_s) if plain else (*_complexity(c.plan), c.time_s)
        ),
    )
    others = [c for c in fitting if c is not winner][: max(top - 1, 0)]
    shown = {id(c) for c in (winner, *others)}
    baselines = [c for c in everything if c.solver in _BASELINES and id(c) not in shown]
    baselines.sort(key=lambda c: (not c.cost.fits, c.time_s))
    return PortfolioResult(
        winner=winner,
        reason=_why(winner, margin),
        alternatives=tuple(
            Alternative(candidate=c, reason=_reason(c, winner)) for c in (*others, *baselines)
        ),
        evaluations=sum(result.evaluations for result in results),
        seconds=time.monotonic() - start_s,
        is_complete=all(result.status != SolveStatus.STOPPED for result in results),
        solvers=tuple(map(_report, proposers, results)),
    )


def _by_time(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that fit, the fastest and simplest first."""
    fitting = (c for c in candidates if c.cost.fits)
    return sorted(fitting, key=lambda c: (c.time_s, _complexity(c.plan)))


def _reranked(
    context: SearchContext, everything: Sequence[Candidate], top: int
) -> Sequence[Candidate]:
    """Candidates that may win or be shown, their costs corrected, and those that do not fit."""
    if context.model.pricing.steps is None:
        return everything
    fitting = _by_time(everything)
    runnable = [c for c in fitting if context.allow_unrunnable or not c.plan.unrunnable]
    plain = [c for c in runnable if _is_plain(c.plan)]
    chosen = {id(c) for c in (*fitting[:top], *runnable[:_RERANKED], *plain[:_RERANKED])}
    return [
        replace(c, cost=context.model.corrected(c.plan, c.cost))
        if id(c) in chosen or c.solver in _BASELINES
        else c
        for c in everything
        if id(c) in chosen or c.solver in _BASELINES or not c.cost.fits
    ]


def _report(proposer: Proposer, result: SolveResult) -> SolverReport:
    return SolverReport(
        name=proposer.name,
        seconds=result.seconds,
        evaluations=result.evaluations,
        status=result.status,
        best_s=min((c.time_s for c in result.candidates if c.cost.fits), default=None),
        bound_s=result.bound_s,
        is_proven=result.is_proven,
    )


def _distinct(results: Sequence[SolveResult]) -> list[Candidate]:
    """Candidates without repetitions; the first to propose a plan keeps it.

    A plan with an axis along which nothing is cut is left out: it is one on fewer devices, and
    lowering refuses it.
    """
    seen: dict[tuple[object, ...], Candidate] = {}
    for result in results:
        for candidate in result.candidates:
            if not _has_idle_axis(candidate.plan):
                seen.setdefault(_identity(candidate.plan), candidate)
    return list(seen.values())


def _has_idle_axis(plan: ParallelPlan) -> bool:
    """Whether no segment lists anything to cut along one of the axes of all stages."""
    if any(stage.mesh for stage in plan.stages):
        return False
    shards = [
        shard for entry in plan.segments for shard in (entry.shard, *entry.operators.values())
    ]
    wanted = {axis for shard in shards for axis, labels in shard.items() if labels}
    sizes = zip(AXIS_NAMES, plan.mesh.stage_shape, strict=True)
    return any(size > 1 and axis not in wanted for axis, size in sizes)


def _identity(plan: ParallelPlan) -> tuple[object, ...]:
    return (
        plan.mesh,
        plan.num_microbatches,
        plan.schedule if plan.mesh.pp > 1 else None,
        tuple(stage.first_segment for stage in plan.stages),
        repr((plan.segments, plan.token_slices, plan.communication)),
        repr([(stage.branches, stage.mesh, stage.batch_shares) for stage in plan.stages]),
    )


def _complexity(plan: ParallelPlan) -> tuple[int, ...]:
    order = list(Recompute)
    return (
        int(plan.mesh.pp > 1),
        int(plan.mesh.tp > 1),
        max(segment.zero_stage for segment in plan.segments),
        max(order.index(segment.recompute) for segment in plan.segments),
        plan.mesh.pp,
        plan.mesh.tp,
        max(len(labels) for s in plan.segments for labels in (*s.shard.values(), ())),
        plan.num_microbatches,
        plan.mesh.dp_shard,
        len(plan.segments),
    )


def _is_plain(plan: ParallelPlan) -> bool:
    """One copy of the model on every device, nothing computed twice."""
    mesh = plan.mesh
    return mesh.pp == mesh.tp == mesh.cp == mesh.ep == mesh.dp_shard == 1 and all(
        segment.zero_stage == 0
        and segment.recompute is Recompute.NONE
        and not segment.operators
        and not segment.offload
        for segment in plan.segments
    )


def _why(winner: Candidate, margin: float) -> str:
    mesh = winner.plan.mesh
    causes = sorted(winner.cost.breakdown_s.items(), key=lambda item: -item[1])
    spent = ", ".join(f"{cause} {seconds / winner.time_s:.0%}" for cause, seconds in causes[:3])
    if _is_plain(winner.plan) and mesh.num_devices > 1:
        stage = winner.cost.fullest_stage
        needs = format_bytes(float(winner.cost.memory.peak_bytes[stage]))
        has = format_bytes(float(winner.cost.capacity_bytes[stage]))
        return (
            f"the model fits one device ({needs} of {has}), so plain data parallelism is enough: "
            f"nothing that cuts the model is faster by more than {margin:.1%} ({spent})"
        )
    return f"fastest of the plans that fit ({spent})"


def _reason(candidate: Candidate, winner: Candidate) -> str:
    if not candidate.cost.fits:
        stage = candidate.cost.fullest_stage
        needs = format_bytes(float(candidate.cost.memory.peak_bytes[stage]))
        has = format_bytes(float(candidate.cost.capacity_bytes[stage]))
        return f"does not fit: stage {stage} needs {needs} of {has}"
    ratio = candidate.time_s / winner.time_s
    if candidate.plan.unrunnable and ratio <= 1:
        return f"faster by {1 - ratio:.1%}, but cannot run yet: {candidate.plan.unrunnable[0]}"
    if ratio < 1 - _TIE:
        return f"faster by {1 - ratio:.1%} by the model, too little for what it complicates"
    if ratio <= 1 + _TIE:
        return "as fast, but not simpler"
    mine, other = candidate.cost.breakdown_s, winner.cost.breakdown_s
    cause = max(mine, key=lambda name: mine[name] - other.get(name, 0.0))
    more = format_seconds(mine[cause] - other.get(cause, 0.0))
    return f"slower by {ratio - 1:.1%}, most of it {cause} (+{more})"


def _pins_leave_nothing(
    context: SearchContext, proposers: Sequence[Proposer], everything: Sequence[Candidate]
) -> str:
    """Which pin to give up."""
    pinned = " ".join(context.pins.texts)
    where = f"{context.cluster.num_devices} devices of {context.cluster_name}"
    why = "what respects them does not fit" if everything else "no way of sharding respects them"
    guilty = _guilty(context, proposers)
    advice = (
        f"without {' or without '.join(guilty)} there is a plan"
        if guilty
        else "leaving out one of them does not help; leave out several, or use more devices"
    )
    return (
        f"{context.reference.reference}: pins {pinned} leave no plan for {where}: {why}; {advice}"
    )


def _guilty(context: SearchContext, proposers: Sequence[Proposer]) -> tuple[str, ...]:
    """Pins without which a quick search finds a plan."""

    def has_plan(other: SearchContext) -> bool:
        results = [proposer.propose(other) for proposer in proposers if proposer.name in _QUICK]
        found = respecting(other, _distinct(results))
        return any(c.cost.fits and (other.allow_unrunnable or not c.plan.unrunnable) for c in found)

    return guilty_pin(context, has_plan)


def _nothing_runs(
    context: SearchContext, proposers: Sequence[Proposer], candidate: Candidate
) -> str:
    guilty = _guilty(context, proposers)
    if guilty:
        what = f"with --fix {' --fix '.join(guilty)} a plan"
        advice = "leave the pin out" if len(guilty) == 1 else "leave one of the pins out"
    else:
        what = f"what fits {context.cluster.num_devices} devices of {context.cluster_name}"
        advice = "use more or larger devices"
    return (
        f"{context.reference.reference}: {what} cannot run yet ({candidate.plan.unrunnable[0]}); "
        f"{advice}, or plan with --allow-unrunnable"
    )


def _nothing_fits(
    context: SearchContext, everything: Sequence[Candidate], results: Sequence[SolveResult]
) -> str:
    devices = f"{context.cluster.num_devices} devices of {context.cluster_name}"
    if any(result.status is SolveStatus.STOPPED for result in results):
        return (
            f"{context.reference.reference}: nothing found in the time given that fits {devices}; "
            "give more --budget"
        )
    if not everything:
        notes = [note for result in results for note in result.notes.values()]
        why = notes[0] if notes else "no way of sharding applies"
        return f"{context.reference.reference}: no plan for {devices}: {why}"

    def excess(candidate: Candidate) -> float:
        return float((candidate.cost.memory.peak_bytes / candidate.cost.capacity_bytes).max())

    nearest = min(everything, key=excess)
    stage = nearest.cost.fullest_stage
    needs = format_bytes(float(nearest.cost.memory.peak_bytes[stage]))
    has = format_bytes(float(nearest.cost.capacity_bytes[stage]))
    mesh = nearest.plan.mesh
    shape = f"pp {mesh.pp}, dp {mesh.dp_replicate * mesh.dp_shard}, tp {mesh.tp}"
    return (
        f"{context.reference.reference}: nothing fits {devices}: the leanest plan ({shape}) needs "
        f"{needs} on a device that has {has} ({_spent_bytes(nearest, stage)}); use more or larger "
        "devices, a smaller global batch or sequence, or a smaller model"
    )


def _spent_bytes(candidate: Candidate, stage: int) -> str:
    """What fills a stage, the largest causes first."""
    causes = {cause: float(b[stage]) for cause, b in candidate.cost.memory.by_cause.items()}
    largest = sorted(causes.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{cause.replace('_', ' ')} {format_bytes(b)}" for cause, b in largest if b)
