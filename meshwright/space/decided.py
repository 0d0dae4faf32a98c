"""From a decision to the plan that says it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from meshwright import __version__
from meshwright.graph.dimensions import BATCH
from meshwright.plans.plan import (
    Mesh,
    ParallelPlan,
    Provenance,
    SegmentPlan,
    Stage,
)
from meshwright.space.decision import Decision, Strategy, runs_of
from meshwright.space.search import SearchContext
from meshwright.space.uniform import torch_version

__all__ = ["decided_plan"]

_DATA_AXES = ("dp_replicate", "dp_shard")


def decided_plan(context: SearchContext, decision: Decision, *, solver: str) -> ParallelPlan:
    """The plan, without a prediction; every segment does what its pins want (``ModulePins``).

    Where no segment uses ZeRO, ``dp_shard`` joins ``dp_replicate``: the two are the same then.
    """
    skeleton = decision.skeleton
    strategies = context.module_pins.strategies(decision.strategies)
    decision = replace(decision, strategies=strategies)
    sizes = skeleton.sizes
    if all(strategy.zero_stage == 0 for strategy in decision.strategies):
        sizes["dp_replicate"] *= sizes["dp_shard"]
        sizes["dp_shard"] = 1
    per_stage = skeleton.num_devices_per_stage
    count = len(context.model.segment_classes)
    ends = (*decision.starts[1:], count)
    return ParallelPlan(
        model=context.reference,
        cluster=context.cluster_name,
        job=context.job,
        mesh=Mesh(pp=skeleton.num_stages, **sizes),
        num_microbatches=skeleton.num_microbatches,
        schedule=skeleton.schedule,
        stages=[
            Stage(
                first_segment=start,
                last_segment=end - 1,
                first_device=stage % skeleton.num_stages * per_stage,
                num_devices=per_stage,
            )
            for stage, (start, end) in enumerate(zip(decision.starts, ends, strict=True))
        ],
        segments=_segments(context, decision, sizes),
        token_slices=list(skeleton.token_slices),
        communication=skeleton.communication,
        provenance=Provenance(
            meshwright_version=__version__,
            solver=solver,
            level=context.level,
            torch_version=torch_version(),
        ),
    )


def _segments(
    context: SearchContext, decision: Decision, sizes: dict[str, int]
) -> list[SegmentPlan]:
    """For each class what most of its segments do, then its exceptions."""
    segments = context.model.segmentation.segments
    mine: dict[int, list[int]] = {}
    for segment in segments:
        mine.setdefault(segment.segment_class, []).append(segment.index)
    found = []
    for number in sorted(mine):
        used = Counter(decision.strategies[segment] for segment in mine[number])
        for place, (strategy, _) in enumerate(used.most_common()):
            where = [one for one in mine[number] if decision.strategies[one] == strategy]
            at = runs_of(where) if place else None
            found.append(_entry(number, segments[where[0]].name, strategy, sizes, at))
    return found


def _entry(
    segment_class: int,
    name: str,
    strategy: Strategy,
    sizes: dict[str, int],
    at: list[tuple[int, int]] | None,
) -> SegmentPlan:
    labels = strategy.sharding.labels_of(segment_class)
    batch = [BATCH] if any(BATCH in labels.get(axis, ()) for axis in _DATA_AXES) else []
    wanted = {axis: batch if axis in _DATA_AXES else labels.get(axis, []) for axis in sizes}
    return SegmentPlan(
        segment_class=segment_class,
        at=at,
        name=name,
        shard={axis: names for axis, names in wanted.items() if sizes[axis] > 1},
        zero_stage=strategy.zero_stage,
        recompute=strategy.recompute,
        operators=strategy.sharding.operators_of(segment_class),
        offload=strategy.offload,
    )
