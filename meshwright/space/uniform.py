"""Uniform plans: one choice for all segment classes, and how it becomes a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import msgspec

from meshwright import __version__
from meshwright.cost.model import choice_of
from meshwright.cost.step import Choice, StepCost
from meshwright.cost.table import CostTable, Split
from meshwright.graph.dimensions import BATCH, SEQUENCE
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
from meshwright.space.search import Candidate, SearchContext
from meshwright.spmd.layout import MICRO

__all__ = [
    "UniformChoice",
    "candidate_of",
    "divisors",
    "largest_divisor",
    "plan_of",
    "table_of",
    "tensor_parallel_sizes",
]

_TENSOR_KINDS = ("heads", "experts", "vocab", "inner")
"""Dimension classes tensor parallelism may shard, most wanted first; ``hidden`` is not among them,
since every activation between segments would have to be gathered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformChoice:
    """A plan whose segments all do the same."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    starts: tuple[int, ...] = (0,)
    num_microbatches: int = 1
    schedule: ScheduleName = ScheduleName.ONE_F_ONE_B
    zero_stage: int = 0
    recompute: Recompute = Recompute.NONE

    @property
    def pp(self) -> int:
        """Stages."""
        return len(self.starts)

    @property
    def data_parallel(self) -> int:
        """Devices the batch is split over."""
        return self.dp_replicate * self.dp_shard

    @property
    def num_devices(self) -> int:
        """Devices used."""
        return self.pp * self.data_parallel * self.tp

    @property
    def complexity(self) -> tuple[int, ...]:
        """Smaller is simpler; decides between plans of equal time."""
        return (
            int(self.pp > 1),
            int(self.tp > 1),
            self.zero_stage,
            list(Recompute).index(self.recompute),
            self.pp,
            self.tp,
            int(self.sequence_parallel),
            self.num_microbatches,
            self.dp_shard,
            int(self.schedule is ScheduleName.GPIPE),
        )


def shards_of(context: SearchContext, choice: UniformChoice) -> list[dict[str, list[str]]]:
    """For each segment class, mesh axis to labels."""
    found = []
    for segment in context.model.segmentation.representatives():
        names = context.model.labels.by_segment[segment.index]
        shard: dict[str, list[str]] = {}
        batch = [BATCH] if BATCH in names else []
        if choice.dp_replicate > 1:
            shard["dp_replicate"] = batch
        if choice.dp_shard > 1:
            shard["dp_shard"] = batch
        if choice.tp > 1:
            shard["tp"] = tensor_labels(names, sequence_parallel=choice.sequence_parallel)
        found.append(shard)
    return found


def tensor_labels(names: Mapping[str, int], *, sequence_parallel: bool) -> list[str]:
    """Labels of one segment that tensor parallelism shards, most wanted first."""
    labels = [name for kind in _TENSOR_KINDS for name in names if name.rstrip("0123456789") == kind]
    if sequence_parallel and SEQUENCE in names:
        labels.append(SEQUENCE)
    return labels


def tensor_parallel_sizes(context: SearchContext) -> tuple[int, ...]:
    """Sizes of ``tp`` that some dimension allows, within a host or pinned: 1 and more."""
    host = max(host.num_devices for host in context.cluster.hosts)
    pinned = dict(context.pins.sizes).get("tp", 1)
    sizes = {
        context.model.analysis.class_size[names[label]]
        for names in context.model.labels.by_segment
        for label in tensor_labels(names, sequence_parallel=False)
    }
    return tuple(
        ways
        for ways in sorted({*range(1, host + 1), pinned})
        if ways == 1
        or (
            (host % ways == 0 or ways & (ways - 1) == 0 or ways == pinned)
            and any(s % ways == 0 for s in sizes)
        )
    )


def table_of(context: SearchContext, choice: UniformChoice) -> CostTable:
    """The cost table for the choice's sharding.

    Raises:
        PlanRefused: the graph cannot be sharded so.
    """
    sizes = {**dict(_axis_sizes(choice)), MICRO: choice.num_microbatches}
    return context.model.table(shards_of(context, choice), sizes)


def _axis_sizes(choice: UniformChoice) -> tuple[tuple[str, int], ...]:
    sizes = {
        "dp_replicate": choice.dp_replicate,
        "dp_shard": choice.dp_shard,
        "tp": choice.tp,
    }
    return tuple((axis, sizes.get(axis, 1)) for axis in AXIS_NAMES)


def choice_on_segments(context: SearchContext, choice: UniformChoice) -> Choice:
    """The choice as the cost model takes it."""
    count = len(context.model.segmentation.segments)
    per_stage = choice.data_parallel * choice.tp
    return Choice(
        split=Split(
            axis_sizes=_axis_sizes(choice),
            num_microbatches=choice.num_microbatches,
            num_stages=choice.pp,
        ),
        starts=choice.starts,
        first_devices=tuple(stage * per_stage for stage in range(choice.pp)),
        zero_stages=(choice.zero_stage,) * count,
        policies=(choice.recompute,) * count,
        schedule=choice.schedule,
        bucket_bytes=25 * 2**20,
    )


def price(context: SearchContext, choice: UniformChoice, *, simulate: bool) -> StepCost:
    """Cost of a choice; without ``simulate`` by the pipeline's closed form.

    Raises:
        PlanRefused: the graph cannot be sharded so.
    """
    table = table_of(context, choice)
    return context.model.pricer.price(table, choice_on_segments(context, choice), simulate=simulate)


def plan_of(context: SearchContext, choice: UniformChoice, *, solver: str) -> ParallelPlan:
    """The plan, without a prediction."""
    per_stage = choice.data_parallel * choice.tp
    count = len(context.model.segmentation.segments)
    ends = (*choice.starts[1:], count)
    segments = [
        SegmentPlan(
            segment_class=segment.segment_class,
            name=segment.name,
            shard=shard,
            zero_stage=choice.zero_stage,
            recompute=choice.recompute,
        )
        for segment, shard in zip(
            context.model.segmentation.representatives(),
            shards_of(context, choice),
            strict=True,
        )
    ]
    return ParallelPlan(
        model=context.reference,
        cluster=context.cluster_name,
        job=context.job,
        mesh=Mesh(
            pp=choice.pp,
            dp_replicate=choice.dp_replicate,
            dp_shard=choice.dp_shard,
            tp=choice.tp,
        ),
        num_microbatches=choice.num_microbatches,
        schedule=choice.schedule,
        communication=context.pins.communication,
        stages=[
            Stage(
                first_segment=start,
                last_segment=end - 1,
                first_device=stage * per_stage,
                num_devices=per_stage,
            )
            for stage, (start, end) in enumerate(zip(choice.starts, ends, strict=True))
        ],
        segments=segments,
        provenance=Provenance(
            meshwright_version=__version__,
            solver=solver,
            level=context.level,
            torch_version=torch_version(),
        ),
    )


@cache
def torch_version() -> str:
    """Of the installed torch, without importing it."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def candidate_of(context: SearchContext, choice: UniformChoice, *, solver: str) -> Candidate:
    """The choice as a plan with its exact price.

    Raises:
        PlanRefused: the graph cannot be sharded so.
    """
    plan = plan_of(context, choice, solver=solver)
    table = table_of(context, choice)
    plan = msgspec.structs.replace(plan, unrunnable=unrunnable_reasons(plan))
    decided = choice_of(plan, context.model.segment_classes)
    return Candidate(plan=plan, cost=context.model.pricer.price(table, decided), solver=solver)


def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def largest_divisor(number: int, *, at_most: int) -> int:
    """Largest divisor of ``number`` not above ``at_most``."""
    return max(d for d in divisors(number) if d <= at_most)


def stage_times_s(context: SearchContext, choice: UniformChoice) -> Sequence[float]:
    """(segments,) seconds of one micro-batch, forward and backward, on the first device's type."""
    table = table_of(context, choice)
    decided = choice_on_segments(context, choice)
    pricer = context.model.pricer
    roofline = min(pricer.rooflines.values(), key=lambda r: r.flop_per_s)
    times = table.segment_times(
        decided.split, decided.policies, roofline=roofline, prices=pricer.prices
    )
    found: list[float] = times.total_s.tolist()
    return found
