"""Every plan of a small instance, exactly priced: the oracle that other solvers are held against.

The space is all skeletons of the context, times a strategy for each segment class, times every way
of cutting the segments into stages, times the schedules of a pipeline, without offload of optimizer
state. Nothing is estimated. A plan
is left out only where its segments' own work, which no schedule can do faster, takes longer than
the best plan found: so the best plan is proven to be the best of the space.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from meshwright.cost.model import choice_of
from meshwright.cost.step import StepCost
from meshwright.errors import PlanRefused
from meshwright.plans.plan import Recompute, ScheduleName
from meshwright.space.decided import decided_plan
from meshwright.space.decision import Decision, Sharding, Skeleton, Strategy
from meshwright.space.evaluate import candidate_of_decision, price_decision
from meshwright.space.search import Candidate, SearchContext, SolveResult, SolveStatus
from meshwright.space.skeletons import skeletons, strategies_for

__all__ = ["Enumeration", "num_plans"]

_MAX_PLANS = 20_000

_Way = tuple[Sharding, Recompute]
"""What decides a segment's own work."""


@dataclass(slots=True)
class _State:
    """The mutable part of one enumeration."""

    deadline_s: float | None
    best: tuple[Decision, StepCost] | None = None
    leanest: tuple[float, Decision] | None = None
    evaluations: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def best_s(self) -> float:
        return self.best[1].time_s if self.best else math.inf

    @property
    def is_late(self) -> bool:
        return self.deadline_s is not None and time.monotonic() > self.deadline_s


class Enumeration:
    """Prices every plan where they are few enough; a ``Proposer``."""

    def __init__(
        self,
        *,
        max_plans: int = _MAX_PLANS,
        schedules: Sequence[ScheduleName] = (ScheduleName.ONE_F_ONE_B, ScheduleName.GPIPE),
    ) -> None:
        """For instances of at most ``max_plans`` plans, pipelines under each of ``schedules``."""
        self._max_plans = max_plans
        self._schedules = tuple(schedules)

    @property
    def name(self) -> str:
        """``enumeration``."""
        return "enumeration"

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """The best plan of all; where none fits, the one nearest to it."""
        start_s = time.monotonic()
        count = num_plans(context, self._schedules)
        if count > self._max_plans:
            return SolveResult(
                candidates=(),
                evaluations=0,
                seconds=time.monotonic() - start_s,
                status=SolveStatus.NOT_APPLICABLE,
                notes={self.name: f"{count} plans are more than {self._max_plans}"},
            )
        state = _State(deadline_s)
        # Uniform plans first, so that most of the others can be left out.
        for is_uniform in (True, False):
            for skeleton in _with_schedules(context, self._schedules):
                self._search(context, state, skeleton, is_uniform=is_uniform)
        return self._result(context, state, time.monotonic() - start_s)

    def _search(
        self, context: SearchContext, state: _State, skeleton: Skeleton, *, is_uniform: bool
    ) -> None:
        num_classes = context.model.segmentation.num_classes
        stages: dict[_Way, list[int]] = {}
        for strategy in strategies_for(context, skeleton):
            if strategy.offload:
                continue
            way = (strategy.sharding, strategy.recompute)
            stages.setdefault(way, []).append(strategy.zero_stage)
        for ways in itertools.product(stages, repeat=num_classes):
            choices = [stages[way] for way in ways]
            for starts in _cuts(len(context.model.segment_classes), skeleton.num_stages):
                if state.is_late:
                    return
                first = self._decision(context, skeleton, starts, ways, [c[0] for c in choices])
                try:
                    if self._bound_s(context, first) >= state.best_s:
                        continue
                except PlanRefused as error:
                    state.refused[ways[0][0].name] = str(error)
                    break
                for zero_stages in itertools.product(*choices):
                    if is_uniform == (len(set(zip(ways, zero_stages, strict=True))) == 1):
                        decision = self._decision(context, skeleton, starts, ways, zero_stages)
                        self._price(context, state, decision)

    def _decision(
        self,
        context: SearchContext,
        skeleton: Skeleton,
        starts: tuple[int, ...],
        ways: Sequence[_Way],
        zero_stages: Sequence[int],
    ) -> Decision:
        by_class = [
            Strategy(sharding=sharding, recompute=recompute, zero_stage=zero_stage)
            for (sharding, recompute), zero_stage in zip(ways, zero_stages, strict=True)
        ]
        strategies = tuple(by_class[number] for number in context.model.segment_classes)
        return Decision(skeleton=skeleton, starts=starts, strategies=strategies)

    def _bound_s(self, context: SearchContext, decision: Decision) -> float:
        """What the plan takes at least, whatever ZeRO does."""
        model = context.model
        plan = decided_plan(context, decision, solver=self.name)
        table = model.table_of_plan(plan)
        choice = choice_of(plan, model.segment_classes)
        return model.pricer.bound_s(table, choice)

    def _price(self, context: SearchContext, state: _State, decision: Decision) -> None:
        cost = price_decision(context, decision)
        state.evaluations += 1
        if cost.fits and cost.time_s < state.best_s:
            state.best = (decision, cost)
        elif state.best is None:
            excess = float((cost.memory.peak_bytes / cost.capacity_bytes).max())
            if state.leanest is None or excess < state.leanest[0]:
                state.leanest = (excess, decision)

    def _result(self, context: SearchContext, state: _State, seconds: float) -> SolveResult:
        candidates: tuple[Candidate, ...] = ()
        if state.best is not None:
            candidates = (candidate_of_decision(context, state.best[0], solver=self.name),)
        elif state.leanest is not None:
            candidates = (candidate_of_decision(context, state.leanest[1], solver=self.name),)
        status = SolveStatus.DONE if state.best is not None else SolveStatus.NOTHING_FITS
        is_proven = state.best is not None and not state.is_late
        return SolveResult(
            candidates=candidates,
            evaluations=state.evaluations,
            seconds=seconds,
            status=SolveStatus.STOPPED if state.is_late else status,
            notes=state.refused,
            bound_s=state.best_s if is_proven else None,
        )


def num_plans(
    context: SearchContext, schedules: Sequence[ScheduleName] = (ScheduleName.ONE_F_ONE_B,)
) -> int:
    """Plans in the space of ``Enumeration``."""
    num_segments = len(context.model.segment_classes)
    num_classes = context.model.segmentation.num_classes
    return sum(
        sum(not s.offload for s in strategies_for(context, skeleton)) ** num_classes
        * math.comb(num_segments - 1, skeleton.num_stages - 1)
        for skeleton in _with_schedules(context, schedules)
    )


def _with_schedules(
    context: SearchContext, schedules: Sequence[ScheduleName]
) -> Iterator[Skeleton]:
    for skeleton in skeletons(context):
        if skeleton.num_stages == 1:
            yield skeleton
            continue
        for schedule in schedules:
            variant = replace(skeleton, schedule=schedule)
            if context.allows(variant) and context.pins.allows_schedule(variant):
                yield variant


def _cuts(num_segments: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """First segments of the stages, every way of cutting."""
    for inner in itertools.combinations(range(1, num_segments), num_stages - 1):
        yield (0, *inner)
