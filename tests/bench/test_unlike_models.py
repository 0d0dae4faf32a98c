"""Where the model that was built is not the one that ran, the row says so."""

from __future__ import annotations

import pytest

from meshwright.bench.models import unlike_told
from meshwright.bench.predict import Predictor, RunPrediction
from tests.bench.given_runs import Cell, run


def test_parameters_that_the_sizes_do_not_make() -> None:
    text = "params_b 2 told, but the sizes make a model of 1.9 (-5.0%)"

    assert (text,) == unlike_told(run(params_b=2.0), 1_900_000_000)
    assert () == unlike_told(run(params_b=2.0), 2_050_000_000)
    assert () == unlike_told(run(), 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_name": "DeepSeek-V3", "experts": 256},
            ("latent attention (MLA): not modeled", "shared experts: not modeled"),
        ),
        ({"model_name": "Llama-4 Scout", "arch": "moe"}, ("shared experts: not modeled",)),
        ({"model_name": "DeepSeek Coder 33B", "arch": "llama"}, ()),
        ({"model_name": "Mixtral 8x7B", "experts": 8}, ()),
    ],
)
def test_parts_that_are_not_modeled(changes: dict[str, Cell], said: tuple[str, ...]) -> None:
    assert said == unlike_told(run(**changes), 1)


def test_it_is_among_the_assumptions_of_a_prediction() -> None:
    """4 layers of hidden 256 are 3.5 million parameters."""
    found = Predictor().predict(run(params_b=0.005))

    assert isinstance(found, RunPrediction)
    assert any("params_b 0.005 told" in text for text in found.assumptions)
