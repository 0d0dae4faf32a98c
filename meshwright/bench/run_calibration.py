"""Measured runs as material for the calibration of a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.bench.clusters import cluster_of
from meshwright.bench.predict import Predictor, RunPrediction
from meshwright.bench.runs import MeasuredRun, Skipped
from meshwright.cluster import parse_cluster
from meshwright.cost.choice import CORRECTION_CAUSE
from meshwright.cost.pricing import Pricing
from meshwright.errors import PlannerError
from meshwright.gnn_cost.calibrate import MeasuredPart, step_prediction
from meshwright.records import StepReport

__all__ = ["CalibrationRuns", "part_of_reports", "parts_of_runs"]

_OPERATORS = ("compute", "optimizer", "clipping")
_COLLECTIVES = ("tp_communication", "zero_gather", "dp_communication", "pipeline_transfer")
_IN_PROPORTION = ("bubble", "stragglers", "data_loading", CORRECTION_CAUSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRuns:
    """What runs gave."""

    parts: dict[str, MeasuredPart]
    """By name of the device."""
    skipped: tuple[Skipped, ...]


def parts_of_runs(runs: Sequence[MeasuredRun], pricing: Pricing) -> CalibrationRuns:
    """Steps that were timed, by device, as ``pricing`` predicts them.

    Bubbles and what else waits for work grow with it; launches and what the framework adds do not.
    """
    predictor = Predictor(pricing)
    found: dict[str, list[tuple[float, RunPrediction]]] = {}
    skipped: list[Skipped] = []
    for run in runs:
        measured_s = run.measured_s
        if measured_s is None:
            skipped.append(Skipped(run_id=run.run_id, reason="no step time was measured"))
            continue
        predicted = predictor.predict(run)
        if isinstance(predicted, Skipped):
            skipped.append(predicted)
            continue
        devices = cluster_of(run)[0].devices
        if len(devices) > 1:
            skipped.append(Skipped(run_id=run.run_id, reason="on several types of device"))
            continue
        found.setdefault(devices[0].name, []).append((measured_s, predicted))
    return CalibrationRuns(
        parts={device: _part(items) for device, items in found.items()}, skipped=tuple(skipped)
    )


def _part(items: Sequence[tuple[float, RunPrediction]]) -> MeasuredPart:
    def sums(causes: Sequence[str]) -> np.ndarray:
        return np.array(
            [sum(one.breakdown.get(cause, 0.0) for cause in causes) for _, one in items]
        )

    operators_s, collectives_s = sums(_OPERATORS), sums(_COLLECTIVES)
    grown = 1 + sums(_IN_PROPORTION) / np.maximum(operators_s + collectives_s, 1e-12)
    total_s = np.array([one.step_time_s for _, one in items])
    operators_s, collectives_s = operators_s * grown, collectives_s * grown
    return MeasuredPart(
        predict=step_prediction(
            operators_s=operators_s,
            collectives_s=collectives_s,
            rest_s=np.maximum(total_s - operators_s - collectives_s, 0.0),
        ),
        measured_s=np.array([measured_s for measured_s, _ in items]),
    )


def part_of_reports(reports: Sequence[StepReport]) -> CalibrationRuns:
    """Reports of ``meshwright run`` that say what was predicted, by device.

    What was predicted must come from the same weights without a calibration. A report does not say
    what its time was spent on, so operators and collectives move alike.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    skipped: list[Skipped] = []
    for report in reports:
        try:
            devices = parse_cluster(report.cluster).devices
        except PlannerError as error:
            skipped.append(Skipped(run_id=report.plan_sha256[:12], reason=str(error)))
            continue
        if report.predicted is None or "learned" not in report.predicted.source:
            reason = "says no prediction by learned prices; plan with these weights and run again"
        elif len(devices) > 1:
            reason = "on several types of device"
        else:
            measured_s = report.step_time.median_s
            found.setdefault(devices[0].name, []).append((measured_s, report.predicted.step_time_s))
            continue
        skipped.append(Skipped(run_id=report.plan_sha256[:12], reason=reason))
    parts = {}
    for device, times in found.items():
        measured_s, predicted_s = np.array(times).T
        half_s = predicted_s / 2
        predict = step_prediction(
            operators_s=half_s, collectives_s=half_s, rest_s=np.zeros(len(half_s))
        )
        parts[device] = MeasuredPart(predict=predict, measured_s=measured_s)
    return CalibrationRuns(parts=parts, skipped=tuple(skipped))
