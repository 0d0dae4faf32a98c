"""Data parallelism over devices of different types: shares of the samples to each type's speed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import msgspec

from meshwright.cost.model import choice_of
from meshwright.errors import PlanRefused
from meshwright.plans.plan import ParallelPlan, Recompute
from meshwright.plans.runnable import unrunnable_reasons
from meshwright.space.search import Candidate, SearchContext
from meshwright.space.uniform import (
    UniformChoice,
    plan_of,
    table_of,
    tensor_parallel_sizes,
)

__all__ = ["shared_plans", "whole_shares"]


def whole_shares(speeds: Sequence[float], num_samples: int, steps: Sequence[int]) -> list[int]:
    """Samples of each host: by its speed, a positive multiple of its step; empty: that cannot be.

    They sum to ``num_samples``. Every host first takes the multiple below its part; what is left
    goes to the host that is then done earliest.
    """
    total = sum(speeds)
    found = [
        max(step, int(num_samples * speed / total) // step * step)
        for speed, step in zip(speeds, steps, strict=True)
    ]
    while sum(found) < num_samples:
        left = num_samples - sum(found)
        able = [i for i, step in enumerate(steps) if step <= left]
        if not able:
            return []
        best = min(able, key=lambda i: (found[i] + steps[i]) / speeds[i])
        found[best] += steps[best]
    return found if sum(found) == num_samples else []


def shared_plans(
    context: SearchContext,
    splits: Sequence[int],
    *,
    solver: str,
    deadline_s: float | None = None,
) -> list[Candidate]:
    """One stage on all devices, every host with samples to its speed; what fits, in no order.

    Args:
        context: what to plan.
        splits: numbers of micro-batches, ascending; the first that fits is taken, since more only
            take longer.
        solver: who proposes.
        deadline_s: ``time.monotonic()`` after which to return what there is.
    """
    found: list[Candidate] = []
    for choice in _choices(context):
        for num_microbatches in splits:
            if deadline_s is not None and time.monotonic() > deadline_s:
                return found
            tried = _shared(
                context, replace(choice, num_microbatches=num_microbatches), solver=solver
            )
            if tried is not None and tried.cost.fits:
                found.append(tried)
                break
    return found


def _shared(context: SearchContext, choice: UniformChoice, *, solver: str) -> Candidate | None:
    """A choice with shares of the samples; ``None`` where the batch does not divide so."""
    if choice.data_parallel * choice.num_microbatches > context.batch:
        return None
    try:
        plan = plan_of(context, choice, solver=solver)
        shares = _shares(context, choice, plan)
        if not shares or not context.pins.allows_plan(plan):
            return None
        stages = [msgspec.structs.replace(plan.stages[0], batch_shares=shares)]
        plan = msgspec.structs.replace(plan, stages=stages)
        plan = msgspec.structs.replace(plan, unrunnable=unrunnable_reasons(plan))
        return Candidate(plan=plan, cost=context.model.cost(plan), solver=solver)
    except PlanRefused:
        return None


def _choices(context: SearchContext) -> Iterator[UniformChoice]:
    """Uniform plans without stages on all devices whose tensor parallelism stays within hosts."""
    devices = context.cluster.num_devices
    per_host = {host.num_devices for host in context.cluster.hosts}
    near = min(per_host)
    for tp in tensor_parallel_sizes(context):
        if any(count % tp for count in per_host):
            continue
        data = devices // tp
        for recompute in Recompute:
            for zero_stage, shard in ((0, 1), (1, near // tp), (1, data), (2, data), (3, data)):
                if data % shard == 0:
                    yield UniformChoice(
                        tp=tp,
                        dp_replicate=data // shard,
                        dp_shard=shard,
                        zero_stage=zero_stage if shard > 1 else 0,
                        recompute=recompute,
                    )


def _shares(context: SearchContext, choice: UniformChoice, plan: ParallelPlan) -> list[float]:
    """Share of each host: its devices over the time of an even share on its type."""
    if context.batch % choice.num_microbatches:
        return []
    table = table_of(context, choice)
    pricer = context.model.pricer
    decided = choice_of(plan, context.model.segment_classes)
    speeds, steps = [], []
    for host in context.cluster.hosts:
        times = table.segment_times(
            decided.split,
            decided.policies,
            roofline=pricer.rooflines[host.device.name],
            prices=pricer.prices,
        )
        speeds.append(host.num_devices / float(times.total_s.sum()))
        steps.append(host.num_devices // choice.tp)
    samples = context.batch // choice.num_microbatches
    return [count / samples for count in whole_shares(speeds, samples, steps)]
