"""Pins carried out on what solvers propose, and an answer to why pins leave nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from meshwright.errors import NoFeasiblePlan, PlanRefused
from meshwright.plans.plan import AXIS_NAMES, ParallelPlan, Stage
from meshwright.plans.runnable import unrunnable_reasons
from meshwright.space.pins import NO_PINS, Pins, parse_pins
from meshwright.space.search import Candidate, SearchContext

__all__ = ["check_pins", "guilty_pin", "respecting"]


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
        if pinned is not None and _is_allowed(context, pinned.plan):
            found.append(pinned)
    return found


def _is_allowed(context: SearchContext, plan: ParallelPlan) -> bool:
    pins = context.pins
    return (
        pins.allows_plan(plan)
        and context.module_pins.allows_plan(plan)
        and pins.allows_hosts(plan, context.cluster)
    )


def _pinned(context: SearchContext, candidate: Candidate) -> Candidate | None:
    """``candidate`` with the pins of modules and hosts carried out."""
    sizes = dict(zip(AXIS_NAMES, candidate.plan.mesh.stage_shape, strict=True))
    if not context.module_pins.allows_sizes(sizes):
        return None
    plan = _on_hosts(context, context.module_pins.applied(candidate.plan))
    if plan == candidate.plan:
        return candidate
    plan = msgspec.structs.replace(plan, unrunnable=unrunnable_reasons(plan))
    try:
        return Candidate(plan=plan, cost=context.model.cost(plan), solver=candidate.solver)
    except PlanRefused:
        return None


def _on_hosts(context: SearchContext, plan: ParallelPlan) -> ParallelPlan:
    """Pinned stages change places with equal stages on their hosts, or go where there is room."""
    stages = list(plan.stages)
    for number, host in context.pins.hosts:
        if number >= len(stages) or host >= len(context.cluster.hosts):
            continue
        for other, stage in enumerate(stages):
            there = {context.cluster.host_of(device) for device in stage.devices}
            if there == {host} and stage.num_devices == stages[number].num_devices:
                first, second = stages[number].first_device, stage.first_device
                stages[number] = msgspec.structs.replace(stages[number], first_device=second)
                if other != number:
                    stages[other] = msgspec.structs.replace(stage, first_device=first)
                break
        else:
            _move_to_room(context, stages, number, host)
    return msgspec.structs.replace(plan, stages=stages)


def _move_to_room(context: SearchContext, stages: list[Stage], number: int, host: int) -> None:
    """A stage alone on its devices goes to the first free ones of the host, if there are enough."""
    mine = stages[number].devices
    taken = {d for other, stage in enumerate(stages) if other != number for d in stage.devices}
    there = context.cluster.devices_of_host(host)
    if taken.intersection(mine):
        return
    for first in there[: max(len(there) - len(mine) + 1, 0)]:
        if taken.isdisjoint(range(first, first + len(mine))):
            stages[number] = msgspec.structs.replace(stages[number], first_device=first)
            return


def check_pins(context: SearchContext) -> None:
    """Refuse pins that nothing in the model or cluster can meet, and say why.

    Raises:
        BadRequest: as ``Pins.check`` and ``ModulePins.check``.
        NoFeasiblePlan: a pin asks to cut what cannot be cut so.
    """
    pins = context.pins
    pins.check(context.cluster)
    context.module_pins.check()
    tp = dict(pins.sizes).get("tp", 1)
    parts = context.sequence_size
    if pins.sequence_parallel and (parts == 1 or parts % tp):
        has = f"has {parts} parts, which tp={tp} does not divide" if parts > 1 else "has one part"
        raise NoFeasiblePlan(
            f"--fix sequence-parallel=yes cuts nothing: the sequence of "
            f"{context.reference.reference} {has}; leave it out or pin another tp"
        )


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
