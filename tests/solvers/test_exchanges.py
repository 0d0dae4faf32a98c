"""Rings and halos: offered where plans may win that the runtime cannot carry yet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.space.decision import Decision, Strategy
from meshwright.space.evaluate import candidate_of_decision
from meshwright.space.skeletons import shardings_for, skeletons
from tests.solvers.operator_problems import context_of

LONG_GPT = "tiny-gpt?num_layers=1&hidden=64&num_heads=4&vocab_size=64&seq_len=4096"
RESNET = "tiny-resnet"


def names(model: str, *, batch: int, allow_unrunnable: bool) -> set[str]:
    context = replace(context_of(model, batch, "4xh100"), allow_unrunnable=allow_unrunnable)
    return {
        sharding.name
        for skeleton in skeletons(context)
        if skeleton.sizes["cp"] > 1
        for sharding in shardings_for(context, skeleton)
    }


def test_attention_in_rings_beside_exchanged_heads() -> None:
    assert {"plain", "plain+ring"} <= names(LONG_GPT, batch=2, allow_unrunnable=True)
    assert "plain+ring" not in names(LONG_GPT, batch=2, allow_unrunnable=False)


def test_images_are_cut_by_rows() -> None:
    assert {"plain"} <= names(RESNET, batch=2, allow_unrunnable=True)
    assert set() == names(RESNET, batch=2, allow_unrunnable=False)


@pytest.mark.parametrize(("model", "label"), [(LONG_GPT, "ring"), (RESNET, "height")])
def test_such_plans_are_priced_and_say_why_they_do_not_run(model: str, label: str) -> None:
    context = replace(context_of(model, 2, "4xh100"), allow_unrunnable=True)
    skeleton = next(s for s in skeletons(context) if s.sizes["cp"] == 2 and s.num_stages == 1)
    strategy = Strategy(sharding=shardings_for(context, skeleton)[-1])
    count = len(context.model.segment_classes)
    decision = Decision(skeleton=skeleton, starts=(0,), strategies=(strategy,) * count)
    found = candidate_of_decision(context, decision, solver="")
    said = {name for s in found.plan.segments for names in s.shard.values() for name in names}

    assert label in {name.rstrip("0123456789") for name in said}
    assert 0 < found.time_s
    assert found.plan.unrunnable
