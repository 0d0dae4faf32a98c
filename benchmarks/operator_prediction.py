"""How well operator times are told on GPUs, shapes and sizes that were not fitted on.

    OMP_NUM_THREADS=1 python -m benchmarks.operator_prediction TABLE
        [--splits devices,siblings,shapes,largest,sources] [--models trees,network,...]
        [--seeds 1] [--most 400] [-o FILE]

TABLE holds measured operators of several GPUs and sources (.parquet or .csv). Every model of the
list is fitted on the same graphs of every split and judged on the same others:

- ``devices``: one GPU left out; others of the same chip (A100 of 40 and 80 GB) stay.
- ``siblings``: one GPU left out, and with it all of about the same data sheet.
- ``shapes``: a fifth of all shapes (of a weight, of heads, of rows) left out on every GPU.
- ``largest``: the largest fifth of each operator left out, of the single-precision table that
  NeuSight published; the bars are its own published errors.
- ``sources``: one source left out.

At most ``--most`` rows are drawn of each source, GPU, operator, direction and dtype. What a host
adds to each measurement of a source that clocks single launches is found from the rows fitted on,
never from the GPU left out. *Long* rows took 100 us or more and are less than a fifth of that
overhead: short ones judge launches, not operators. Seeds change the draw, the split of shapes and
the models; the spread over them stands in the result. Figures are means over the GPUs left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.heading import heading
from meshwright.gnn_cost.baselines import (
    BoostedTrees,
    FamilyMlp,
    FittedRoofline,
    OperatorModel,
    PlainRoofline,
)
from meshwright.gnn_cost.ensemble import EnsembleSettings, GraphEnsemble
from meshwright.gnn_cost.features import DEVICE_FEATURES
from meshwright.gnn_cost.held_out import Split
from meshwright.gnn_cost.intervals import half_widths
from meshwright.gnn_cost.operators.overheads import host_overhead_s
from meshwright.gnn_cost.operators.samples import measured_operators, read_operator_table
from meshwright.gnn_cost.operators.splits import (
    held_out_shapes,
    largest_shapes,
    leave_one_device_out,
    leave_one_source_out,
    subsample,
    take,
    with_rest,
)
from meshwright.gnn_cost.predictor import LearnedOperators
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.gnn_cost.training import TrainingSettings

BARS = {
    "devices": {
        **dict.fromkeys(("linear", "bmm", "attention"), 0.15),
        **dict.fromkeys(("norm", "softmax", "element-wise", "moe"), 0.20),
    },
    "shapes": dict.fromkeys(
        ("linear", "bmm", "attention", "norm", "softmax", "element-wise", "moe"), 0.10
    ),
    "largest": {
        "bmm": 0.138,
        "linear": 0.139,
        "element-wise": 0.193,
        "softmax": 0.139,
        "norm": 0.567,
    },
}
"""Of the mean error; those of ``largest`` are what NeuSight published for data unlike its own."""

MODELS: dict[str, Callable[[int], OperatorModel]] = {
    "roofline": lambda seed: PlainRoofline(),
    "fitted_roofline": lambda seed: FittedRoofline(),
    "trees": lambda seed: BoostedTrees(seed=seed),
    "relative_trees": lambda seed: BoostedTrees(seed=seed, without=DEVICE_FEATURES),
    "mlp": lambda seed: FamilyMlp(seed=seed),
    "relative_mlp": lambda seed: FamilyMlp(seed=seed, without=DEVICE_FEATURES),
    "network": lambda seed: GraphEnsemble(
        EnsembleSettings(
            num_members=2, training=TrainingSettings(seed=seed, max_epochs=15, batch_graphs=256)
        )
    ),
}
"""By name; ``relative`` ones are not told the device's data sheet beside the ratios to it. The
network learns from few rows here, so its batches are smaller than those of ``meshwright fit``."""

SWITCHED_OFF = {
    "network, one member": {"uses_ensemble": False},
    "network, no trust": {"uses_trust": False},
    "network, no messages": {"uses_messages": False},
}
"""The fitted network again without one of its parts."""

MORE_OF_LARGEST = 4
"""Times as many rows are drawn of the one source of ``largest``, a fifth of which is left out."""

LONG_S = 1e-4
LARGEST_REST = 0.2
FEWEST = 30
"""Rows of a kind on a device to be judged by."""


def splits_of(graphs: MeasuredGraphs, name: str, seed: int) -> Iterator[Split]:
    """The splits called ``name``."""
    if name in ("devices", "siblings"):
        yield from leave_one_device_out(graphs, with_siblings=name == "siblings")
    elif name == "shapes":
        yield held_out_shapes(graphs, rng=np.random.default_rng(seed))
    elif name == "largest":
        yield largest_shapes(graphs)
    else:
        yield from leave_one_source_out(graphs)


def judged(
    test: MeasuredGraphs, predicted_s: NDArray[np.float64], **labels: Any
) -> list[dict[str, Any]]:
    """Errors of each kind of operator on each device, and on its long rows."""
    signed = predicted_s / test.time_s - 1
    is_long = (test.time_s >= LONG_S) & (test.rest_s < LARGEST_REST * test.time_s)
    rows = []
    for device in np.unique(test.device):
        for kind in np.unique(test.labels["kind"]):
            here = (test.device == device) & (test.labels["kind"] == kind)
            if here.sum() < FEWEST:
                continue
            long = here & is_long
            rows.append(
                {
                    **labels,
                    "device": test.devices[device].name,
                    "kind": str(kind),
                    "n": int(here.sum()),
                    "mape": float(np.abs(signed[here]).mean()),
                    "median_ape": float(np.median(np.abs(signed[here]))),
                    "median_bias": float(np.median(signed[here])),
                    "num_long": int(long.sum()),
                    "mape_long": float(np.abs(signed[long]).mean()) if long.any() else None,
                }
            )
    return rows


def summarized(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over devices, then over seeds with their spread, by split, kind and model."""
    groups: dict[tuple[str, str, str], dict[int, list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        groups[row["split"], row["kind"], row["model"]][row["seed"]].append(row)
    found = []
    for (split, kind, model), by_seed in sorted(groups.items()):
        of_seed = [float(np.mean([row["mape"] for row in part])) for part in by_seed.values()]
        every = [row for part in by_seed.values() for row in part]
        longs = [row["mape_long"] for row in every if row["num_long"] >= FEWEST]
        found.append(
            {
                "split": split,
                "kind": kind,
                "model": model,
                "bar": BARS["devices" if split == "siblings" else split].get(kind)
                if split in (*BARS, "siblings")
                else None,
                "mape": float(np.mean(of_seed)),
                "spread": max(of_seed) - min(of_seed),
                "mape_long": float(np.mean(longs)) if longs else None,
                "median_ape": float(np.mean([row["median_ape"] for row in every])),
                "median_bias": float(np.mean([row["median_bias"] for row in every])),
                "worst_device": max(every, key=lambda row: float(row["mape"]))["device"],
                "num_devices": len({row["device"] for row in every}),
                "n": sum(row["n"] for row in every),
            }
        )
    return found


def drawn(graphs: MeasuredGraphs, split: str, seed: int, most: int) -> MeasuredGraphs:
    """The rows one seed works on."""
    rng = np.random.default_rng(seed)
    if split == "largest":
        graphs = take(graphs, graphs.labels["source"] == "neusight")
        most *= MORE_OF_LARGEST
    by = ("source", "gpu", "op", "direction", "dtype")
    return subsample(graphs, most=most, by=by, rng=rng)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All splits, models and seeds; tells and writes as it goes."""
    samples = measured_operators(read_operator_table(args.table))
    rows: list[dict[str, Any]] = []
    took_s: dict[str, float] = defaultdict(float)
    coverages: list[dict[str, Any]] = []
    result = heading(
        "errors of operator times on GPUs, shapes and sizes not fitted on, beside the bars",
        num_rows=len(samples.reasons),
        num_graphs=samples.graphs.count,
        left_out=samples.dropped,
        most=args.most,
        seeds=args.seeds,
        bars=BARS,
    )

    def done() -> dict[str, Any]:
        told = {"summary": summarized(rows), "coverage": coverages, "seconds": dict(took_s)}
        return {**result, **told, "rows": rows}

    for seed in range(args.seeds):
        for name in args.splits.split(","):
            graphs = drawn(samples.graphs, name, seed, args.most)
            for split in splits_of(graphs, name, seed):
                seen = with_rest(graphs, host_overhead_s(graphs, seen=split.train))
                train, test = take(seen, split.train), take(seen, split.test)
                for model in args.models.split(","):
                    start_s = time.perf_counter()
                    fitted = MODELS[model](seed)
                    fitted.fit(train)
                    took_s[model] += time.perf_counter() - start_s
                    for variant, judge in _with_variants(model, fitted):
                        more = judged(
                            test,
                            judge.predict(test),
                            split=name,
                            model=variant,
                            seed=seed,
                            num_fitted=train.count,
                            left_out=split.name,
                        )
                        rows += more
                        print(f"{split.name}, seed {seed}, {variant}:", _in_short(more), flush=True)
                    if isinstance(fitted, GraphEnsemble):
                        coverages.append(_coverage(fitted.model, test, name, split.name, seed))
                if args.output is not None:
                    args.output.write_text(json.dumps(done(), indent=1) + "\n")
    return done()


def _with_variants(name: str, fitted: OperatorModel) -> Iterator[tuple[str, Any]]:
    yield name, fitted
    if isinstance(fitted, GraphEnsemble):
        for variant, flags in SWITCHED_OFF.items():
            yield variant, replace(fitted.model, **flags)


def _coverage(
    model: LearnedOperators, test: MeasuredGraphs, split: str, left_out: str, seed: int
) -> dict[str, Any]:
    """How many measurements lie inside the 90 % intervals of the network."""
    scale, family = model.graph_scales(test)
    error = np.abs(np.log(test.time_s / model.predict(test)))
    inside = error <= half_widths(model.tensors, scale, family)
    told = {"split": split, "left_out": left_out, "seed": seed, "n": test.count}
    return {**told, "coverage": float(inside.mean())}


def _in_short(rows: list[dict[str, Any]]) -> str:
    by_kind: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row["mape"])
    return ", ".join(f"{kind} {100 * np.mean(values):.1f}" for kind, values in by_kind.items())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--splits", default="devices,siblings,shapes,largest,sources")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--most", type=int, default=400)
    parser.add_argument("-o", "--output", type=Path)
    result = run(parser.parse_args())
    for row in result["summary"]:
        bar = "" if row["bar"] is None else f"bar {100 * row['bar']:.1f}"
        long = "" if row["mape_long"] is None else f"long {100 * row['mape_long']:.1f}"
        print(
            f"{row['split']:9} {row['kind']:13} {row['model']:16} MAPE {100 * row['mape']:6.1f} "
            f"median {100 * row['median_ape']:5.1f} {long:10} {bar:9} n {row['n']}"
        )


if __name__ == "__main__":
    main()
