"""Each baseline finds what was put into made-up times, on a GPU it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from meshwright.cost.work import Family
from meshwright.gnn_cost.baselines import (
    BoostedTrees,
    FamilyMlp,
    FittedRoofline,
    OperatorModel,
    PlainRoofline,
)
from meshwright.gnn_cost.features import DEVICE_FEATURES
from meshwright.gnn_cost.operators.splits import take
from tests.gnn_cost.measured import products

_MODELS: dict[str, Callable[[], OperatorModel]] = {
    "fitted": FittedRoofline,
    "trees": lambda: BoostedTrees(without=DEVICE_FEATURES, num_trees=60),
    "mlp": lambda: FamilyMlp(without=DEVICE_FEATURES, num_epochs=25, hidden=16),
}


def _error(model: OperatorModel) -> float:
    """Mean error on the H100, after fitting on A100 and V100."""
    graphs = products(count=900, seed=0)
    names = np.array([device.name for device in graphs.devices])[graphs.device]
    test = take(graphs, names == "h100-sxm-80gb")
    model.fit(take(graphs, names != "h100-sxm-80gb"))
    return float(np.abs(model.predict(test) / test.time_s - 1).mean())


@pytest.mark.parametrize("name", ["fitted", "trees"])
def test_a_constant_efficiency_is_found_on_another_device(name: str) -> None:
    plain = _error(PlainRoofline())
    error = _error(_MODELS[name]())

    assert error < 0.2
    assert error < 0.6 * plain


def test_the_network_of_single_operators_learns_sizes_it_has_not_seen() -> None:
    graphs = products(count=900, seed=0)
    is_test = np.arange(graphs.count) % 3 == 0
    test = take(graphs, is_test)
    model = _MODELS["mlp"]()
    model.fit(take(graphs, ~is_test))
    error = np.abs(model.predict(test) / test.time_s - 1).mean()
    plain = np.abs(PlainRoofline().predict(test) / test.time_s - 1).mean()

    assert error < 0.5 * plain


def test_the_fitted_roofline_names_what_was_put_in() -> None:
    model = FittedRoofline()
    model.fit(products(count=300, seed=1))

    assert pytest.approx(0.6, abs=0.03) == 1 / model.tensors["typical_slowdown"][Family.MATMUL]
    assert pytest.approx(2e-6, rel=0.3) == model.tensors["typical_floor_s"][Family.MATMUL]


@pytest.mark.parametrize("name", ["trees", "mlp"])
def test_the_same_seed_gives_the_same_model(name: str) -> None:
    graphs = products(count=200, seed=2)
    one, two = _MODELS[name](), _MODELS[name]()
    one.fit(graphs)
    two.fit(graphs)

    assert np.array_equal(one.predict(graphs), two.predict(graphs))


def test_time_that_is_no_operators_is_added() -> None:
    graphs = products(count=30, seed=0)
    model = PlainRoofline()
    model.fit(graphs)
    later = model.predict(replace(graphs, rest_s=graphs.rest_s + 1.0))

    assert np.allclose(model.predict(graphs) + 1.0, later)
