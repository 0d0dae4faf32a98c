"""Claim: a cluster file measured here brings predictions of real steps nearer than ``cpu:4`` does.

    python -m benchmarks.measured_cluster [--steps 10] [-o FILE]

Measures this machine with ``meshwright profile machine``, then runs the plans of ``meshwright
demo`` as four processes, and prices each from the estimates of ``cpu:4`` and from the file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.heading import heading
from meshwright.api import plan_reference
from meshwright.cluster import parse_cluster
from meshwright.cost.model import StepCostModel
from meshwright.plans import JobSpec, OptimizerSpec, ParallelPlan, write_plan
from meshwright.runtime.job import open_plan
from meshwright.runtime.launch import launch

CLUSTER = "cpu:4"
MODELS = (
    ("tiny-gpt?hidden=256&num_layers=4&seq_len=32&vocab_size=1024", 8),
    ("tiny-clip?image_hidden=128&text_hidden=128", 16),
)
KINDS = ("chosen", "data parallel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "machine.toml")
        measure_machine(path, folder)
        rows = [
            row
            for reference, batch in MODELS
            for row in runs_of(reference, batch, path, steps=options.steps, folder=folder)
        ]
        source = parse_cluster(path).hosts[0]
    result = {
        **heading(
            "a cluster file measured here brings predictions of real steps nearer than cpu:4 does",
            load_average=os.getloadavg(),
        ),
        "device_source": source.device.source,
        "link_source": source.link.source,
        "rows": rows,
        "median_ratio": {
            name: statistics.median(row[f"ratio_{name}"] for row in rows)
            for name in ("estimated", "measured")
        },
    }
    text = json.dumps(result, indent=2) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def measure_machine(path: str, folder: str) -> None:
    words = ["profile", "machine", "--cluster", CLUSTER, "-o", path, "--store", f"{folder}/records"]
    command = [sys.executable, "-m", "meshwright.cli", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def runs_of(
    reference: str, batch: int, path: str, *, steps: int, folder: str
) -> Iterator[dict[str, Any]]:
    """Measured seconds of each plan beside both predictions."""
    job = JobSpec(global_batch=batch, optimizer=OptimizerSpec(learning_rate=1e-4))
    result = plan_reference(reference, cluster=CLUSTER, job=job, top=1000).result
    plain = next(
        item.plan
        for item in result.alternatives
        if item.plan.mesh.dp_replicate == item.plan.mesh.num_devices == 4
    )
    for kind, plan in zip(KINDS, (result.plan, plain), strict=True):
        plan_path = Path(folder) / "plan.json"
        write_plan(plan, plan_path)
        measured = launch(plan_path, warmup=2, repeats=steps).step_time
        predicted_s = {"estimated": price_s(plan, CLUSTER), "measured": price_s(plan, path)}
        row: dict[str, Any] = {
            "model": reference,
            "plan": kind,
            "mesh": {axis: n for axis, n in sizes_of(plan).items() if n > 1},
            "measured_s": measured.median_s,
            "p10_s": measured.p10_s,
            "p90_s": measured.p90_s,
            "num_repeats": measured.num_repeats,
        }
        for name, seconds in predicted_s.items():
            row[f"predicted_{name}_s"] = seconds
            row[f"ratio_{name}"] = seconds / measured.median_s
        yield row


def sizes_of(plan: ParallelPlan) -> dict[str, int]:
    axes = ("pp", "dp_replicate", "dp_shard", "cp", "ep", "tp")
    return {axis: getattr(plan.mesh, axis) for axis in axes}


def price_s(plan: ParallelPlan, cluster: str) -> float:
    prepared = open_plan(plan).prepared
    model = StepCostModel(
        prepared.analysis,
        prepared.segmentation,
        prepared.labels,
        cluster=parse_cluster(cluster),
        job=plan.job,
    )
    return model.predict(plan).step_time_s


if __name__ == "__main__":
    main()
