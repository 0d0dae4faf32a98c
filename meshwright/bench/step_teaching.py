"""What measured runs teach of steps like them: a correction that harms no source it never saw.

A source teaches where it has ``_LEAST_RUNS`` runs and its own jobs, left out in folds, get better.
Then each source, also those that teach nothing, is left out in turn, and what the others teach is
judged on it, by error and by regret within its jobs. How far steps of one shape, device or cluster
tell of others is cut back until no source gets worse; where none of ``SHAPE_LENGTHS`` is short
enough, nothing is taught.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshwright.bench.regret import regret
from meshwright.bench.step_figures import TimedRuns
from meshwright.gnn_cost.steps.document import StepsDocument, document_of
from meshwright.gnn_cost.steps.fit import SHAPE_LENGTHS, fit_step_correction, half_width_scale
from meshwright.strict_json import JsonValue

__all__ = ["LeftOut", "Taught", "mean_regret", "teach"]

FloatArray = NDArray[np.float64]
TextArray = NDArray[np.str_]

_LEAST_RUNS = 30
"""Of a source; of fewer nobody can tell whether they speak for others."""
_NUM_FOLDS = 5
_TOLERATED = 0.002
"""By which the error or the regret of a source left out may rise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A source by what others teach, and without that."""

    num_runs: int
    mape: tuple[float, float]
    """Without and with the correction."""
    regret: tuple[float, float]
    mean_trust: float

    @property
    def is_harmed(self) -> bool:
        """Whether error or regret rose."""
        return any(after > before + _TOLERATED for before, after in (self.mape, self.regret))

    def to_json(self) -> dict[str, JsonValue]:
        """For reports."""
        return {
            "n": self.num_runs,
            "mape_without": self.mape[0],
            "mape_with": self.mape[1],
            "regret_without": self.regret[0],
            "regret_with": self.regret[1],
            "mean_trust": self.mean_trust,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """What runs taught."""

    document: StepsDocument | None = None
    """``None``: no source teaches, or they would harm one left out."""
    shape_length: float | None = None
    by_job: Mapping[str, LeftOut] = field(default_factory=dict)
    """Sources with enough runs, their jobs left out in folds."""
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    """All sources, each left out whole; of the shortest length that was tried."""

    def to_json(self) -> dict[str, JsonValue]:
        """For reports."""
        return {
            "is_taught": self.document is not None,
            "shape_length": self.shape_length,
            "jobs_left_out": {source: one.to_json() for source, one in self.by_job.items()},
            "source_left_out": {source: one.to_json() for source, one in self.left_out.items()},
        }


def teach(
    runs: TimedRuns,
    features_NF: FloatArray,
    predicted_s: FloatArray,
    levels: Sequence[TextArray],
    *,
    seed: int = 0,
) -> Taught:
    """Fit a correction of ``predicted_s``.

    Args:
        runs: N measured ones.
        features_NF: of ``step_features``.
        predicted_s: (N,) with the figures that go with the correction.
        levels: (N,) each; ``half_width_scale`` leaves out one of each in turn.
        seed: of draws.
    """
    log_ratio = np.log(runs.measured_s / predicted_s)
    by_job = _jobs_left_out(runs, features_NF, predicted_s, seed)
    teaches = np.isin(runs.source, [name for name, one in by_job.items() if not one.is_harmed])
    if not teaches.any():
        return Taught(by_job=by_job)
    left_out: dict[str, LeftOut] = {}
    for length in SHAPE_LENGTHS:
        left_out = _sources_left_out(runs, features_NF, predicted_s, teaches, length, seed)
        if any(one.is_harmed for one in left_out.values()):
            continue
        features, ratio = features_NF[teaches], log_ratio[teaches]
        model = fit_step_correction(features, ratio, seed=seed, shape_length=length)
        scale = half_width_scale(model, features, ratio, [one[teaches] for one in levels])
        document = document_of(model, features, ratio, half_width_scale=scale)
        return Taught(document=document, shape_length=length, by_job=by_job, left_out=left_out)
    return Taught(by_job=by_job, left_out=left_out)


def _jobs_left_out(
    runs: TimedRuns, features_NF: FloatArray, predicted_s: FloatArray, seed: int
) -> dict[str, LeftOut]:
    """Each source by its own other jobs."""
    found = {}
    for source in np.unique(runs.source):
        own = runs.where(runs.source == source)
        if len(own) < _LEAST_RUNS:
            continue
        features, own_s = features_NF[runs.source == source], predicted_s[runs.source == source]
        log_ratio = np.log(own.measured_s / own_s)
        model = fit_step_correction(features, log_ratio, seed=seed)
        jobs, inverse = np.unique(own.job, return_inverse=True)
        order = np.random.default_rng([seed, len(jobs)]).permutation(len(jobs))
        fold = (order % _NUM_FOLDS)[inverse]
        factor, trust = np.ones(len(own)), np.zeros(len(own))
        for number in np.unique(fold):
            test = fold == number
            if (~test).sum() >= 3:
                other = model.taught_again(features[~test], log_ratio[~test])(features[test])
                factor[test], trust[test] = other.factor, other.trust
        found[str(source)] = _judged(own, own_s, factor, trust)
    return found


def _sources_left_out(
    runs: TimedRuns,
    features_NF: FloatArray,
    predicted_s: FloatArray,
    teaches: NDArray[np.bool_],
    length: float,
    seed: int,
) -> dict[str, LeftOut]:
    """Each source by those others that teach."""
    log_ratio = np.log(runs.measured_s / predicted_s)
    found = {}
    for source in np.unique(runs.source):
        test = runs.source == source
        others = teaches & ~test
        if others.any():
            model = fit_step_correction(
                features_NF[others], log_ratio[others], seed=seed, shape_length=length
            )
            by = model(features_NF[test])
            found[str(source)] = _judged(runs.where(test), predicted_s[test], by.factor, by.trust)
    return found


def _judged(
    runs: TimedRuns, predicted_s: FloatArray, factor: FloatArray, trust: FloatArray
) -> LeftOut:
    both = predicted_s, predicted_s * factor
    errors = [float(np.abs(one / runs.measured_s - 1).mean()) for one in both]
    regrets = [mean_regret(one, runs.measured_s, runs.job) for one in both]
    return LeftOut(
        num_runs=len(runs),
        mape=(errors[0], errors[1]),
        regret=(regrets[0], regrets[1]),
        mean_trust=float(trust.mean()),
    )


def mean_regret(predicted_s: FloatArray, measured_s: FloatArray, job: TextArray) -> float:
    """Of the plan that is predicted the fastest, over jobs with several; 0 without any."""
    found = []
    for name in np.unique(job):
        own = job == name
        if own.sum() > 1:
            scores = [(one,) for one in predicted_s[own].tolist()]
            found.append(regret(measured_s[own].tolist(), scores, num_tries=1))
    return float(np.mean(found)) if found else 0.0
