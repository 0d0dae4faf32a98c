"""What the cost model counts is what the lowered programs contain, in mixtures too."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from meshwright.plans.plan import ParallelPlan, Recompute, SegmentPlan, Stage
from meshwright.space.search import SearchContext
from tests.cost.graphs import tiny_gpt, zoo
from tests.cost.plans import context_of, uniform_plan
from tests.cost.test_counts import contained, counted


def mixed(
    context: SearchContext, plan: ParallelPlan, boundary: int, **changes: Any
) -> ParallelPlan:
    """``plan`` with ``changes`` in the entries of segments from ``boundary`` on."""
    entries: dict[tuple[int, bool], list[int]] = {}
    for number, segment_class in enumerate(context.model.segment_classes):
        entries.setdefault((segment_class, number >= boundary), []).append(number)
    segments: list[SegmentPlan] = []
    for (segment_class, is_late), numbers in sorted(entries.items()):
        entry = plan.segments[segment_class]
        at = [(number, number) for number in numbers]
        segments.append(msgspec.structs.replace(entry, at=at, **(changes if is_late else {})))
    return msgspec.structs.replace(plan, segments=segments)


def with_exceptions(context: SearchContext, plan: ParallelPlan, seed: int) -> ParallelPlan:
    """A third of the operators of every class are not sharded along ``tp``, or along the batch."""
    rng = random.Random(seed)
    segments = []
    for entry, segment in zip(
        plan.segments, context.model.segmentation.representatives(), strict=True
    ):
        count = len(segment.forward_ops) + len(segment.backward_ops)
        operators = {
            str(number): {"tp": rng.choice(([], ["batch"]))}
            for number in range(count)
            if rng.random() < 1 / 3
        }
        segments.append(msgspec.structs.replace(entry, operators=operators))
    return msgspec.structs.replace(plan, segments=segments)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ({"dp_shard": 2, "num_microbatches": 2}, {"recompute": Recompute.FULL}),
        ({"dp_shard": 4, "zero_stage": 3}, {"zero_stage": 1, "recompute": Recompute.SELECTIVE}),
        ({"tp": 2}, {"shard": {"tp": ["batch"]}}),
        ({"tp": 2, "recompute": Recompute.FULL}, {"shard": {"tp": ["batch"]}}),
        ({"tp": 2, "dp_shard": 2, "zero_stage": 2}, {"shard": {"dp_shard": ["batch"]}}),
        ({"pp": 2, "tp": 2, "num_microbatches": 2}, {"shard": {"tp": ["batch"]}}),
    ],
    ids=str,
)
def test_layers_that_differ_count_alike(shape: dict[str, Any], changes: dict[str, Any]) -> None:
    context = context_of(tiny_gpt(), "cpu:8", 16)

    for boundary in (3, 6):
        plan = mixed(context, uniform_plan(context, **shape), boundary, **changes)

        assert contained(context, plan) == counted(context, plan)


@pytest.mark.parametrize("seed", [0, 1])
def test_operators_that_differ_count_alike(seed: int) -> None:
    context = context_of(tiny_gpt(), "cpu:8", 16)
    plan = with_exceptions(context, uniform_plan(context, tp=2, num_microbatches=2), seed)

    assert contained(context, plan) == counted(context, plan)


def test_stages_on_branches_count_alike() -> None:
    """Images on stage 0, texts on stage 1 with the loss; then a half of each on either stage."""
    context = context_of(zoo("tiny-clip", 8), "cpu:8", 8)
    plan = uniform_plan(context, pp=2, dp_shard=2, zero_stage=3, recompute=Recompute.FULL)
    names = [segment.name for segment in context.model.segmentation.segments]
    texts = next(i for i, name in enumerate(names) if name.startswith("text_tower"))
    last = len(names) - 1
    halves = [
        Stage(
            first_segment=0, last_segment=2, branches=[(texts, texts + 2)],
            first_device=0, num_devices=2,
        ),
        Stage(
            first_segment=3, last_segment=texts - 1, branches=[(texts + 3, last)],
            first_device=2, num_devices=2,
        ),
    ]  # fmt: skip
    towers = [
        Stage(first_segment=0, last_segment=texts - 1, first_device=0, num_devices=2),
        Stage(first_segment=texts, last_segment=last, first_device=2, num_devices=2),
    ]

    for stages in (halves, towers):
        staged = msgspec.structs.replace(plan, stages=stages)

        assert contained(context, staged) == counted(context, staged)
