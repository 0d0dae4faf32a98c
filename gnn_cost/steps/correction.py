"""What measured steps say beyond the prices of their parts: a bounded factor of a step's time.

A Gaussian process over ``STEP_FEATURES``, shares and logarithms that name no model and no device::

    log(measured_s / predicted_s) = offset + f(x),   f ~ GP(0, amplitude^2 Matern 5/2)
    factor = exp(trust * (offset + mean of f)), within MAX_FACTOR of 1
    trust = (0.6 - variance left) / 0.4, within 0 and 1

*Variance left* is the share of f's variance that the steps it was fitted on do not explain: 0 among
them, 1 far from all. So out of distribution the factor is 1. The spread of f says how sure it is.
Needs no torch; a thousand steps take milliseconds, so it serves the last ranking of plans, not the
inner loops of a search.

N = steps, F = features, S = steps fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.choice import CORRECTION_CAUSE
from meshwright.cost.pricing import Correction, StepShape
from meshwright.cost.work import Family
from meshwright.gnn_cost.forward import MAX_FACTOR

__all__ = ["STEP_FEATURES", "Corrected", "LearnedSteps", "StepCorrection", "step_features"]

FloatArray = NDArray[np.float64]

STEP_FEATURES: Mapping[str, float] = {
    "launch_share": 0.25,
    "tp_share": 0.1,
    "optimizer_share": 0.1,
    "dp_share": 0.05,
    "bubble_share": 0.15,
    "matmul_share": 0.15,
    "batched_share": 0.1,
    "softmax_share": 0.05,
    "elementwise_share": 0.1,
    "log_operator_us": 0.7,
    "log_run_us": 0.5,
    "log_tp": 0.7,
    "log_stages": 0.7,
    "log_microbatches": 1.0,
    "log_flop_per_s": 0.5,
    "log_bytes_per_s": 0.5,
    "log_devices": 2.0,
    "gather_share": 0.05,
}
"""Name to the unit it is counted in. Shares of launches and of tensor parallel communication are of
compute and both; those of optimizer, data parallel communication, bubble and ZeRO-3 gathers of the
step; those of families of the time of operators. ``log_operator_us``: mean time of an operator on
the device, ``log_run_us`` with launches and communication. Rates are the device's data sheet's."""

_OF_FRAMEWORK = frozenset({"host", "data_loading", "stragglers", CORRECTION_CAUSE})
"""Causes that are no work: shares are of the step without them."""
_LEFT_WITHOUT_TRUST, _LEFT_WITH_TRUST = 0.6, 0.2
_LEAST = 1e-12


def step_features(shape: StepShape) -> FloatArray:
    """(F,) of one step."""
    seconds = {
        name: float(value) for name, value in shape.breakdown_s.items() if name not in _OF_FRAMEWORK
    }
    step_s = max(sum(seconds.values()), _LEAST)
    of_work = ("compute", "launch", "tp_communication")
    work_s = max(sum(seconds.get(name, 0.0) for name in of_work), _LEAST)
    device_s, runs = max(float(shape.family_s.sum()), _LEAST), max(shape.num_runs, 1.0)
    stretch = device_s / max(seconds.get("compute", 0.0), _LEAST)

    def share(*families: Family) -> float:
        return float(shape.family_s[list(families)].sum()) / device_s

    return np.array(
        [
            seconds.get("launch", 0.0) / work_s,
            seconds.get("tp_communication", 0.0) / work_s,
            seconds.get("optimizer", 0.0) / step_s,
            seconds.get("dp_communication", 0.0) / step_s,
            seconds.get("bubble", 0.0) / step_s,
            share(Family.MATMUL),
            share(Family.BATCHED_MATMUL, Family.ATTENTION, Family.ATTENTION_BACKWARD),
            share(Family.SOFTMAX, Family.SOFTMAX_BACKWARD),
            share(Family.ELEMENTWISE),
            math.log(device_s / runs * 1e6),
            math.log(work_s * stretch / runs * 1e6),
            math.log(shape.tp),
            math.log(shape.num_stages),
            math.log(shape.num_microbatches),
            math.log(shape.peak_flop_per_s / 1e14),
            math.log(shape.memory_bytes_per_s / 1e12),
            math.log(shape.num_devices),
            seconds.get("zero_gather", 0.0) / step_s,
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """Factors of N steps."""

    factor: FloatArray
    """(N,) within ``MAX_FACTOR`` of 1."""
    log_spread: FloatArray
    """(N,) standard deviation of its logarithm."""
    trust: FloatArray
    """(N,) from 0, far from all that was fitted on, to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCorrection:
    """A fitted process (module docstring)."""

    points: FloatArray
    """(S, F) features in their units over their length scales."""
    weights: FloatArray
    """(S,)"""
    inverse: FloatArray
    """(S, S) inverse of the covariance of what was measured."""
    length: FloatArray
    """(F,) in units of ``STEP_FEATURES``."""
    amplitude: float
    noise: float
    offset: float

    def __call__(self, features_NF: FloatArray, *, is_shrunk: bool = True) -> Corrected:
        """Factors of N steps; without ``is_shrunk`` they count in full everywhere."""
        cross_NS = matern(scaled(features_NF, self.length), self.points) * self.amplitude**2
        explained_N = ((cross_NS @ self.inverse) * cross_NS).sum(axis=1)
        left_N = np.clip(1.0 - explained_N / self.amplitude**2, 0.0, 1.0)
        trust_N = (_LEFT_WITHOUT_TRUST - left_N) / (_LEFT_WITHOUT_TRUST - _LEFT_WITH_TRUST)
        trust_N = np.clip(trust_N, 0.0, 1.0)
        log_factor_N = cross_NS @ self.weights + self.offset
        if is_shrunk:
            log_factor_N = trust_N * log_factor_N
        most = math.log(MAX_FACTOR)
        return Corrected(
            factor=np.exp(np.clip(log_factor_N, -most, most)),
            log_spread=np.sqrt(
                self.amplitude**2 * left_N
                + self.noise**2
                + ((1.0 - trust_N) * self.offset) ** 2 * is_shrunk
            ),
            trust=trust_N,
        )

    @classmethod
    def of(
        cls,
        features_SF: FloatArray,
        log_ratio_S: FloatArray,
        *,
        length: FloatArray,
        amplitude: float,
        noise: float,
    ) -> StepCorrection:
        """The process through measured steps; ``log_ratio_S`` is log(measured / predicted)."""
        points = scaled(features_SF, length)
        covariance = amplitude**2 * matern(points, points)
        covariance[np.diag_indices_from(covariance)] += noise**2
        inverse: FloatArray = np.asarray(np.linalg.inv(covariance), np.float64)
        total = inverse.sum()
        offset = float((inverse @ log_ratio_S).sum() / total) if total > 0 else 0.0
        return cls(
            points=points,
            weights=inverse @ (log_ratio_S - offset),
            inverse=inverse,
            length=np.asarray(length, np.float64),
            amplitude=amplitude,
            noise=noise,
            offset=offset,
        )

    def taught_again(self, features_SF: FloatArray, log_ratio_S: FloatArray) -> StepCorrection:
        """The process with its length scales, amplitude and noise through other steps."""
        return StepCorrection.of(
            features_SF,
            log_ratio_S,
            length=self.length,
            amplitude=self.amplitude,
            noise=self.noise,
        )

    def left_out(self) -> tuple[FloatArray, FloatArray]:
        """(S,) errors of log factors, each step predicted from all others, and their spreads."""
        own = np.diag(self.inverse)
        return self.weights / own, np.sqrt(1.0 / own)


def scaled(features_NF: FloatArray, length_F: FloatArray) -> FloatArray:
    """(N, F) in their units over length scales."""
    return features_NF / (np.array(list(STEP_FEATURES.values())) * length_F)


def matern(one_NF: FloatArray, other_SF: FloatArray) -> FloatArray:
    """(N, S) correlations of smoothness 5/2."""
    squares = (one_NF**2).sum(1)[:, None] + (other_SF**2).sum(1) - 2 * one_NF @ other_SF.T
    far = np.sqrt(5.0 * np.maximum(squares, 0.0))
    return np.asarray((1 + far + far**2 / 3) * np.exp(-far))


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedSteps:
    """A correction with intervals: a ``cost.pricing.StepCorrector``."""

    model: StepCorrection
    half_width_scale: float
    """What ``log_spread`` is multiplied with for a 90 % interval."""

    def step(self, shape: StepShape) -> Correction:
        """See ``StepCorrector``."""
        found = self.model(step_features(shape)[None])
        return Correction(
            factor=float(found.factor[0]),
            trust=float(found.trust[0]),
            log_half_width=float(self.half_width_scale * found.log_spread[0]),
        )
