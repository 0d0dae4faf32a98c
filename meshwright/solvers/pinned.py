"""Pins carried out on what solvers propose, and an answer to why pins leave nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from meshwright.errors import PlanRefused
from meshwright.plans.plan import ParallelPlan
from meshwright.plans.runnable import unrunnable_reasons
from meshwright.solvers.base import Candidate, SearchContext
from meshwright.solvers.pins import NO_PINS, Pins, parse_pins

__all__ = ["guilty_pin", "respecting"]


def respecting(context: SearchContext, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that respect the user's pins, in the same order.

    Pins of modules and hosts are carried out, and the plan is priced again; what cannot be
    sharded so is left out.
    """
    if context.pins == NO_PINS:
        return list(candidates)
    found = []
    for candidate in candidates:
        pinned = _pinned(context, candidate)
        if (
            pinned is not None
            and context.pins.allows_plan(pinned.plan)
            and context.pins.allows_hosts(pinned.plan, context.cluster)
        ):
            found.append(pinned)
    return found


def _pinned(context: SearchContext, candidate: Candidate) -> Candidate | None:
    """``candidate`` with the pins of modules and hosts carried out."""
    pins, model = context.pins, context.model
    names = [segment.name for segment in model.segmentation.segments]
    plan = pins.applied(candidate.plan, names=names, segment_classes=model.segment_classes)
    plan = _on_hosts(context, plan)
    if plan == candidate.plan:
        return candidate
    plan = msgspec.structs.replace(plan, unrunnable=unrunnable_reasons(plan))
    try:
        return Candidate(plan=plan, cost=model.cost(plan), solver=candidate.solver)
    except PlanRefused:
        return None


def _on_hosts(context: SearchContext, plan: ParallelPlan) -> ParallelPlan:
    """Pinned stages change places with equal stages that lie on their hosts."""
    stages = list(plan.stages)
    for number, host in context.pins.hosts:
        if number >= len(stages):
            continue
        for other, stage in enumerate(stages):
            there = {context.cluster.host_of(device) for device in stage.devices}
            if there == {host} and stage.num_devices == stages[number].num_devices:
                first, second = stages[number].first_device, stage.first_device
                stages[number] = msgspec.structs.replace(stages[number], first_device=second)
                if other != number:
                    stages[other] = msgspec.structs.replace(stage, first_device=first)
                break
    return msgspec.structs.replace(plan, stages=stages)


def guilty_pin(
    context: SearchContext, has_plan: Callable[[SearchContext], bool]
) -> tuple[str, ...]:
    """The pins that each alone stand in the way: without it there is a plan.

    Args:
        context: a search whose pins leave nothing.
        has_plan: whether a search finds a plan that fits and runs.
    """
    texts = context.pins.texts
    if not texts:
        return ()
    found = []
    for left_out in range(len(texts)):
        others: Pins = parse_pins(texts[:left_out] + texts[left_out + 1 :])
        if has_plan(replace(context, pins=others)):
            found.append(texts[left_out])
    return tuple(found)
