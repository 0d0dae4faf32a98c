"""Fits a ``StepCorrection``: length scales, amplitude and noise by likelihood, with priors.

Length scales start long (a feature counts little until steps tell otherwise), so what few steps
cannot tell stays at rest. Found on a draw of the steps; the process then goes through all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from meshwright.errors import BadRequest
from meshwright.gnn_cost.steps.correction import STEP_FEATURES, StepCorrection, scaled

__all__ = ["OF_SHAPES", "SHAPE_LENGTHS", "fit_step_correction", "half_width_scale"]

FloatArray = NDArray[np.float64]
TextArray = NDArray[np.str_]

_USUAL_LENGTH, _SPREAD = 4.0, 1.0
SHAPE_LENGTHS = (0.8, 0.4, 0.2)
"""Of what is to be far from all else (``OF_SHAPES``); the usual one first."""
_SHAPE_SPREAD = 0.2
OF_SHAPES = frozenset({
    "matmul_share", "batched_share", "softmax_share", "elementwise_share", "log_operator_us",
    "log_run_us", "log_flop_per_s", "log_bytes_per_s", "log_devices", "gather_share",
})  # fmt: skip
"""What a kernel loses at one shape, or a framework on one machine, says little of the next: of
these, length scales stay short, so that other shapes (a hidden size never seen), devices and
clusters are far from all that was measured."""
_USUAL_AMPLITUDE, _USUAL_NOISE = 0.15, 0.02
_LEAST_NOISE = 0.005
_MOST_POINTS = 320
"""Steps that hyperparameters are found on."""
_ROUNDS = 40


def fit_step_correction(
    features_NF: FloatArray,
    log_ratio_N: FloatArray,
    *,
    seed: int = 0,
    shape_length: float = SHAPE_LENGTHS[0],
) -> StepCorrection:
    """The correction that explains measured over predicted step times.

    Args:
        features_NF: of ``step_features``.
        log_ratio_N: log(measured / predicted).
        seed: of the draw.
        shape_length: how far steps of one shape, device or cluster tell of others, in units.

    Raises:
        BadRequest: fewer than three steps.
    """
    if len(log_ratio_N) < 3:
        raise BadRequest("steps: a correction needs at least 3 measured steps")
    rng = np.random.default_rng([seed, 5])
    drawn = rng.permutation(len(log_ratio_N))[:_MOST_POINTS]
    count = len(STEP_FEATURES)
    x_NF = torch.from_numpy(scaled(features_NF[drawn], np.ones(count)))
    y_N = torch.from_numpy(log_ratio_N[drawn].copy())
    theta = torch.tensor(
        [math.log(_USUAL_LENGTH)] * count + [math.log(_USUAL_AMPLITUDE), math.log(_USUAL_NOISE)],
        dtype=torch.float64,
    )
    spread = torch.full_like(theta, _SPREAD)
    for place, name in enumerate(STEP_FEATURES):
        if name in OF_SHAPES:
            theta[place], spread[place] = math.log(shape_length), _SHAPE_SPREAD
    usual = theta.clone()
    theta.requires_grad_(True)
    optimizer = torch.optim.LBFGS([theta], max_iter=_ROUNDS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = _negative_log_posterior(theta, (usual, spread), x_NF, y_N)
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        found = theta if bool(torch.isfinite(theta).all()) else usual
        length, (amplitude, noise) = found[:count].exp().numpy(), found[count:].exp().tolist()
    return StepCorrection.of(
        features_NF,
        log_ratio_N,
        length=length,
        amplitude=amplitude,
        noise=math.hypot(noise, _LEAST_NOISE),
    )


def half_width_scale(
    model: StepCorrection,
    features_NF: FloatArray,
    log_ratio_N: FloatArray,
    levels: Sequence[TextArray],
    *,
    covered: float = 0.9,
) -> float:
    """What ``log_spread`` is multiplied with for an interval that covers so much.

    Each level of each column of ``levels`` is left out in turn (cluster sizes, depths, stages), as
    the steps to come are ones that no fit has seen. At least what a normal distribution has.
    """
    scores = []
    for column in levels:
        for level in np.unique(column):
            test = column == level
            if test.all() or (~test).sum() < 3:
                continue
            left = model.taught_again(features_NF[~test], log_ratio_N[~test])(features_NF[test])
            scores.append(np.abs(log_ratio_N[test] - np.log(left.factor)) / left.log_spread)
    normal = 1.645
    if not scores:
        return normal
    return max(normal, float(np.quantile(np.concatenate(scores), covered)))


def _negative_log_posterior(
    theta: torch.Tensor,
    usual: tuple[torch.Tensor, torch.Tensor],
    x_NF: torch.Tensor,
    y_N: torch.Tensor,
) -> torch.Tensor:
    count = x_NF.size(1)
    far = math.sqrt(5.0) * _distance(x_NF / theta[:count].exp())
    amplitude, noise = theta[count].exp(), theta[count + 1].exp()
    covariance = amplitude**2 * (1 + far + far**2 / 3) * torch.exp(-far)
    eye = torch.eye(len(y_N), dtype=torch.float64)
    root = torch.linalg.cholesky(covariance + (noise**2 + _LEAST_NOISE**2) * eye)
    ones_and_y = torch.stack([torch.ones_like(y_N), y_N], dim=1)
    one, y = torch.linalg.solve_triangular(root, ones_and_y, upper=False).unbind(1)
    offset = (one @ y) / (one @ one)
    fit = 0.5 * ((y - offset * one) ** 2).sum() + root.diagonal().log().sum()
    prior = 0.5 * (((theta - usual[0]) / usual[1]) ** 2).sum()
    return torch.as_tensor(fit + prior)


def _distance(x_NF: torch.Tensor) -> torch.Tensor:
    square = (x_NF**2).sum(1)
    squares = square[:, None] + square - 2 * x_NF @ x_NF.T
    return torch.sqrt(squares.clamp(min=0) + 1e-12)
