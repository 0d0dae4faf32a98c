"""Figures that a framework adds to operators and collectives, fitted to measured runs.

Those a predicted step is linear in::

    step_s = (other_s + optimizer_traffic optimizer_s
              + num_microbatches host_s_per_microbatch + host_s_per_step)
             (1 + data_loading_share + straggler_share log2(devices))

by least squares of log(measured / step_s) with Cauchy weights, every source and GPU weighing the
same, and a prior around the defaults that a handful of runs of one source cannot overrule. Figures
stay within the bounds of ``Calibration``. How fast the host launches is not among them: it is the
software's of each run (``bench.software``), and not ours.

What comes with the package must hold for software nobody measured yet: ``chosen_figures`` takes
only figures that predict sources left out better than the defaults do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.bench.run_graphs import RunGraphs
from meshwright.cost.calibration import Calibration
from meshwright.strict_json import JsonValue

__all__ = [
    "FIGURES",
    "FigureChoice",
    "StepFit",
    "TimedRuns",
    "chosen_figures",
    "fit_figures",
    "joined",
    "timed_runs",
]

FloatArray = NDArray[np.float64]
TextArray = NDArray[np.str_]

FIGURES: Mapping[str, tuple[float, float]] = {
    "optimizer_traffic": (1.0, 0.3),
    "host_s_per_microbatch": (0.0, 0.003),
    "host_s_per_step": (0.0, 0.03),
    "data_loading_share": (0.0, 0.03),
    "straggler_share": (0.0, 0.01),
}
"""What is learned: its default and one standard deviation of its prior."""

_NOISE = 0.1
_WEIGHT_OF_CELL = 10.0
"""Runs of one source and GPU together count as so many."""
_ROUNDS = 30
_LEAST_GAIN = 0.01
"""By which the mean error of sources left out must fall for another figure to enter."""
_MOST_HARM = 2.0
"""How much more than all gain on average a source left out may lose."""
_INTERVAL = (0.05, 0.95)
_MOST_OF_CELL = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRuns:
    """N runs, measured and predicted with the figures' defaults."""

    other_s: FloatArray
    optimizer_s: FloatArray
    num_microbatches: FloatArray
    num_devices: FloatArray
    measured_s: FloatArray
    source: TextArray
    gpu: TextArray
    job: TextArray
    run_id: TextArray

    def __len__(self) -> int:
        """N."""
        return len(self.measured_s)

    def where(self, chosen: NDArray[Any]) -> TimedRuns:
        """Those chosen, by mask."""
        return TimedRuns(**{name: getattr(self, name)[chosen] for name in self.__slots__})

    def predicted_s(self, figures: FloatArray) -> FloatArray:
        """Step times with figures in the order of ``FIGURES``; (N,)."""
        optimizer, microbatch, step, loading, straggler = figures
        work_s = self.other_s + optimizer * self.optimizer_s
        work_s = work_s + microbatch * self.num_microbatches + step
        return np.asarray(work_s * (1 + loading + straggler * np.log2(self.num_devices)))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFit:
    """What a fit of figures gives."""

    values: Mapping[str, float]

    def predicted_s(self, runs: TimedRuns) -> FloatArray:
        """Step times; (N,)."""
        return runs.predicted_s(np.array([self.values[name] for name in FIGURES]))


def fit_figures(runs: TimedRuns, names: Collection[str] = FIGURES) -> StepFit:
    """Figures of ``names`` that explain ``runs``; what they do not tell of stays at its default."""
    default = np.array([mean for mean, _ in FIGURES.values()])
    deviation = np.array([spread for _, spread in FIGURES.values()])
    bounds = [Calibration.bounds()[name] for name in FIGURES]
    is_free = np.array([name in names for name in FIGURES])
    low = np.where(is_free, [one.low for one in bounds], default)
    high = np.where(is_free, [one.high for one in bounds], default)
    theta = default.copy()
    if not len(runs):
        return StepFit(values=dict(zip(FIGURES, theta.tolist(), strict=True)))
    cell = np.char.add(np.char.add(runs.source, "|"), runs.gpu)
    _, inverse, counts = np.unique(cell, return_inverse=True, return_counts=True)
    balance = np.minimum(1.0, _WEIGHT_OF_CELL / counts)[inverse]

    def loss(at: FloatArray) -> float:
        error = np.log(runs.measured_s / runs.predicted_s(at)) / _NOISE
        prior = (((at - default) / deviation) ** 2).sum()
        return float((balance * np.log1p((error / 3) ** 2) * 9).sum() + prior)

    best = loss(theta)
    for _ in range(_ROUNDS):
        left = np.log(runs.measured_s / runs.predicted_s(theta))
        weight = balance / (1 + (left / (3 * _NOISE)) ** 2) / _NOISE**2
        moves = deviation * 1e-3
        slopes = np.stack(
            [
                (np.log(runs.predicted_s(theta + move * unit)) - np.log(runs.predicted_s(theta)))
                / move
                for move, unit in zip(moves, np.eye(len(theta)), strict=True)
            ],
            axis=1,
        )
        slopes = slopes * is_free
        normal = (slopes * weight[:, None]).T @ slopes + np.diag(deviation**-2)
        gradient = (slopes * weight[:, None]).T @ left - (theta - default) / deviation**2
        step = np.linalg.solve(normal, gradient)
        before = best
        for scale in (1.0, 0.3, 0.1, 0.03):
            tried = np.clip(theta + scale * step, low, high)
            if loss(tried) < best:
                theta, best = tried, loss(tried)
                break
        if before - best < 1e-9 * (1 + abs(before)):
            break
    return StepFit(values=dict(zip(FIGURES, theta.tolist(), strict=True)))


