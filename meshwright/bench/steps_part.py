"""The steps' part of a fit: what a framework adds to operators and collectives, from measured runs.

Operators and collectives are priced as fitted before; each run is predicted once, and the figures
are those of ``step_figures``. The interval of step times is that of runs left out in five folds,
jobs kept together; each source is also left out whole (``"without source: NAME"``). On top of the
figures comes what measured steps say of others like them (``step_teaching``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshwright.bench.predict import Predictor
from meshwright.bench.run_table import read_runs
from meshwright.bench.runs import MeasuredRun, Skipped
from meshwright.bench.step_figures import TimedRuns, fit_figures
from meshwright.bench.step_teaching import teach
from meshwright.cost.calibration import DEFAULTS, Origin
from meshwright.cost.pricing import ANALYTIC_INTERVAL, Pricing
from meshwright.gnn_cost.collectives import LearnedCollectives, parse_collectives
from meshwright.gnn_cost.fitting import (
    FitData,
    PartContext,
    PartResult,
    SplitError,
    WorstCases,
)
from meshwright.gnn_cost.predictor import LearnedOperators, makers_fitted
from meshwright.gnn_cost.pretrained_pricing import STEPS_NAME, StepFigures
from meshwright.gnn_cost.steps.correction import step_features
from meshwright.strict_json import JsonValue
from meshwright.tracking import read_lines

__all__ = ["StepsPart"]

FloatArray = NDArray[np.float64]

_NUM_FOLDS = 5
_INTERVAL = (0.05, 0.95)
_NUM_WORST = 50
_LEVELS = ("gpus", "layers", "pp")
"""What steps to come will have other values of than those that were measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsPart:
    """Fits ``steps.json``."""

    name: str = "steps"
    budget_weight: float = 2.0
    uses_others: bool = True
    runs_per_cell: int = 40
    """Most runs of one source and GPU, drawn by the seed."""

    def reason_to_skip(self, data: FitData) -> str:
        """See ``Part``."""
        return "" if data.runs else "no tables of measured runs; give --tables with one"

    def fit(self, data: FitData, context: PartContext) -> PartResult:
        """See ``Part``."""
        chosen = self._chosen(data, context.settings.seed)
        found = _predicted(chosen, _pricing(context), context)
        runs = _timed(found.rows)
        fitted = fit_figures(runs)
        errors = _judged(runs)
        predicted_s, interval = _in_folds(runs)
        if len(runs):
            errors.insert(0, _error("five folds by job", "all", runs, predicted_s, interval))
        calibration = DEFAULTS.with_figures(Origin.LEARNED, **fitted.values)
        taught = teach(
            runs,
            np.array([row["features"] for row in found.rows], np.float64).reshape(len(runs), -1),
            fitted.predicted_s(runs),
            [np.array([row[name] for row in found.rows], np.str_) for name in _LEVELS],
            seed=context.settings.seed,
        )
        figures = StepFigures(
            calibration=calibration.to_json(),
            interval=interval,
            correction=taught.document,
            data=[source for source in data.sources if source.kind == "runs"],
            licenses={name: text for name, text in data.licenses.items() if name in runs.source},
        )
        return PartResult(
            tensors={},
            settings={},
            documents={STEPS_NAME: msgspec.to_builtins(figures)},
            splits=tuple(errors),
            worst=_worst(runs, predicted_s),
            figures={
                "num_learned_from": len(runs),
                "left_out_runs": len(found.skipped),
                "values": dict(fitted.values),
                "correction": taught.to_json(),
            },
            is_cut=found.is_cut,
        )

    def _chosen(self, data: FitData, seed: int) -> list[MeasuredRun]:
        timed = [run for path in data.runs for run in read_runs(path).runs if run.measured_s]
        order = np.random.default_rng([seed, 11]).permutation(len(timed))
        counts: dict[tuple[str, str], int] = {}
        kept: list[int] = []
        for place in order.tolist():
            cell = (timed[place].source, timed[place].gpu)
            counts[cell] = counts.get(cell, 0) + 1
            if counts[cell] <= self.runs_per_cell:
                kept.append(place)
        # Runs of one model one after another share its captured graph.
        return [timed[place] for place in sorted(kept, key=lambda place: timed[place].job_key)]


