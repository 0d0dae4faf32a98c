"""What is kept of measured steps: enough to correct as before, little enough to load at once."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from meshwright.cost.pricing import StepShape
from meshwright.cost.work import Family
from meshwright.errors import BadRequest
from meshwright.gnn_cost.steps.correction import STEP_FEATURES, StepCorrection, step_features
from meshwright.gnn_cost.steps.document import (
    LazySteps,
    StepsDocument,
    document_of,
    most_telling,
)
from meshwright.strict_json import convert

NUM_FEATURES = len(STEP_FEATURES)
UNITS = np.array(list(STEP_FEATURES.values()))


def process(count: int) -> tuple[StepCorrection, np.ndarray, np.ndarray]:
    features = np.random.default_rng(0).uniform(-1, 1, (count, NUM_FEATURES)) * UNITS
    log_ratio = 0.1 + 0.05 * features[:, 0] / UNITS[0]
    model = StepCorrection.of(
        features, log_ratio, length=np.full(NUM_FEATURES, 4.0), amplitude=0.2, noise=0.01
    )
    return model, features, log_ratio


def shape() -> StepShape:
    return StepShape(
        breakdown_s={"compute": 0.7, "launch": 0.1, "optimizer": 0.1, "data_loading": 0.1},
        family_s=0.6 * np.eye(len(Family))[Family.MATMUL] + 0.1 * np.eye(len(Family))[Family.NORM],
        num_runs=1000.0,
        peak_flop_per_s=3e14,
        memory_bytes_per_s=2e12,
        num_devices=8,
        tp=2,
        num_stages=2,
        num_microbatches=4,
    )


def document(count: int = 30) -> StepsDocument:
    model, features, log_ratio = process(count)
    return document_of(model, features, log_ratio, half_width_scale=2.0)


def test_a_document_gives_back_the_correction() -> None:
    model, features, _ = process(30)
    text = msgspec.json.encode(document())
    again = msgspec.json.decode(text, type=StepsDocument).learned()

    np.testing.assert_allclose(model(features).factor, again.model(features).factor, rtol=1e-5)
    np.testing.assert_allclose(model(features).trust, again.model(features).trust, atol=1e-5)
    assert 2.0 == again.half_width_scale


def test_steps_that_tell_most_stand_for_all() -> None:
    """Half of 120 steps; those left out are predicted well, and better than by the first half."""
    model, features, log_ratio = process(120)
    kept = most_telling(model, features, 60)
    left = np.setdiff1d(np.arange(120), kept)
    part = model.taught_again(features[kept], log_ratio[kept])(features[left])

    assert 60 == len(np.unique(kept))
    assert np.abs(np.log(part.factor) - log_ratio[left]).mean() < 0.01
    twice = most_telling(model, np.concatenate([features[:60], features[:60]]), 60)
    assert 60 == len({*(twice % 60).tolist()})


def test_what_the_framework_adds_is_no_feature() -> None:
    found = shape()
    more = {**found.breakdown_s, "data_loading": 0.9, "step_correction": -0.2}
    other = StepShape(
        **{**{name: getattr(found, name) for name in found.__slots__}, "breakdown_s": more}
    )

    np.testing.assert_array_equal(step_features(found), step_features(other))
    assert NUM_FEATURES == len(step_features(found))
    assert np.isfinite(step_features(found)).all()


def test_a_step_is_answered_for_with_an_interval() -> None:
    found = LazySteps(document()).step(shape())

    assert 1 / 1.5 <= found.factor <= 1.5
    assert 0.0 <= found.trust <= 1.0
    assert found.log_half_width > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": {"a": 1.0}}, "another version"),
        ({"steps": [[0.0]] * 30}, "features each"),
        ({"log_ratio": [0.0]}, "30 entries"),
        ({"length": [1.0]}, "as many lengths"),
        ({"amplitude": -1.0}, "amplitude"),
        ({"noise": "x"}, "noise"),
        ({"steps": []}, "steps"),
    ],
)
def test_a_damaged_document_is_an_error_of_one_line(change: dict[str, Any], message: str) -> None:
    raw = {**msgspec.to_builtins(document()), **change}

    with pytest.raises(BadRequest, match=message) as error:
        convert(raw, StepsDocument, error=BadRequest, name="steps.json")

    assert "\n" not in str(error.value)
