"""Fitting the constants of ``collective_terms`` to measurements: robust, with priors and effects.

Least squares of the logarithm of time, by Levenberg and Marquardt, with Cauchy weights (a row that
is off by much counts little) and every group of ranks weighing at most as much as
``_ROWS_OF_A_GROUP`` rows. Constants have normal priors, which only matter where data say little;
the effects of systems are drawn toward none. What a source adds by its way of measuring (launches
of the host, copies around the call) is an effect of the source and never part of a price.

How far the result is to be trusted on systems that were not measured, and how wide its intervals
are, is measured by leaving every system out in turn (``collective_splits``).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from meshwright.gnn_cost.collectives.model import Groups, best_time_s, curves
from meshwright.gnn_cost.collectives.samples import CollectiveSamples
from meshwright.gnn_cost.collectives.terms import (
    EFFECTS,
    KIND_EFFECTS,
    PRIORS,
    CollectiveConstants,
    effects_of,
    terms_of,
)

__all__ = ["fit_constants", "predicted_time_s"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_ROWS_OF_A_GROUP = 16
_SCALE = 0.07
"""Relative error of a good row; the scale of the Cauchy weights is twice that."""
_LAUNCH_PRIOR = (math.log(3e-6), 1.5)
_STEADY_SOURCES = ("aiconfigurator_nccl",)
"""Sources that time collectives back to back: nothing of the host is in their figures."""


def fit_constants(
    samples: CollectiveSamples, *, seed: int = 0, max_iterations: int = 40
) -> CollectiveConstants:
    """Constants and effects fitted to ``samples``.

    Args:
        samples: thinned to about one row for each size of a group.
        seed: of the order in which rows of large groups are chosen; nothing else is random.
        max_iterations: of the least squares.
    """
    samples = _capped(samples, np.random.default_rng(seed))
    layout = _Layout(samples)
    groups = samples.features()
    log_time = np.log(samples.time_s)
    counts = np.bincount(samples.group, minlength=len(samples.groups))
    weight = np.sqrt(np.minimum(1.0, _ROWS_OF_A_GROUP / np.maximum(counts, 1)))[samples.group]

    def residuals(theta: FloatArray) -> FloatArray:
        predicted = layout.time_s(theta, groups, samples.num_bytes)
        return np.asarray(np.log(predicted) - log_time)

    theta = _least_squares(
        residuals, layout.mean, layout.deviation, weight, max_iterations=max_iterations
    )
    return layout.constants(theta)


def _capped(samples: CollectiveSamples, rng: np.random.Generator) -> CollectiveSamples:
    """At most four times ``_ROWS_OF_A_GROUP`` rows of each group."""
    order = rng.permutation(samples.count)
    ranked = order[np.argsort(samples.group[order], kind="stable")]
    first = np.searchsorted(samples.group[ranked], samples.group[ranked])
    kept = np.zeros(samples.count, dtype=bool)
    kept[ranked[np.arange(samples.count) - first < 4 * _ROWS_OF_A_GROUP]] = True
    return samples.where(kept)


def predicted_time_s(
    constants: CollectiveConstants, samples: CollectiveSamples, *, as_measured: bool = True
) -> FloatArray:
    """(N,) what ``constants`` make of ``samples``.

    Args:
        constants: of a fit.
        samples: N measurements; their times are not looked at.
        as_measured: with what the sources' ways of measuring add, where the fit has seen them.
    """
    kinds, sources = samples.labels("kind").tolist(), samples.labels("source").tolist()
    effects = effects_of(constants, samples.labels("system").tolist(), kinds)
    groups = samples.features()
    found = curves(groups, terms_of(constants.values, groups, effects))
    time_s = best_time_s(found, samples.num_bytes)
    if as_measured:
        keys = (f"{source}|{kind}" for source, kind in zip(sources, kinds, strict=True))
        time_s = time_s + np.array([constants.launch_s.get(key, 0.0) for key in keys])
    return time_s


class _Layout:
    """Where each number of a fit stands in its vector."""

    def __init__(self, samples: CollectiveSamples) -> None:
        names = list(PRIORS)
        prior = list(PRIORS.values())
        systems, kinds = samples.labels("system"), samples.labels("kind")
        sources = samples.labels("source")
        self.rows: dict[str, IntArray] = {}
        """By effect, (N,) place in the vector, or -1."""
        for effect, deviation in EFFECTS.items():
            self._add(names, prior, f"{effect}", systems, deviation)
        joint = np.char.add(np.char.add(systems, "|"), kinds)
        for effect, deviation in KIND_EFFECTS.items():
            self._add(names, prior, f"{effect}.", joint, deviation)
        launch = np.char.add(np.char.add(sources, "|"), kinds)
        steady = np.isin(sources, _STEADY_SOURCES)
        launch = np.where(steady, "", launch)
        self._add(names, prior, "launch", launch, _LAUNCH_PRIOR[1], mean=_LAUNCH_PRIOR[0])
        self.names = names
        self.mean = np.array([mean for mean, _ in prior])
        self.deviation = np.array([deviation for _, deviation in prior])

    def _add(
        self,
        names: list[str],
        prior: list[tuple[float, float]],
        effect: str,
        labels: NDArray[np.str_],
        deviation: float,
        *,
        mean: float = 0.0,
    ) -> None:
        unique, place = np.unique(labels, return_inverse=True)
        where = np.full(len(unique), -1)
        for index, label in enumerate(unique):
            if label:
                where[index] = len(names)
                names.append(f"{effect}@{label}")
                prior.append((mean, deviation))
        self.rows[effect] = where[place.ravel()]

    def effect(self, theta: FloatArray, name: str) -> FloatArray:
        """(N,) one effect of each row, 0 where it has none."""
        rows = self.rows[name]
        return np.where(rows >= 0, theta[rows], 0.0)

    def time_s(self, theta: FloatArray, groups: Groups, num_bytes: FloatArray) -> FloatArray:
        values = dict(zip(PRIORS, theta, strict=False))
        effects = {
            name: self.effect(theta, name)
            + (self.effect(theta, f"{name}.") if name in KIND_EFFECTS else 0.0)
            for name in EFFECTS
        }
        time_s = best_time_s(curves(groups, terms_of(values, groups, effects)), num_bytes)
        rows = self.rows["launch"]
        return time_s + np.where(rows >= 0, np.exp(theta[rows]), 0.0)

    def constants(self, theta: FloatArray) -> CollectiveConstants:
        effects: dict[str, dict[str, float]] = {}
        launch_s: dict[str, float] = {}
        for name, value in zip(self.names[len(PRIORS) :], theta[len(PRIORS) :], strict=True):
            effect, _, label = name.partition("@")
            if effect == "launch":
                launch_s[label] = float(np.exp(value))
            else:
                system, _, kind = label.partition("|")
                effects.setdefault(system, {})[f"{effect}{kind}"] = float(value)
        values = {name: float(value) for name, value in zip(PRIORS, theta, strict=False)}
        return CollectiveConstants(values=values, effects=effects, launch_s=launch_s)


def _least_squares(
    residuals: Callable[[FloatArray], FloatArray],
    mean: FloatArray,
    deviation: FloatArray,
    weight: FloatArray,
    *,
    max_iterations: int,
) -> FloatArray:
    """The vector nearest to data and prior."""
    theta, damping = mean.copy(), 1e-2
    current = residuals(theta)

    def loss(r: FloatArray, at: FloatArray) -> float:
        cauchy = np.log1p((r / (2 * _SCALE)) ** 2) * 2
        return float((weight**2 * cauchy).sum() + (((at - mean) / deviation) ** 2).sum() / 2)

    best = loss(current, theta)
    for _ in range(max_iterations):
        step = 1e-4
        jacobian = np.empty((len(current), len(theta)))
        for column in range(len(theta)):
            moved = theta.copy()
            moved[column] += step
            jacobian[:, column] = (residuals(moved) - current) / step
        scale = weight**2 / (1 + (current / (2 * _SCALE)) ** 2) / _SCALE**2
        normal = (jacobian * scale[:, None]).T @ jacobian + np.diag(deviation**-2)
        gradient = (jacobian * scale[:, None]).T @ current + (theta - mean) / deviation**2
        before = best
        for _ in range(12):
            move = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
            tried = theta + np.clip(move, -1.0, 1.0)
            found = residuals(tried)
            if np.isfinite(found).all() and loss(found, tried) < best:
                theta, current, best = tried, found, loss(found, tried)
                damping = max(damping / 5, 1e-7)
                break
            damping *= 4
        if before - best < 1e-4 * abs(before):
            break
    return theta
