"""Figures that join prices into steps are found where runs tell, and stay put where they do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meshwright.bench import steps_part
from meshwright.bench.runs import MeasuredRun, Skipped
from meshwright.bench.step_figures import FIGURES, TimedRuns, fit_figures
from meshwright.bench.steps_part import StepsPart
from meshwright.cost.calibration import Calibration
from meshwright.cost.choice import StepCost
from meshwright.cost.memory import StageMemory
from meshwright.cost.pricing import StepShape
from meshwright.cost.work import Family
from meshwright.gnn_cost.fitting import FitData, FitSettings, fit
from meshwright.gnn_cost.pretrained_pricing import load_pricing, read_step_figures
from meshwright.tracking import DataSource, LocalTracker

TRUE = {
    "optimizer_traffic": 1.3,
    "host_s_per_microbatch": 0.004,
    "host_s_per_step": 0.02,
    "data_loading_share": 0.02,
    "straggler_share": 0.005,
}


def runs(count: int, *, seed: int = 0) -> TimedRuns:
    """Measured as ``TRUE`` figures would have it, 1 % noise; ten jobs from each of two sources."""
    rng = np.random.default_rng(seed)
    source = np.array(["a", "b"])[np.arange(count) % 2]
    plain = TimedRuns(
        other_s=rng.uniform(0.05, 2.0, count),
        optimizer_s=rng.uniform(0.005, 0.1, count),
        num_microbatches=2.0 ** rng.integers(0, 7, count),
        num_devices=2.0 ** rng.integers(0, 8, count),
        measured_s=np.ones(count),
        source=source,
        gpu=np.full(count, "a100"),
        job=np.char.add(source, (np.arange(count) // 2 % 10).astype(np.str_)),
        run_id=np.arange(count).astype(np.str_),
    )
    true_s = plain.predicted_s(np.array([TRUE[name] for name in FIGURES]))
    columns = {name: getattr(plain, name) for name in plain.__slots__}
    noise = np.exp(0.01 * rng.standard_normal(count))
    return TimedRuns(**{**columns, "measured_s": true_s * noise})


def mean_error(found: TimedRuns, predicted_s: np.ndarray) -> float:
    return float(np.mean(np.abs(predicted_s / found.measured_s - 1)))


def test_figures_come_near_what_made_the_times() -> None:
    """Judged on runs that were not fitted on; the defaults are 7 % off there or more."""
    fitted = fit_figures(runs(400))
    others = runs(100, seed=5)
    default = others.predicted_s(np.array([mean for mean, _ in FIGURES.values()]))

    assert mean_error(others, default) > 0.07
    assert mean_error(others, fitted.predicted_s(others)) < 0.03
    assert 0.002 < fitted.values["host_s_per_microbatch"] < 0.006


def test_without_runs_every_figure_keeps_its_default() -> None:
    nothing = runs(2).where(np.zeros(2, np.bool_))

    assert {name: mean for name, (mean, _) in FIGURES.items()} == fit_figures(nothing).values


def test_figures_stay_in_bounds_whatever_was_measured() -> None:
    some = runs(50)
    columns = {name: getattr(some, name) for name in some.__slots__}
    for factor in (1e-3, 1e3):
        fitted = fit_figures(TimedRuns(**{**columns, "measured_s": some.measured_s * factor}))

        assert [] == [
            name
            for name, value in fitted.values.items()
            if not Calibration.bounds()[name].low <= value <= Calibration.bounds()[name].high
        ]


def test_one_run_moves_figures_little() -> None:
    one = runs(1)
    fitted = fit_figures(one)

    assert all(
        abs(fitted.values[name] - mean) <= 2 * spread for name, (mean, spread) in FIGURES.items()
    )


class _Predictions:
    """Stands in for the predictor: no graph is captured; every eighth run cannot be modeled."""

    calls = 0

    def __init__(self, pricing: object) -> None:
        del pricing

    def shaped(self, run: MeasuredRun) -> object:
        type(self).calls += 1
        number = int(run.run_id)
        if number % 8 == 0:
            return Skipped(run_id=run.run_id, reason="odd")
        cost = StepCost(
            breakdown_s={"compute": 0.8, "launch": 0.1, "optimizer": 0.1},
            memory=StageMemory(by_cause={"parameters": np.ones(1)}),
            capacity_bytes=np.ones(1),
        )
        shape = StepShape(
            breakdown_s=cost.breakdown_s,
            family_s=np.eye(len(Family))[Family.MATMUL],
            num_runs=100.0 + number,
            peak_flop_per_s=3e14,
            memory_bytes_per_s=2e12,
            num_devices=2,
            tp=1,
            num_stages=1,
            num_microbatches=2,
        )
        return cost, shape


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [
        {
            "run_id": str(number), "source": "ab"[number % 2], "gpu": "a100_sxm_80gb",
            "arch": "gpt", "layers": 2 + number, "hidden": 64, "heads": 4, "seq_len": 32,
            "gpus": 2, "dp": 2, "tp": 1, "pp": 1, "global_batch": 8, "micro_batch": 2,
            "step_time_s": 1.3,
        }
        for number in range(24)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "runs.parquet")
    return tmp_path / "runs.parquet"


def test_the_part_writes_what_pricing_reads(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps_part, "Predictor", _Predictions)
    source = DataSource(name="runs.parquet", kind="runs", num_bytes=1, sha256="f0", num_rows=24)
    result = fit(
        [StepsPart()],
        FitData(runs=(table,), sources=(source,)),
        FitSettings(),
        folder=tmp_path / "fit",
        tracker=LocalTracker(tmp_path / "fit"),
        reproduce="",
    )
    calibration, interval, steps = read_step_figures(tmp_path / "fit" / "steps.json")
    part = result.parts["steps"]

    assert (21, 3) == (part.figures["num_learned_from"], part.figures["left_out_runs"])
    assert ["five folds by job", "without source: a", "without source: b"] == [
        item.split for item in part.splits
    ]
    assert part.splits[0].mape < 0.15
    assert 0 < interval[0] <= 1 <= interval[1]
    assert "learned" == calibration.origin_of("host_s_per_step").value
    assert not part.is_cut
    assert steps is None, "a source of 12 runs teaches nothing"
    assert {"f0"} == load_pricing(tmp_path / "fit").data_sha256


def test_runs_predicted_before_are_not_predicted_again(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut by the budget after some runs; the clock ticks a second each time it is asked."""
    monkeypatch.setattr(steps_part, "Predictor", _Predictions)
    _Predictions.calls = 0
    ticks = iter(range(10_000))
    data = FitData(runs=(table,))
    for budget_s, is_resumed in ((20.0, False), (None, True)):
        result = fit(
            [StepsPart()],
            data,
            FitSettings(),
            folder=tmp_path / "fit",
            tracker=LocalTracker(tmp_path / "fit"),
            reproduce="",
            budget_s=budget_s,
            is_resumed=is_resumed,
            now_s=lambda: float(next(ticks)),
        )

    assert not result.is_cut
    assert 24 == _Predictions.calls
    assert (
        "steps.json"
        in json.loads((tmp_path / "fit" / "card.json").read_text())["parts"]["steps"]["files"]
    )