def timed_runs(found: RunGraphs) -> TimedRuns:
    """Priced runs as figures are fitted on."""
    labels = found.graphs.labels
    optimizer_s = found.breakdown_s["optimizer"]
    return TimedRuns(
        other_s=found.predicted_s - optimizer_s,
        optimizer_s=optimizer_s,
        num_microbatches=found.num_microbatches,
        num_devices=np.array([float(run.gpus or 1) for run in found.runs]),
        measured_s=found.graphs.time_s,
        source=labels["source"],
        gpu=labels["gpu"],
        job=labels["job"],
        run_id=labels["run_id"],
    )


def joined(parts: Iterable[TimedRuns]) -> TimedRuns:
    """All of them, one after the other; at least one."""
    every = list(parts)
    names = TimedRuns.__slots__
    return TimedRuns(
        **{name: np.concatenate([getattr(one, name) for one in every]) for name in names}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureChoice:
    """Which figures help sources left out."""

    fit: StepFit
    """Of the figures that help, on all sources."""
    names: tuple[str, ...]
    interval: tuple[float, float]
    """Quantiles of measured over predicted of sources left out, all sources weighing the same."""
    errors: Mapping[str, Mapping[str, float]]
    """MAPE of each source left out: ``default``, ``all`` figures, and those ``chosen``."""

    def to_json(self) -> dict[str, JsonValue]:
        """For reports."""
        return {
            "chosen": list(self.names),
            "values": dict(self.fit.values),
            "interval": list(self.interval),
            "mape_of_source_left_out": {name: dict(one) for name, one in self.errors.items()},
        }


def chosen_figures(runs: TimedRuns) -> FigureChoice:
    """The figures worth learning for everyone: the most that help sources left out.

    Figures count where they lower the mean error over the sources, and no source loses more than
    twice what all gain on average.
    """
    default = _left_out_errors(runs, ())
    best: tuple[str, ...] = ()
    best_errors = default
    for count in range(1, len(FIGURES) + 1):
        for names in combinations(FIGURES, count):
            errors = _left_out_errors(runs, names)
            gain = _mean(best_errors) - _mean(errors)
            harm = max(errors[source] - default[source] for source in errors)
            if gain > _LEAST_GAIN and harm <= _MOST_HARM * (_mean(default) - _mean(errors)):
                best, best_errors = names, errors
    every = _left_out_errors(runs, tuple(FIGURES))
    return FigureChoice(
        fit=fit_figures(runs, best),
        names=best,
        interval=_left_out_interval(runs, best),
        errors={
            source: {"default": default[source], "all": every[source], "chosen": error}
            for source, error in best_errors.items()
        },
    )


def _mean(errors: Mapping[str, float]) -> float:
    return float(np.mean(list(errors.values())))


def _left_out_s(runs: TimedRuns, names: Collection[str]) -> FloatArray:
    """Each run by figures fitted on other sources."""
    predicted_s = np.zeros(len(runs))
    for source in np.unique(runs.source):
        test = runs.source == source
        predicted_s[test] = fit_figures(runs.where(~test), names).predicted_s(runs.where(test))
    return predicted_s


def _left_out_errors(runs: TimedRuns, names: Collection[str]) -> dict[str, float]:
    error = np.abs(_left_out_s(runs, names) / runs.measured_s - 1)
    return {str(one): float(error[runs.source == one].mean()) for one in np.unique(runs.source)}


def _left_out_interval(runs: TimedRuns, names: Collection[str]) -> tuple[float, float]:
    """All sources weigh the same, but those of few runs no more than ``_MOST_OF_CELL`` do."""
    if not len(runs):
        return (1.0, 1.0)
    ratio = runs.measured_s / _left_out_s(runs, names)
    _, inverse, counts = np.unique(runs.source, return_inverse=True, return_counts=True)
    weight = np.minimum(1.0, _MOST_OF_CELL / counts)[inverse]
    order = np.argsort(ratio)
    share = (np.cumsum(weight[order]) - weight[order] / 2) / weight.sum()
    low, high = np.interp(_INTERVAL, share, ratio[order])
    return min(float(low), 1.0), max(float(high), 1.0)
