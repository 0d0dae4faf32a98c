"""Stages of pipelines that layers do not divide into."""

from __future__ import annotations

import pytest

from meshwright.bench.given_plans import degrees_of
from meshwright.bench.predict import Predictor, PricedRun
from meshwright.errors import BadRequest
from tests.bench.given_runs import Cell, run

DEEP: dict[str, Cell] = {
    "hidden": 64, "heads": 4, "ffn_hidden": 128, "seq_len": 32, "gpus": 16, "hosts": 2, "dp": 1,
    "tp": 1, "pp": 16, "micro_batch": 1, "schedule": "interleaved",
}  # fmt: skip


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor()


def layers_of_stages(priced: PricedRun) -> list[float]:
    """Of each stage; the attention of a layer is half of it."""
    names = [segment.name for segment in priced.model.segmentation.segments]
    return [
        sum("layers." in name for name in names[stage.first_segment : stage.last_segment + 1]) / 2
        for stage in priced.plan.stages
    ]


def test_layers_that_divide_are_cut_evenly(predictor: Predictor) -> None:
    """6 layers are even on 2 stages; with embedding and head they would be too."""
    priced = predictor.priced(run(layers=6))

    assert [3, 3] == layers_of_stages(priced)
    assert not any("count as layers" in text for text in priced.assumptions)


def test_embedding_and_head_as_layers(predictor: Predictor) -> None:
    """6 layers on 4 stages: 8 units, 2 of each."""
    priced = predictor.priced(run(layers=6, pp=4, tp=1))

    assert [1, 2, 2, 1] == layers_of_stages(priced)
    assert "4 stages for 6 layers: embedding and head count as layers" in priced.assumptions


def test_stages_differ_by_one_layer_where_nothing_comes_out_even(predictor: Predictor) -> None:
    assert [1, 1, 1, 2] == layers_of_stages(predictor.priced(run(layers=5, pp=4, tp=1)))


def test_a_stage_for_each_of_126_layers_and_their_ends(predictor: Predictor) -> None:
    priced = predictor.priced(run(**DEEP, layers=126, virtual_stages=8))

    assert [0, *[1] * 126, 0] == layers_of_stages(priced)
    assert priced.cost().time_s > 0


def test_a_stage_that_would_be_empty_takes_half_a_layer(predictor: Predictor) -> None:
    """61 layers with embedding and head are 63 units for 64 stages."""
    priced = predictor.priced(run(**DEEP, layers=61, virtual_stages=4))

    assert [0, *[1] * 60, 0.5, 0.5, 0] == layers_of_stages(priced)
    assert any("would be empty take half a layer: 1" in text for text in priced.assumptions)
    assert priced.cost().time_s > 0


def test_ranks_without_any_layer_are_an_error(predictor: Predictor) -> None:
    cells = run(**DEEP, layers=4, virtual_stages=2)
    assert 2 == degrees_of(cells)[0].virtual
    with pytest.raises(BadRequest, match="32 stages but 4 layers"):
        predictor.priced(cells)
