"""Corrections of steps: right among the steps they were fitted on, 1 far away, bounded always."""

from __future__ import annotations

import math

import numpy as np
import pytest

from meshwright.errors import BadRequest
from meshwright.gnn_cost.forward import MAX_FACTOR
from meshwright.gnn_cost.steps.correction import STEP_FEATURES, StepCorrection
from meshwright.gnn_cost.steps.fit import OF_SHAPES, fit_step_correction, half_width_scale

NUM_FEATURES = len(STEP_FEATURES)
NAMES = list(STEP_FEATURES)
UNITS = np.array(list(STEP_FEATURES.values()))


def steps(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features within one unit of 0, and log factors that follow two of them smoothly.

    Shapes, devices and clusters are nearly the same: of these, little is told of others.
    """
    features = np.random.default_rng(seed).uniform(-1, 1, (count, NUM_FEATURES)) * UNITS
    features[:, [name in OF_SHAPES for name in STEP_FEATURES]] *= 0.05
    launch, micro = (features[:, NAMES.index(n)] for n in ("launch_share", "log_microbatches"))
    return features, 0.1 + 0.1 * np.sin(8 * launch) + 0.05 * micro


def process(features: np.ndarray, log_ratio: np.ndarray) -> StepCorrection:
    return StepCorrection.of(
        features, log_ratio, length=np.full(NUM_FEATURES, 2.0), amplitude=0.2, noise=0.01
    )


def test_steps_like_those_fitted_on_are_corrected() -> None:
    features, log_ratio = steps(150, seed=0)
    others, wanted = steps(50, seed=1)
    found = fit_step_correction(features, log_ratio, seed=0)(others)

    assert np.abs(np.log(found.factor) - wanted).mean() < 0.01
    assert found.trust.mean() > 0.9


def test_far_from_all_steps_the_factor_is_one() -> None:
    features, log_ratio = steps(60, seed=0)
    far = features[:5] + 100 * UNITS
    model = process(features, log_ratio)

    assert [1.0] * 5 == model(far).factor.tolist()
    assert [0.0] * 5 == model(far).trust.tolist()
    assert model(far).log_spread.min() > model(features).log_spread.max()
    assert (model(far, is_shrunk=False).factor > 1.01).all()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_no_measurement_moves_a_step_beyond_the_bound(sign: float) -> None:
    features, _ = steps(40, seed=0)
    factor = process(features, np.full(40, sign * 5.0))(features).factor

    np.testing.assert_allclose(MAX_FACTOR**sign, factor)


def test_the_order_of_steps_does_not_matter() -> None:
    features, log_ratio = steps(40, seed=0)
    order = np.random.default_rng(3).permutation(40)

    np.testing.assert_allclose(
        process(features, log_ratio)(features).factor,
        process(features[order], log_ratio[order])(features).factor,
        rtol=1e-6,
    )


def test_intervals_widen_where_left_out_levels_were_missed() -> None:
    features, log_ratio = steps(60, seed=0)
    level = np.array(["a", "b"])[(np.arange(60) >= 30).astype(int)]
    moved = log_ratio + 0.3 * (level == "b")
    model = process(features, log_ratio)

    assert pytest.approx(1.645) == half_width_scale(model, features, log_ratio, [])
    calm = half_width_scale(model, features, log_ratio, [level])
    assert half_width_scale(model, features, moved, [level]) > max(2.2, 1.3 * calm)


def test_two_steps_are_too_few() -> None:
    with pytest.raises(BadRequest, match="at least 3 measured steps"):
        fit_step_correction(np.zeros((2, NUM_FEATURES)), np.zeros(2))


def test_a_constant_ratio_is_the_factor_of_all_that_is_near() -> None:
    features, _ = steps(30, seed=0)
    model = process(features, np.full(30, math.log(1.2)))

    np.testing.assert_allclose(1.2, model(features).factor, rtol=1e-3)
