"""Claim: measured steps correct predicted ones where they reach, and leave them alone elsewhere.

    python -m benchmarks.step_prediction RUNS [--cache FOLDER] [--source NAME] [--package] [-o FILE]

``RUNS`` is a table of measured runs (docs/bench.md). On the single-node A100 runs (vTrain), splits
that extrapolate: learned on 2 and 4 GPUs and judged on 8; without depth 24; without 4 stages;
without each hidden size. In the same run, beside each other:

- ``roofline``: operators at their data sheet's best, all else as ``parts``, and
  ``roofline_process``; ``parts``: prices of operators and collectives; ``calibration``: with
  figures of the framework;
- ``gnn``: the graph network tuned on steps, mean of members, and ``gnn_ensemble``;
- on ``parts``: boosted trees, an MLP, its ensemble, and the Gaussian process of
  ``gnn_cost.steps.correction`` (``process``);
- ``calibration_process`` and ``gnn_process``: the process on top of those.

``_unshrunk`` does not go back to 1 out of distribution; the process' distance decides for all.
Regret is within jobs. Intervals are of 90 %: of residuals of training, or the process' spread times
a quantile found by leaving out levels within training. Last, each source's error by figures fitted
on all other sources, runs of trust A alone, and what the correction does to sources and jobs left
out (``bench.step_teaching``); ``--package`` writes both, with the interval of sources left out,
as ``steps.json`` beside the package's weights; ``--only-package`` does nothing else, in minutes.
A ``--cache`` is of one state of the code: give a new folder after changes of prices.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.heading import heading
from meshwright.bench.metrics import spearman
from meshwright.bench.predict import Predictor
from meshwright.bench.regret import regret
from meshwright.bench.run_graph_file import read_run_graphs, write_run_graphs
from meshwright.bench.run_graphs import RunGraphs, run_graphs
from meshwright.bench.run_table import read_runs
from meshwright.bench.runs import MeasuredRun
from meshwright.bench.step_figures import (
    FIGURES,
    FigureChoice,
    TimedRuns,
    chosen_figures,
    fit_figures,
    joined,
    timed_runs,
)
from meshwright.bench.step_teaching import Taught, teach
from meshwright.cli.fit_sources import read_sources
from meshwright.cost.calibration import DEFAULTS, Origin
from meshwright.cost.pricing import Pricing
from meshwright.gnn_cost.baselines.roofline import PlainRoofline
from meshwright.gnn_cost.forward import MAX_FACTOR
from meshwright.gnn_cost.predictor import LearnedOperators
from meshwright.gnn_cost.pretrained_pricing import StepFigures, load_pricing, pretrained_folder
from meshwright.gnn_cost.steps.correction import StepCorrection
from meshwright.gnn_cost.steps.fit import fit_step_correction, half_width_scale
from meshwright.gnn_cost.steps.network import StepNetwork, StepRows
from meshwright.tracking import DataSource, source_of

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Predicted = tuple[FloatArray, tuple[FloatArray, FloatArray]]
"""Seconds of the tested runs, and their intervals."""

SEEDS = (0, 1, 2)
SOURCE = "vtrain_single"
SPLITS = {
    "8 GPUs": ("gpus", "8"),
    "depth 24": ("layers", "24"),
    "4 stages": ("pp", "4"),
    "hidden 1024": ("hidden", "1024"),
    "hidden 2048": ("hidden", "2048"),
}
BARS = {
    "8 GPUs": 0.03,
    "depth 24": 0.03,
    "4 stages": 0.04,
    "hidden 1024": 0.12,
    "hidden 2048": 0.12,
}
LOG_MOST = float(np.log(MAX_FACTOR))


class Steps:
    """Runs with their prices, and what models of one split share."""

    def __init__(self, found: RunGraphs, tensors: Mapping[str, Any]) -> None:
        """Of runs of one source."""
        self.found, self.tensors = found, tensors
        self.measured_s = found.graphs.time_s
        self.parts_s = found.predicted_s
        self.job = np.array([run.job_key for run in found.runs])
        self.roofline_s = PlainRoofline().predict(found.graphs)
        self.levels = [found.graphs.labels[name] for name in ("gpus", "layers", "pp")]
        self.rows = StepRows.of(found.graphs, row_s=found.row_s, launch_s=found.launch_s)
        self._tuned: dict[tuple[bytes, int], FloatArray] = {}
        self._processes: dict[tuple[bytes, bytes, int], StepCorrection] = {}
        self._regressed: dict[tuple[bytes, str, int], FloatArray] = {}

    def tuned_s(self, test: BoolArray, seed: int) -> FloatArray:
        """Of all runs, by the network tuned on those not tested."""
        key = (test.tobytes(), seed)
        if key not in self._tuned:
            network = StepNetwork(self.tensors, seed=seed)
            network.fit(self.rows, np.flatnonzero(~test))
            self._tuned[key] = network.predict(self.rows, np.arange(len(test)))
        return self._tuned[key]

    def residual_s(
        self, base_s: FloatArray, test: BoolArray, log_factor: FloatArray, trust: FloatArray
    ) -> Predicted:
        """``base_s`` times a bounded factor, with an interval of residuals of training."""
        all_s = base_s * np.exp(np.clip(trust * log_factor, -LOG_MOST, LOG_MOST))
        low, high = np.quantile(self.measured_s[~test] / all_s[~test], (0.05, 0.95))
        return all_s[test], (all_s[test] * low, all_s[test] * high)

    def process(self, base_s: FloatArray, test: BoolArray, seed: int) -> StepCorrection:
        """Fitted on what is not tested."""
        key = (test.tobytes(), base_s.tobytes(), seed)
        if key not in self._processes:
            ratio = np.log(self.measured_s / base_s)[~test]
            features = self.found.features[~test]
            self._processes[key] = fit_step_correction(features, ratio, seed=seed)
        return self._processes[key]

    def regressed(self, name: str, test: BoolArray, seed: int) -> FloatArray:
        """Log factors of all runs by a regressor of scikit-learn, taught those not tested."""
        key = (test.tobytes(), name, seed)
        if key not in self._regressed:
            model = trees(seed) if name == "trees" else mlp(seed)
            ratio = np.log(self.measured_s / self.parts_s)[~test]
            model.fit(self.found.features[~test], ratio)
            self._regressed[key] = np.asarray(model.predict(self.found.features))
        return self._regressed[key]


def by_process(
    steps: Steps, base_s: FloatArray, test: BoolArray, seed: int, shrunk: bool
) -> Predicted:
    """The process on ``base_s``."""
    model = steps.process(base_s, test, seed)
    found = model(steps.found.features[test], is_shrunk=shrunk)
    ratio = np.log(steps.measured_s / base_s)[~test]
    levels = [one[~test] for one in steps.levels]
    scale = half_width_scale(model, steps.found.features[~test], ratio, levels)
    time_s, width = base_s[test] * found.factor, scale * found.log_spread
    return time_s, (time_s * np.exp(-width), time_s * np.exp(width))


def by_regressor(
    steps: Steps, test: BoolArray, seed: int, names: tuple[str, ...], shrunk: bool
) -> Predicted:
    """Parts times what regressors say, or the mean of three with ``names`` of more than one."""
    seeds = (seed, seed + 10, seed + 20) if "ensemble" in names else (seed,)
    log_factor = np.mean([steps.regressed(names[0], test, one) for one in seeds], axis=0)
    trust = np.ones(len(test))
    if shrunk:
        trust = steps.process(steps.parts_s, test, seed)(steps.found.features).trust
    return steps.residual_s(steps.parts_s, test, log_factor, trust)


def trees(seed: int) -> Any:
    """Boosted trees."""
    return HistGradientBoostingRegressor(
        max_iter=150, learning_rate=0.08, min_samples_leaf=8, random_state=seed
    )


def mlp(seed: int) -> Any:
    """A small network."""
    network = MLPRegressor(
        hidden_layer_sizes=(32, 32),
        alpha=0.01,
        max_iter=300,
        random_state=seed,
        learning_rate_init=5e-3,
    )
    return make_pipeline(StandardScaler(), network)


def calibrated(steps: Steps, test: BoolArray) -> FloatArray:
    """Of all runs, by figures of the framework fitted on those not tested."""
    runs = timed_runs(steps.found)
    return fit_figures(runs.where(~test)).predicted_s(runs)


def methods() -> dict[str, Callable[[Steps, BoolArray, int], Predicted]]:
    """By name: what predicts the tested runs."""
    flat = np.zeros(1)

    def gnn(steps: Steps, test: BoolArray, seeds: tuple[int, ...]) -> FloatArray:
        return np.asarray(np.exp(np.mean([np.log(steps.tuned_s(test, s)) for s in seeds], axis=0)))

    def shrunk_gnn(steps: Steps, test: BoolArray, seed: int) -> Predicted:
        ratio = np.log(gnn(steps, test, SEEDS) / steps.parts_s)
        trust = steps.process(steps.parts_s, test, seed)(steps.found.features).trust
        return steps.residual_s(steps.parts_s, test, ratio, trust)

    return {
        "parts": lambda s, t, _: s.residual_s(s.parts_s, t, flat, flat),
        "roofline": lambda s, t, _: s.residual_s(s.roofline_s, t, flat, flat),
        "roofline_process": lambda s, t, n: by_process(s, s.roofline_s, t, n, True),
        "calibration": lambda s, t, _: s.residual_s(calibrated(s, t), t, flat, flat),
        "gnn": lambda s, t, n: s.residual_s(gnn(s, t, (n,)), t, flat, flat),
        "gnn_ensemble": lambda s, t, _: s.residual_s(gnn(s, t, SEEDS), t, flat, flat),
        "gnn_ensemble_shrunk": shrunk_gnn,
        "trees": lambda s, t, n: by_regressor(s, t, n, ("trees",), True),
        "trees_unshrunk": lambda s, t, n: by_regressor(s, t, n, ("trees",), False),
        "mlp": lambda s, t, n: by_regressor(s, t, n, ("mlp",), True),
        "mlp_unshrunk": lambda s, t, n: by_regressor(s, t, n, ("mlp",), False),
        "mlp_ensemble": lambda s, t, n: by_regressor(s, t, n, ("mlp", "ensemble"), True),
        "mlp_ensemble_unshrunk": lambda s, t, n: by_regressor(s, t, n, ("mlp", "ensemble"), False),
        "process": lambda s, t, n: by_process(s, s.parts_s, t, n, True),
        "process_unshrunk": lambda s, t, n: by_process(s, s.parts_s, t, n, False),
        "calibration_process": lambda s, t, n: by_process(s, calibrated(s, t), t, n, True),
        "calibration_process_unshrunk": lambda s, t, n: by_process(
            s, calibrated(s, t), t, n, False
        ),
        "gnn_process": lambda s, t, n: by_process(s, gnn(s, t, SEEDS), t, n, True),
    }


def judged(steps: Steps, test: BoolArray, found: Predicted) -> dict[str, float]:
    """Errors, regrets, ranks and coverage of the tested runs."""
    time_s, (low_s, high_s) = found
    measured_s, job = steps.measured_s[test], steps.job[test]
    first, third, ranks = [], [], []
    for name in np.unique(job):
        own = job == name
        if own.sum() < 2:
            continue
        times, scores = measured_s[own].tolist(), [(one,) for one in time_s[own].tolist()]
        first.append(regret(times, scores, num_tries=1))
        third.append(regret(times, scores, num_tries=3))
        if own.sum() > 2:
            ranks.append(spearman(time_s[own], measured_s[own]) or 0.0)
    error = time_s / measured_s - 1
    return {
        "mape": float(np.abs(error).mean()),
        "bias": float(error.mean()),
        "mean_regret": float(np.mean(first)),
        "p95_regret": float(np.quantile(first, 0.95)),
        "mean_regret_top3": float(np.mean(third)),
        "spearman": float(np.mean(ranks)) if ranks else float("nan"),
        "coverage_of_90": float(np.mean((low_s <= measured_s) & (measured_s <= high_s))),
    }


def judged_split(steps: Steps, name: str) -> dict[str, Any]:
    """All methods on one split."""
    label, value = SPLITS[name]
    test = steps.found.graphs.labels[label] == value
    rows = {}
    for method, predict in methods().items():
        each = [judged(steps, test, predict(steps, test, seed)) for seed in SEEDS]
        mean = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
        spread = float(np.std([one["mape"] for one in each]))
        rows[method] = {**mean, "mape_std_of_seeds": spread}
        print(
            f"{name:12} {method:22} mape {100 * mean['mape']:5.1f} %  regret "
            f"{100 * mean['mean_regret']:5.2f} %  top 3 {100 * mean['mean_regret_top3']:5.2f} %  "
            f"p95 {100 * mean['p95_regret']:5.1f} %  rank {mean['spearman']:.3f}  covered "
            f"{100 * mean['coverage_of_90']:3.0f} %",
            flush=True,
        )
    num_jobs = len(np.unique(steps.job[test]))
    return {"n": int(test.sum()), "jobs": num_jobs, "bar_mape": BARS[name], "methods": rows}


def priced(options: argparse.Namespace, pricing: Pricing, label: str) -> dict[str, RunGraphs]:
    """Runs with a time by source, from the cache where it holds them."""
    runs: dict[str, list[MeasuredRun]] = {}
    for run in read_runs(options.table).runs:
        if run.measured_s and run.source in (options.source or [run.source]):
            runs.setdefault(run.source, []).append(run)
    predictor = Predictor(pricing)
    known = {}
    for source, its in runs.items():
        path = None if options.cache is None else options.cache / f"{source}.npz"
        found = None if path is None else read_run_graphs(path, priced_by=label)
        if found is None:
            found = run_graphs(sorted(its, key=lambda run: run.job_key), predictor)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_run_graphs(path, found, priced_by=label)
        known[source] = found
    return known


def zero_shot(found: Mapping[str, RunGraphs]) -> dict[str, dict[str, Any]]:
    """Of every source: how far prices without any measured step are off; regret of trust A."""
    rows: dict[str, dict[str, Any]] = {}
    for source, one in found.items():
        error = one.predicted_s / one.graphs.time_s - 1
        rows[source] = {
            "n": len(error),
            "trust": sorted({run.trust or "" for run in one.runs}),
            "mape": float(np.abs(error).mean()),
            "median_ape": float(np.median(np.abs(error))),
            "bias": float(error.mean()),
        }
        if trusted(one).graphs.count == len(error):
            rows[source] |= regret_in_jobs(one)
    return rows


def regret_in_jobs(found: RunGraphs) -> dict[str, Any]:
    """Mean regret of the plan priced fastest over jobs of several; none where there are none."""
    job = np.array([run.job_key for run in found.runs])
    regrets = []
    for name in np.unique(job):
        own = job == name
        if own.sum() > 1:
            scores = [(one,) for one in found.predicted_s[own].tolist()]
            regrets.append(regret(found.graphs.time_s[own].tolist(), scores, num_tries=1))
    mean = float(np.mean(regrets)) if regrets else None
    return {"jobs": len(regrets), "mean_regret": mean}


def trusted(found: RunGraphs) -> RunGraphs:
    """Runs of trust A or none told: neither aggregated nor bound by their host."""
    return found.where(np.array([run.trust in ("A", None) for run in found.runs], np.bool_))


def package(
    chosen: FigureChoice,
    taught: Taught,
    source: DataSource,
    *,
    licenses: Mapping[str, str],
    made_with: Pricing,
) -> None:
    """Write what comes with the package: figures, interval, correction, hash of the table."""
    values = {name: chosen.fit.values[name] for name in chosen.names}
    StepFigures(
        calibration=DEFAULTS.with_figures(Origin.LEARNED, **values).to_json(),
        interval=chosen.interval,
        correction=taught.document,
        made_with=made_with.sha256,
        data=[source],
        licenses=dict(licenses),
    ).write(pretrained_folder())


def taught_by(every: Sequence[RunGraphs], runs: TimedRuns, chosen: FigureChoice) -> Taught:
    """What all sources teach on top of the figures."""
    names = ("gpus", "layers", "pp")
    values = [chosen.fit.values[name] for name in FIGURES]
    return teach(
        runs,
        np.concatenate([one.features for one in every]),
        runs.predicted_s(np.array(values)),
        [np.concatenate([one.graphs.labels[name] for one in every]) for name in names],
    )


def main() -> None:
    """Judge on every split; write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--cost-model", type=Path, help="folder of a fit; the package's")
    parser.add_argument("--cache", type=Path, help="folder for priced runs")
    parser.add_argument("--source", action="append", help="only this one; may be repeated")
    parser.add_argument("--package", action="store_true", help="write steps.json")
    parser.add_argument("--only-package", action="store_true", help="and judge no splits")
    parser.add_argument("-o", "--output", default="benchmarks/results/step_prediction.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    sha256 = hashlib.sha256(options.table.read_bytes()).hexdigest()
    # Without what steps taught before, or that would be learned on top of itself.
    pricing = load_pricing(options.cost_model, with_steps=False)
    found = priced(options, pricing, f"{pricing.label} {sha256[:12]}")
    every = [trusted(one) for one in found.values()]
    runs = joined(timed_runs(one) for one in every)
    chosen = chosen_figures(runs)
    taught = taught_by(every, runs, chosen)
    if options.package or options.only_package:
        rows = sum(one.graphs.count for one in found.values())
        source = source_of(options.table, kind="runs", num_rows=rows)
        told = read_sources([options.table], print).licenses
        licenses = {name: text for name, text in told.items() if name in runs.source}
        package(chosen, taught, source, licenses=licenses, made_with=pricing)
    if options.only_package:
        print(json.dumps({"figures": chosen.to_json(), "correction": taught.to_json()}, indent=1))
        return
    operators = pricing.operators
    assert isinstance(operators, LearnedOperators), "the graph network is what is tuned"
    steps = Steps(found[SOURCE], operators.tensors)
    document = {
        **heading(
            "steps: measured steps correct predicted ones where they reach, and nowhere else",
            table_sha256=sha256,
            cost_model=pricing.label,
            n={source: one.graphs.count for source, one in found.items()},
            left_out_runs={source: len(one.skipped) for source, one in found.items()},
            seeds=list(SEEDS),
        ),
        "splits": {},
        "zero_shot": zero_shot(found),
        "figures_without_source": chosen.to_json() if len(found) > 1 else None,
        "figures_that_can_be_fitted": list(FIGURES),
        "correction": taught.to_json(),
    }
    words = (str(options.table), options.table.name), (str(options.cache), "cache")
    for path, name in words:
        document["command"] = document["command"].replace(path, name)
    for name in SPLITS:
        document["splits"][name] = judged_split(steps, name)
        document["seconds"] = time.monotonic() - start
        Path(options.output).write_text(json.dumps(document, indent=1) + "\n")
    for name in ("figures_without_source", "correction"):
        print(json.dumps(document[name], indent=1))


if __name__ == "__main__":
    main()
