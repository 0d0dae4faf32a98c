"""Mixtures within a plan, and stages that are no chain, equal plain PyTorch as uniform plans do."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import msgspec
import pytest

from meshwright.errors import PlanRefused
from meshwright.graph.dimensions import exchanges_rows
from meshwright.plans import ParallelPlan
from meshwright.spmd.prepared import lower_plan
from meshwright.spmd.program import Collective
from tests.equivalence.mixtures import BRANCHES, MIXTURES, Mixture, mixed_plan
from tests.equivalence.processes import lowered, run_on_processes
from tests.equivalence.recipes import MODELS
from tests.equivalence.subject import (
    BATCH,
    TENSOR,
    Recipe,
    Subject,
    built_in,
    largest_differences,
    on_virtual_ranks,
    plan_of,
)

TOLERANCE = 1e-10

WHOLE_BATCH = {"tiny-clip", "tiny-resnet"}
"""Models that cannot be cut into micro-batches."""

QUICK = {"tiny-gpt", "tiny-moe"}
"""Models that meet every mixture in the quick tests."""


@lru_cache(maxsize=1)
def _subject(model: str) -> Subject:
    return built_in(model)


def _check(subject: Subject, plan: ParallelPlan) -> None:
    found = largest_differences(subject, on_virtual_ranks(subject, plan))

    assert TOLERANCE >= max(found), found


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(model, name, marks=() if model in QUICK else pytest.mark.slow)
        for model in MODELS
        for name in MIXTURES
    ],
)
def test_a_mixture_equals_plain_pytorch(model: str, name: str) -> None:
    subject = _subject(model)
    plan = mixed_plan(subject, MIXTURES[name])
    if model in WHOLE_BATCH and plan.num_microbatches > 1:
        with pytest.raises(PlanRefused, match="needs the whole batch at once"):
            on_virtual_ranks(subject, plan)
        return

    ways = {
        msgspec.json.encode((s.shard, s.zero_stage, s.recompute, s.offload, s.operators))
        for s in plan.segments
    }
    if model in QUICK:
        assert len(plan.segments) > subject.prepared.segmentation.num_classes
    # Without experts both ways of that mixture are the batch.
    has_experts = bool(subject.prepared.labels.expert_operators)
    assert len(ways) > 1 or (name == "experts then batch" and not has_experts)
    _check(subject, plan)


@pytest.mark.parametrize(
    ("model", "name"),
    [(model, name) for model, branches in BRANCHES.items() for name in branches],
)
def test_stages_on_branches_equal_plain_pytorch(model: str, name: str) -> None:
    subject = _subject(model)

    _check(subject, mixed_plan(subject, BRANCHES[model][name]))


def test_a_stage_that_needs_a_later_one_is_refused() -> None:
    """The outer blocks of a UNet come before and after the inner ones."""
    subject = _subject("tiny-unet")
    both = Recipe({"pp": 2})
    outer = Mixture(both, both, stages=[lambda segment: not 7 <= segment.index < 19])

    with pytest.raises(PlanRefused, match="on stage 0 needs a value that only stage 1 makes"):
        on_virtual_ranks(subject, mixed_plan(subject, outer))


def with_exceptions(subject: Subject, recipe: Recipe, *, seed: int) -> ParallelPlan:
    """The recipe, but half of the operators are sharded at random, forward and backward alone."""
    rng = random.Random(seed)
    plan = plan_of(subject, recipe)
    segments = subject.prepared.segmentation.segments
    entries = []
    for entry in plan.segments:
        own = [s for s in segments if s.segment_class == entry.segment_class]
        names = set.intersection(
            *(set(subject.prepared.labels.by_segment[segment.index]) for segment in own)
        )
        # The runtime exchanges no rows yet.
        names = {name for name in names if not exchanges_rows(name)}
        count = len(own[0].forward_ops) + len(own[0].backward_ops)
        operators = {
            str(number): {
                axis: rng.sample(sorted(names), rng.randint(0, min(2, len(names))))
                for axis in entry.shard
            }
            for number in sorted(rng.sample(range(count), count // 2))
        }
        entries.append(msgspec.structs.replace(entry, operators=operators))
    return msgspec.structs.replace(plan, segments=entries)


@pytest.mark.parametrize(
    ("model", "recipe", "seed"),
    [
        ("tiny-gpt", Recipe({"tp": 2}, {"tp": TENSOR}), 0),
        pytest.param(
            "tiny-gpt",
            Recipe({"dp_shard": 2, "tp": 2}, {"dp_shard": BATCH, "tp": TENSOR}),
            1,
            marks=pytest.mark.slow,
        ),
        ("tiny-moe", Recipe({"tp": 2, "ep": 2}, {"tp": TENSOR, "ep": BATCH}), 2),
        pytest.param(
            "tiny-vit", Recipe({"tp": 3}, {"tp": TENSOR}, micro=2), 3, marks=pytest.mark.slow
        ),
        pytest.param("tiny-unet", Recipe({"tp": 2}, {"tp": TENSOR}), 4, marks=pytest.mark.slow),
    ],
)
def test_operators_may_differ_from_their_segment(model: str, recipe: Recipe, seed: int) -> None:
    subject = _subject(model)
    plan = with_exceptions(subject, recipe, seed=seed)

    assert any(entry.operators for entry in plan.segments)
    _check(subject, plan)


def all_to_all_attention(subject: Subject) -> ParallelPlan:
    """The sequence is cut over ``cp`` but for attention, which has its heads cut (2309.14509)."""
    plan = plan_of(subject, Recipe({"cp": 2}, {"cp": ("sequence",)}))
    entries = []
    for entry in plan.segments:
        segment = subject.prepared.segmentation.representatives()[entry.segment_class]
        names = subject.prepared.labels.by_segment[segment.index]
        heads = [name for name in names if name.startswith("heads")]
        ops = (*segment.forward_ops, *segment.backward_ops)
        attention = [n for n, op in enumerate(ops) if "_attention" in _target(subject, op)]
        operators = {str(number): {"cp": heads} for number in attention}
        entries.append(msgspec.structs.replace(entry, operators=operators))
    return msgspec.structs.replace(plan, segments=entries)


def _target(subject: Subject, op: int) -> str:
    return subject.prepared.graph.ops[op].target


@pytest.mark.parametrize("model", ["tiny-gpt", "tiny-llama"])
def test_all_to_alls_around_attention(model: str) -> None:
    """Of q, k, v and the result in the forward pass, of their gradients in the backward pass."""
    subject = _subject(model)
    plan = all_to_all_attention(subject)
    (program,) = lower_plan(subject.prepared, plan)
    layers = sum("_attention" in op.target for op in subject.prepared.graph.ops) // 2
    kinds = {
        function.name: Counter(
            item.kind for item in function.body if isinstance(item, Collective) and item.segment > 0
        )
        for function in (program.forward, program.backward_final)
    }

    assert 4 * layers == kinds["forward"]["all_to_all"] == kinds["backward_final"]["all_to_all"]
    assert 0 == kinds["forward"]["all_gather"] == kinds["backward_final"]["all_gather"]
    _check(subject, plan)


def test_zero_does_not_cut_what_an_operator_cuts() -> None:
    subject = _subject("tiny-gpt")
    recipe = Recipe({"dp_shard": 2}, {"dp_shard": BATCH}, zero=1)
    plan = with_exceptions(subject, recipe, seed=0)
    without = with_exceptions(subject, replace(recipe, zero=0), seed=0)

    with pytest.raises(PlanRefused, match=r"ZeRO 1 would cut .* along dp_shard, which already"):
        on_virtual_ranks(subject, plan)
    _check(subject, without)


def test_an_operator_the_segment_does_not_have_is_refused() -> None:
    subject = _subject("tiny-gpt")
    plan = plan_of(subject, Recipe({"tp": 2}, {"tp": TENSOR}))
    first = msgspec.structs.replace(plan.segments[0], operators={"999": {"tp": []}})
    plan = msgspec.structs.replace(plan, segments=[first, *plan.segments[1:]])

    with pytest.raises(PlanRefused, match="operator 999 is none of its"):
        on_virtual_ranks(subject, plan)


@pytest.mark.dist
def test_some_run_on_processes() -> None:
    clip, gpt = built_in("tiny-clip"), built_in("tiny-gpt")
    plans = {
        "towers": (clip, mixed_plan(clip, BRANCHES["tiny-clip"]["loss with the texts"])),
        "layers": (gpt, mixed_plan(gpt, MIXTURES["zero 2 then zero 3 full micro2"])),
        "directions": (gpt, mixed_plan(gpt, MIXTURES["tensor then batch"])),
        "operators": (gpt, with_exceptions(gpt, Recipe({"tp": 2}, {"tp": TENSOR}), seed=0)),
    }
    runs = [lowered(name, *run) for name, run in plans.items()]
    found = run_on_processes(runs, num_ranks=2)

    assert [*plans] == [one.name for one in found]
    assert {} == {one.name: one for one in found if not one.worst <= TOLERANCE}
