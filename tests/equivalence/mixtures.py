"""Plans whose segments and operators do different things, and whose stages are no chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from meshwright.graph.segments import Segment
from meshwright.plans.plan import ParallelPlan, Recompute, ScheduleName, SegmentPlan, Stage
from tests.equivalence.subject import (
    BATCH,
    EXPERTS,
    SEQUENCE,
    TENSOR,
    Recipe,
    Subject,
    plan_of,
)


@dataclass(frozen=True)
class Mixture:
    """Segments before ``boundary`` follow one recipe, the others another on the same mesh."""

    first: Recipe
    rest: Recipe
    boundary: float = 0.5
    """Share of the segments that follow ``first``."""
    stages: Sequence[Callable[[Segment], bool]] = ()
    """Which segments each stage holds, asked in turn; the last stage holds what is left."""
    operators: Mapping[int, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    """Exceptions in every segment that has such an operator and such labels."""


def mixed_plan(subject: Subject, mixture: Mixture) -> ParallelPlan:
    """The mixture for this model, with one entry for each class and recipe."""
    segments = subject.prepared.segmentation.segments
    boundary = round(mixture.boundary * len(segments))
    plans = [plan_of(subject, recipe) for recipe in (mixture.first, mixture.rest)]
    at: dict[tuple[int, int], list[int]] = {}
    for segment in segments:
        key = segment.segment_class, int(segment.index >= boundary)
        at.setdefault(key, []).append(segment.index)
    entries = [
        msgspec.structs.replace(
            _with_operators(subject, plans[which].segments[number], mixture),
            at=_runs(at[number, which]),
        )
        for number, which in sorted(at)
    ]
    stages = _stages(plans[0], segments, mixture) if mixture.stages else plans[0].stages
    return msgspec.structs.replace(plans[0], segments=entries, stages=stages)


def _with_operators(subject: Subject, entry: SegmentPlan, mixture: Mixture) -> SegmentPlan:
    segment = subject.prepared.segmentation.representatives()[entry.segment_class]
    names = subject.prepared.labels.by_segment[segment.index]
    count = len(segment.forward_ops) + len(segment.backward_ops)
    operators = {
        str(number): {axis: [n for n in labels if n in names] for axis, labels in own.items()}
        for number, own in mixture.operators.items()
        if number < count
    }
    return msgspec.structs.replace(entry, operators=operators)


def _stages(plan: ParallelPlan, segments: Sequence[Segment], mixture: Mixture) -> list[Stage]:
    held: list[list[int]] = [[] for _ in range(len(mixture.stages) + 1)]
    for segment in segments:
        number = next(
            (i for i, holds in enumerate(mixture.stages) if holds(segment)), len(mixture.stages)
        )
        held[number].append(segment.index)
    stages = []
    for number, own in enumerate(held):
        first, *others = _runs(own)
        stages.append(
            Stage(
                first_segment=first[0],
                last_segment=first[1],
                branches=others,
                first_device=number * plan.mesh.num_devices_per_stage,
                num_devices=plan.mesh.num_devices_per_stage,
            )
        )
    return stages


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _named(*prefixes: str) -> Callable[[Segment], bool]:
    return lambda segment: segment.name.startswith(prefixes)


def _numbered(*numbers: int) -> Callable[[Segment], bool]:
    return lambda segment: segment.index in numbers


_DP = {"dp_shard": BATCH, "dp_replicate": BATCH}
_TP2 = Recipe({"tp": 2}, {"tp": TENSOR})
_DP2 = Recipe({"dp_shard": 2}, _DP)
_GRID = {"dp_shard": 2, "tp": 2}

MIXTURES: dict[str, Mixture] = {
    "first half full recompute": Mixture(
        replace(_DP2, micro=2, recompute=Recompute.FULL), replace(_DP2, micro=2)
    ),
    "zero 3 then selective zero 1": Mixture(
        replace(_DP2, zero=3), replace(_DP2, zero=1, recompute=Recompute.SELECTIVE)
    ),
    "zero 2 then zero 3 full micro2": Mixture(
        replace(_DP2, zero=2, micro=2), replace(_DP2, zero=3, micro=2, recompute=Recompute.FULL)
    ),
    "half of the optimizer on the host, zero 1": Mixture(
        replace(_DP2, zero=1, offload=True), replace(_DP2, zero=1)
    ),
    "zero 3 on the host, then zero 0": Mixture(
        replace(_DP2, zero=3, offload=True, micro=2), replace(_DP2, micro=2)
    ),
    "tensor then batch": Mixture(_TP2, replace(_TP2, shard={"tp": BATCH})),
    "batch then tensor": Mixture(replace(_TP2, shard={"tp": BATCH}), _TP2),
    "tensor then sequence full": Mixture(
        _TP2, replace(_TP2, shard={"tp": SEQUENCE}, recompute=Recompute.FULL)
    ),
    "tensor then nothing": Mixture(_TP2, replace(_TP2, shard={})),
    "experts then batch": Mixture(
        Recipe({"ep": 2}, {"ep": EXPERTS}), Recipe({"ep": 2}, {"ep": BATCH})
    ),
    "tensor then batch, dp2 zero3 micro2": Mixture(
        Recipe(_GRID, {**_DP, "tp": TENSOR}, zero=3, micro=2),
        Recipe(_GRID, {**_DP, "tp": BATCH}, zero=0, micro=2, recompute=Recompute.SELECTIVE),
    ),
    "pipelined tensor then batch": Mixture(
        Recipe({"pp": 2, "tp": 2}, {"tp": TENSOR}, micro=2),
        Recipe({"pp": 2, "tp": 2}, {"tp": BATCH}, micro=2),
        boundary=0.3,
    ),
}
"""Mixtures that every model is tried with."""


def _branched(recipe: Recipe, *stages: Callable[[Segment], bool]) -> Mixture:
    return Mixture(recipe, recipe, stages=stages)


_BIASES = _numbered(0, 1, 2, 3, 8)
_ENCODER = _numbered(*range(8))

BRANCHES: dict[str, dict[str, Mixture]] = {
    "tiny-clip": {
        "towers side by side": _branched(
            Recipe({"pp": 3}), _named("image_tower"), _named("text_tower")
        ),
        "texts before images": _branched(
            Recipe({"pp": 3, "tp": 2}, {"tp": TENSOR}, recompute=Recompute.FULL),
            _named("text_tower"),
            _named("image_tower"),
        ),
        "loss with the texts": _branched(Recipe({"pp": 2}), _named("image_tower")),
        "half of each tower": _branched(
            Recipe({"pp": 2, "dp_shard": 2}, _DP, zero=3), _numbered(0, 1, 2, 3, 6, 7, 8, 9)
        ),
    },
    "tiny-t5": {
        "encoder, decoder": _branched(Recipe({"pp": 2}, micro=4), _ENCODER),
        "both position biases on the first": _branched(
            Recipe({"pp": 3}, micro=4), _BIASES, _ENCODER
        ),
        "the same, GPipe on dp2 zero2": _branched(
            Recipe({"pp": 3, "dp_shard": 2}, _DP, zero=2, micro=2, schedule=ScheduleName.GPIPE),
            _BIASES,
            _ENCODER,
        ),
    },
    "tiny-unet": {
        "time beside images": _branched(
            Recipe({"pp": 3}, micro=4), _named("time"), _numbered(2, 3)
        ),
        "skips over stages": _branched(
            Recipe({"pp": 4}, micro=4, recompute=Recompute.SELECTIVE),
            lambda segment: segment.index < 7,
            lambda segment: segment.index < 13,
            lambda segment: segment.index < 19,
        ),
        "stem, time and middle in turn": _branched(
            Recipe({"pp": 3, "dp_replicate": 2}, _DP, micro=2),
            _numbered(2, 3),
            lambda segment: segment.index < 16,
        ),
    },
}
"""Stages that hold parts of several branches, or lie side by side."""
