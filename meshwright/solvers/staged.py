"""From stages with ways of their own to the plan that says them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from meshwright import __version__
from meshwright.cluster.model import Cluster
from meshwright.plans.plan import (
    AXIS_NAMES,
    Mesh,
    ParallelPlan,
    Provenance,
    Recompute,
    ScheduleName,
    SegmentPlan,
    Stage,
)
from meshwright.plans.runnable import unrunnable_reasons
from meshwright.solvers.stage_options import Pool, StageOption
from meshwright.space.decision import runs_of
from meshwright.space.search import SearchContext
from meshwright.space.uniform import UniformChoice, shards_of, torch_version

__all__ = ["StagePick", "staged_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePick:
    """A stage: its segments and what it does."""

    segments: tuple[int, ...]
    """Ascending."""
    option: StageOption


def staged_plan(
    context: SearchContext,
    picks: Sequence[StagePick],
    pools: Sequence[Pool],
    *,
    num_microbatches: int,
    solver: str,
) -> ParallelPlan | None:
    """The plan, without a prediction; ``None`` where the sub-meshes find no room side by side."""
    places = _placed(context.cluster, pools, [pick.option for pick in picks])
    if places is None:
        return None
    sizes = [pick.option.sizes for pick in picks]
    base = sizes[0]
    stages = []
    for pick, first_device, own in zip(picks, places, sizes, strict=True):
        (first, last), *branches = runs_of(list(pick.segments))
        stages.append(
            Stage(
                first_segment=first,
                last_segment=last,
                branches=branches,
                first_device=first_device,
                num_devices=pick.option.num_devices,
                mesh={axis: own[axis] for axis in AXIS_NAMES if own[axis] != base[axis]},
            )
        )
    plan = ParallelPlan(
        model=context.reference,
        cluster=context.cluster_name,
        job=context.job,
        mesh=Mesh(pp=len(picks), **base),
        num_microbatches=num_microbatches,
        schedule=ScheduleName.ONE_F_ONE_B,
        stages=stages,
        segments=_entries(context, picks),
        provenance=Provenance(
            meshwright_version=__version__,
            solver=solver,
            level=context.level,
            torch_version=torch_version(),
        ),
    )
    return msgspec.structs.replace(plan, unrunnable=unrunnable_reasons(plan))


def _entries(context: SearchContext, picks: Sequence[StagePick]) -> list[SegmentPlan]:
    """For each class what most of its segments do, then its exceptions."""
    classes = context.model.segment_classes
    does: dict[int, tuple[int, Recompute]] = {
        segment: (pick.option.zero_stage, pick.option.recompute)
        for pick in picks
        for segment in pick.segments
    }
    widest = {axis: max(pick.option.sizes[axis] for pick in picks) for axis in AXIS_NAMES}
    everywhere = UniformChoice(
        dp_replicate=widest["dp_replicate"],
        dp_shard=widest["dp_shard"],
        tp=widest["tp"],
        sequence_parallel=any(pick.option.sequence_parallel for pick in picks),
    )
    shards = shards_of(context, everywhere)
    found = []
    for representative in context.model.segmentation.representatives():
        number = representative.segment_class
        mine = [segment for segment, other in enumerate(classes) if other == number]
        ways = Counter(does[segment] for segment in mine).most_common()
        for place, ((zero_stage, recompute), _) in enumerate(ways):
            where = [segment for segment in mine if does[segment] == (zero_stage, recompute)]
            found.append(
                SegmentPlan(
                    segment_class=number,
                    at=runs_of(where) if place else None,
                    name=representative.name,
                    shard=shards[number],
                    zero_stage=zero_stage,
                    recompute=recompute,
                )
            )
    return found


def _placed(
    cluster: Cluster, pools: Sequence[Pool], options: Sequence[StageOption]
) -> tuple[int, ...] | None:
    """First device of each stage: the largest first, each where it fits first."""
    free = {
        pool: [list(cluster.devices_of_host(h)) for h in pools[pool].hosts]
        for pool in {option.pool for option in options}
    }
    first = [-1] * len(options)
    order = sorted(range(len(options)), key=lambda stage: (-options[stage].num_devices, stage))
    for stage in order:
        option = options[stage]
        place = _take(free[option.pool], option.num_devices, pools[option.pool].devices_per_host)
        if place is None:
            return None
        first[stage] = place
    return tuple(first)


def _take(hosts: list[list[int]], size: int, per_host: int) -> int | None:
    """First device of a run of free ones, which are then taken."""
    if size < per_host:
        for devices in hosts:
            if len(devices) >= size:
                first = devices[0]
                del devices[:size]
                return first
        return None
    wanted = size // per_host
    for start in range(len(hosts) - wanted + 1):
        run = hosts[start : start + wanted]
        if all(len(devices) == per_host for devices in run) and (
            run[-1][-1] - run[0][0] + 1 == size
        ):
            first = run[0][0]
            for devices in run:
                devices.clear()
            return first
    return None