def _pricing(context: PartContext) -> Pricing:
    """Of the parts fitted before; analytic where there is none."""
    operators = context.done.get("operators")
    collectives = context.done.get("collectives")
    document = None if collectives is None else collectives.documents.get("collectives.json")
    model = (
        None
        if document is None
        else parse_collectives(json.dumps(document).encode(), name="collectives.json")
    )
    return Pricing(
        name="fitted",
        operators=(
            LearnedOperators(
                tensors=dict(operators.tensors), makers=makers_fitted(operators.figures)
            )
            if operators is not None and operators.tensors
            else None
        ),
        collectives=None if model is None else LearnedCollectives(model),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Predicted:
    rows: list[dict[str, Any]]
    skipped: list[Skipped]
    is_cut: bool


def _predicted(chosen: Sequence[MeasuredRun], pricing: Pricing, context: PartContext) -> _Predicted:
    """Runs with their predicted parts; what a killed fit predicted is not predicted again."""
    path = context.folder / "predicted.jsonl"
    known = {str(row.get("key")): row for row in read_lines(path)[0]}
    predictor = Predictor(pricing)
    rows: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    for place, run in enumerate(chosen):
        if context.left_s() <= 0:
            return _Predicted(rows=rows, skipped=skipped, is_cut=True)
        context.progress(place / len(chosen), f"run {place + 1} of {len(chosen)}")
        key = f"{place} {run.run_id}"
        row = known.get(key) or _row_of(key, run, predictor)
        if key not in known:
            with open(path, "ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
        if row.get("reason"):
            skipped.append(Skipped(run_id=run.run_id, reason=str(row["reason"])))
        else:
            rows.append(row)
    return _Predicted(rows=rows, skipped=skipped, is_cut=False)


def _row_of(key: str, run: MeasuredRun, predictor: Predictor) -> dict[str, Any]:
    found = predictor.shaped(run)
    if isinstance(found, Skipped):
        return {"key": key, "reason": found.reason}
    cost, shape = found
    optimizer_s = float(cost.breakdown_s.get("optimizer", 0.0))
    return {
        "key": key,
        "other_s": float(cost.time_s) - optimizer_s,
        "optimizer_s": optimizer_s,
        "num_microbatches": float(shape.num_microbatches),
        "features": step_features(shape).tolist(),
        **{name: str(getattr(run, name)) for name in _LEVELS},
        "num_devices": float(run.gpus or 1),
        "measured_s": run.measured_s,
        "source": run.source,
        "gpu": run.gpu,
        "job": run.job_key,
        "run_id": run.run_id,
    }


def _timed(rows: Sequence[Mapping[str, Any]]) -> TimedRuns:
    texts = ("source", "gpu", "job", "run_id")
    columns: dict[str, Any] = {
        name: np.array([row[name] for row in rows], np.str_ if name in texts else np.float64)
        for name in TimedRuns.__slots__
    }
    return TimedRuns(**columns)


def _in_folds(runs: TimedRuns) -> tuple[FloatArray, tuple[float, float]]:
    """Times of runs whose job no figure was fitted on, and quantiles of measured over them."""
    jobs, inverse = np.unique(runs.job, return_inverse=True)
    if len(jobs) < _NUM_FOLDS:
        return fit_figures(runs).predicted_s(runs), ANALYTIC_INTERVAL
    fold = (np.random.default_rng(len(jobs)).permutation(len(jobs)) % _NUM_FOLDS)[inverse]
    predicted_s = np.zeros(len(runs))
    for number in range(_NUM_FOLDS):
        test = fold == number
        predicted_s[test] = fit_figures(runs.where(~test)).predicted_s(runs.where(test))
    low, high = np.quantile(runs.measured_s / predicted_s, _INTERVAL)
    return predicted_s, (min(float(low), 1.0), max(float(high), 1.0))


def _judged(runs: TimedRuns) -> list[SplitError]:
    """Each source by figures fitted on the others."""
    found = []
    for source in np.unique(runs.source):
        test = runs.source == source
        predicted_s = fit_figures(runs.where(~test)).predicted_s(runs.where(test))
        found.append(_error(f"without source: {source}", "all", runs.where(test), predicted_s))
    return found


def _error(
    split: str,
    group: str,
    runs: TimedRuns,
    predicted_s: FloatArray,
    interval: tuple[float, float] | None = None,
) -> SplitError:
    ratio = predicted_s / runs.measured_s
    coverage = None
    if interval is not None:
        inside = (1 / ratio >= interval[0]) & (1 / ratio <= interval[1])
        coverage = float(np.mean(inside))
    return SplitError(
        split=split,
        group=group,
        num_samples=len(runs),
        mape=float(np.mean(np.abs(ratio - 1))),
        bias=float(np.mean(ratio - 1)),
        coverage=coverage,
    )


def _worst(runs: TimedRuns, predicted_s: FloatArray) -> WorstCases:
    order = np.argsort(-np.abs(np.log(predicted_s / runs.measured_s)), kind="stable")[:_NUM_WORST]
    rows: list[tuple[JsonValue, ...]] = [
        (
            str(runs.source[place]),
            str(runs.run_id[place]),
            float(runs.measured_s[place]),
            float(predicted_s[place]),
        )
        for place in order
    ]
    return WorstCases(columns=("source", "run_id", "measured_s", "predicted_s"), rows=tuple(rows))
