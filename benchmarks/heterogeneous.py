"""Claim: on half A100, half T4 our plan beats each half alone and an even split, by the model.

    python -m benchmarks.heterogeneous [--cluster FILE] -o FILE

``halves``: the best plan of all solvers on the hosts of one type. ``even``: the best plan in which
every device does the same (the slowest type sets the pace). ``stages``: stages sized to the speed
of their devices, or shares of the samples to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.heading import heading
from meshwright.capture.captured import capture
from meshwright.capture.references import resolve_model
from meshwright.cluster.files import read_cluster_file
from meshwright.cluster.model import Cluster
from meshwright.graph.opgraph import OpGraph
from meshwright.plans.plan import JobSpec, ParallelPlan, Precision
from meshwright.solvers.exhaustive import Exhaustive
from meshwright.solvers.planner import make_context
from meshwright.solvers.stages import Stages
from meshwright.space.search import Proposer, fitting

HERE = Path(__file__).parent
CASES = (("gpt2", 1024), ("bert-large", 1024))
"""Model and global batch, at fp16: T4 has no bf16 unit."""


def half(cluster: Cluster, device: str) -> Cluster:
    """The hosts with one type of device."""
    hosts = tuple(host for host in cluster.hosts if host.device.name == device)
    levels = cluster.levels[-1:] if len(hosts) > 1 else ()
    levels = tuple((len(hosts), link) for _, link in levels)
    return dataclasses.replace(cluster, name=f"{device} alone", hosts=hosts, levels=levels)


def best(
    graph: OpGraph, name: str, cluster: Cluster, batch: int, proposer: Proposer
) -> dict[str, Any]:
    """The fastest plan of a proposer that fits: seconds a step, and what it does."""
    start_s = time.perf_counter()
    context = make_context(
        graph,
        reference=name,
        cluster=cluster,
        job=JobSpec(global_batch=batch, precision=Precision.FP16),
        level="O2",
    )
    found = fitting(proposer.propose(context).candidates)
    seconds = time.perf_counter() - start_s
    if not found:
        return {"step_time_s": None, "search_s": seconds}
    return {
        "step_time_s": found[0].time_s,
        "search_s": seconds,
        "plan": summary(found[0].plan),
        "unrunnable": found[0].plan.unrunnable,
    }


def summary(plan: ParallelPlan) -> dict[str, Any]:
    """What a reader wants to know of a plan."""
    return {
        "num_microbatches": plan.num_microbatches,
        "stages": [
            {
                "segments": stage.num_segments,
                "devices": [stage.first_device, stage.devices.stop - 1],
                "mesh": {k: v for k, v in plan.stage_sizes(number).items() if v > 1},
                **({"batch_shares": stage.batch_shares} if stage.batch_shares else {}),
            }
            for number, stage in enumerate(plan.stages)
        ],
    }


def main() -> None:
    """Compare on every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", default=str(HERE / "clusters" / "half_a100_half_t4.toml"))
    parser.add_argument("-o", "--output", default=str(HERE / "results" / "heterogeneous.json"))
    options = parser.parse_args()
    cluster = read_cluster_file(Path(options.cluster))
    rows = []
    for name, batch in CASES:
        source = resolve_model(name)
        args, kwargs = source.example_inputs(batch, dtype="float16")
        graph = capture(source.build("float16"), args, kwargs).graph
        row: dict[str, Any] = {"model": name, "global_batch": batch, "precision": "fp16"}
        for device in cluster.devices:
            part = half(cluster, device.name)
            ways = [best(graph, name, part, batch, p) for p in (Exhaustive(), Stages())]
            row[f"{device.name} alone"] = min(
                ways, key=lambda way: way["step_time_s"] or float("inf")
            )
        row["even"] = best(graph, name, cluster, batch, Exhaustive())
        row["ours"] = best(graph, name, cluster, batch, Stages())
        ours_s = row["ours"]["step_time_s"]
        row["times_faster_than"] = {
            key: row[key]["step_time_s"] / ours_s
            for key in row
            if isinstance(row[key], dict) and key != "ours" and row[key].get("step_time_s")
        }
        rows.append(row)
        print(name, {k: round(v, 3) for k, v in row["times_faster_than"].items()}, flush=True)
    document = {
        **heading(
            "half A100, half T4: our plan against each half alone and an even split, "
            "step time by the analytic model"
        ),
        "cluster": cluster.describe(),
        "rows": rows,
    }
    Path(options.output).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
