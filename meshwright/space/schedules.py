"""The schedules a decision can run under: what is tried once its stages are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from meshwright.cost.model import choice_of, tokens_per_sample
from meshwright.graph.attention import is_sliceable
from meshwright.plans.plan import ScheduleName
from meshwright.plans.runnable import RUNNABLE_SCHEDULES
from meshwright.space.decided import decided_plan
from meshwright.space.decision import Decision
from meshwright.space.partition import least_bottleneck
from meshwright.space.search import SearchContext
from meshwright.space.token_slices import sliced_choice

__all__ = ["with_schedules"]

_STAGES_OF_A_GROUP = (2, 4)
"""With the interleaved schedule."""


def with_schedules(context: SearchContext, decision: Decision) -> Iterator[Decision]:
    """The decision under every schedule its stages can run and the pins allow.

    Where plans may win that the runtime cannot carry, these are the zero-bubble schedule, the
    interleaved one with the segments cut anew by time, and token slices of a causal model too.

    Raises:
        PlanRefused: the graph cannot be sharded so.
    """
    if decision.skeleton.num_stages == 1:
        yield decision
        return
    found = [_with(decision, schedule) for schedule in reversed(RUNNABLE_SCHEDULES)]
    if context.allow_unrunnable or context.pins.schedule not in (None, *RUNNABLE_SCHEDULES):
        found += [_with(decision, ScheduleName.ZB_H1), *_interleaved(context, decision)]
        found += _in_slices(context, _with(decision, ScheduleName.ONE_F_ONE_B))
    for variant in found:
        if context.pins.allows_schedule(variant.skeleton):
            yield variant


def _with(decision: Decision, schedule: ScheduleName) -> Decision:
    return replace(decision, skeleton=replace(decision.skeleton, schedule=schedule))


def _interleaved(context: SearchContext, decision: Decision) -> Iterator[Decision]:
    groups = decision.skeleton.num_stages
    if decision.skeleton.num_microbatches % groups:
        return
    model = context.model
    plan = decided_plan(context, decision, solver="")
    choice = choice_of(plan, model.segment_classes)
    roofline = max(model.pricer.rooflines.values(), key=lambda r: r.flop_per_s)
    times = model.table_of_plan(plan).segment_times(
        choice.split, choice.policies, roofline=roofline, prices=model.pricer.prices
    )
    for stages in _STAGES_OF_A_GROUP:
        starts = least_bottleneck(times.total_s.tolist(), stages * groups)
        if starts is not None:
            yield replace(_with(decision, ScheduleName.INTERLEAVED), starts=starts)


def _in_slices(context: SearchContext, decision: Decision) -> Iterator[Decision]:
    """With the token slices that make its step shortest, if any do."""
    model = context.model
    num_tokens = tokens_per_sample(model.analysis.graph, model.labels)
    if num_tokens is None or not is_sliceable(model.analysis, model.labels.sequence):
        return
    plan = decided_plan(context, decision, solver="")
    found, _ = sliced_choice(
        model.pricer,
        model.table_of_plan(plan),
        choice_of(plan, model.segment_classes),
        num_tokens=num_tokens,
    )
    if found.token_slices:
        skeleton = replace(decision.skeleton, token_slices=found.token_slices)
        yield replace(decision, skeleton=skeleton)
