"""Words for recompute and schedules, as frameworks write them."""

from __future__ import annotations

import pytest

from meshwright.bench.given_plans import degrees_of
from meshwright.bench.predict import Predictor
from meshwright.bench.software import Selective, software_of
from meshwright.bench.words import recompute_of, schedule_of
from meshwright.plans.plan import Recompute, ScheduleName
from tests.bench.given_runs import run


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("core_attn", Recompute.SELECTIVE),
        ("selective", Recompute.SELECTIVE),
        ("attention", Recompute.SELECTIVE),
        ("selective op", Recompute.SELECTIVE),
        ("selective (1 layer)", Recompute.SELECTIVE),
        ("core_attn, layernorm", Recompute.SELECTIVE),
        ("block", Recompute.FULL),
        ("uniform", Recompute.FULL),
        ("full (1 layer)", Recompute.FULL),
        ("full, uniform, 4 layers", Recompute.FULL),
        ("Full", Recompute.FULL),
        ("true", Recompute.FULL),
        ("no recompute", Recompute.NONE),
        ("off", Recompute.NONE),
    ],
)
def test_recompute(word: str, found: Recompute) -> None:
    assert found is recompute_of(run(recompute=word))[0]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("selective", ()),
        (None, ("recompute not told: none",)),
        ("sometimes", ("recompute 'sometimes' is unknown: taken as none",)),
        ("block 4", ("recompute 'block 4' taken as full, of all layers",)),
        (
            "core_attn, layernorm",
            ("recompute 'core_attn, layernorm' taken as selective, without layernorm",),
        ),
    ],
)
def test_what_is_said_of_a_word_for_recompute(word: str | None, said: tuple[str, ...]) -> None:
    assert said == recompute_of(run(recompute=word))[1]


def test_a_word_that_names_attention_means_it_in_every_framework() -> None:
    cells = {"framework": "torchtitan", "recompute": "core_attn"}

    assert Selective.CORE_ATTENTION is software_of(run(**cells)).selective
    assert (
        Selective.EVERY_SECOND_PRODUCT
        is software_of(run(**{**cells, "recompute": "selective"})).selective
    )


@pytest.mark.parametrize(
    ("word", "found", "is_said"),
    [
        ("1f1b", ScheduleName.ONE_F_ONE_B, False),
        ("1F1B non-interleaved", ScheduleName.ONE_F_ONE_B, False),
        ("Interleaved1F1B", ScheduleName.INTERLEAVED, False),
        ("vpp", ScheduleName.INTERLEAVED, False),
        ("ScheduleGPipe", ScheduleName.GPIPE, False),
        ("zero_bubble", ScheduleName.ZB_H1, False),
        ("zb-h1", ScheduleName.ZB_H1, False),
        ("zb-v", ScheduleName.ZB_H1, True),
        ("DualPipe", ScheduleName.ZB_H1, True),
        ("none", None, False),
        (None, None, True),
        ("snake", None, True),
    ],
)
def test_schedule(word: str | None, found: ScheduleName | None, is_said: bool) -> None:
    told, said = schedule_of(run(schedule=word))

    assert found is told
    assert is_said is bool(said)


def test_virtual_stages_told_with_the_schedule() -> None:
    assert 4 == degrees_of(run(schedule="interleaved, vpp 4"))[0].virtual
    assert 2 == degrees_of(run(schedule="interleaved_1f1b"))[0].virtual
    assert 1 == degrees_of(run(schedule="1f1b"))[0].virtual


def test_words_reach_the_plan_and_the_assumptions() -> None:
    predictor = Predictor()
    near = predictor.priced(run(schedule="dualpipe", recompute="block"))
    unknown = predictor.priced(run(schedule="snake", recompute="sometimes"))

    assert ScheduleName.ZB_H1 is near.plan.schedule
    assert {Recompute.FULL} == {item.recompute for item in near.plan.segments}
    assert "schedule 'dualpipe' taken as zb-h1" in near.assumptions
    assert ScheduleName.ONE_F_ONE_B is unknown.plan.schedule
    assert "schedule 'snake' is unknown: taken as 1F1B" in unknown.assumptions
    assert "recompute 'sometimes' is unknown: taken as none" in unknown.assumptions
