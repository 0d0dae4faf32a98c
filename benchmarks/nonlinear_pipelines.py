"""Claim: stages on the graph's own shape beat the best linear pipeline, by the model.

    python -m benchmarks.nonlinear_pipelines -o FILE

``linear``: every stage waits for the one before it, and a value that skips stages is passed on from
neighbor to neighbor; stages are runs of the captured order, the best of all shapes tried.
``graph``: stages of several branches, each waiting for those it needs and sent to directly; the
same shapes, and where branches are parallel also sub-meshes of unequal size. ``uniform``: the best
plan with the same choice everywhere, pipelined or not.
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
from meshwright.cluster import parse_cluster
from meshwright.cluster.files import read_cluster_file
from meshwright.cost.model import choice_of
from meshwright.graph.opgraph import OpGraph
from meshwright.plans.plan import JobSpec, ParallelPlan, Precision
from meshwright.solvers.exhaustive import Exhaustive
from meshwright.solvers.planner import make_context
from meshwright.solvers.stage_branches import branch_candidates, chain_plan, graph_units, shapes
from meshwright.solvers.stages import splits_of
from meshwright.space.search import SearchContext, fitting

HERE = Path(__file__).parent
CASES = (("clip-vit-b32", 1024), ("t5-3b", 128), ("unet-256", 64))
"""Model and global batch, at bf16."""

CLUSTERS = ("16xa100", "clusters/eight_small_hosts.toml")
"""Shorthand, or a file beside this one."""

_NUM_SHAPES = 24


def measured(
    context: SearchContext, plan: ParallelPlan, *, relays: bool
) -> tuple[float, dict[str, Any]] | None:
    """Step time of a plan and what it does; ``None`` where it does not fit."""
    model = context.model
    if not relays:
        cost = model.cost(plan)
    else:
        choice = dataclasses.replace(choice_of(plan, model.segment_classes), relays=True)
        cost = model.pricer.price(model.table_of_plan(plan), choice)
    return (cost.time_s, summary(plan, cost.time_s)) if cost.fits else None


def summary(plan: ParallelPlan, time_s: float) -> dict[str, Any]:
    """What a reader wants to know of a plan."""
    return {
        "step_time_s": time_s,
        "num_microbatches": plan.num_microbatches,
        "stages": [
            {
                "segments": [list(run) for run in stage.runs],
                "mesh": {k: v for k, v in plan.stage_sizes(number).items() if v > 1},
            }
            for number, stage in enumerate(plan.stages)
        ],
        "unrunnable": plan.unrunnable,
    }


def compared(graph: OpGraph, name: str, cluster: str, batch: int) -> dict[str, Any]:
    """One row: the best of each kind."""
    start_s = time.perf_counter()
    context = make_context(
        graph,
        reference=name,
        cluster=(
            read_cluster_file(HERE / cluster)
            if cluster.endswith(".toml")
            else parse_cluster(cluster)
        ),
        job=JobSpec(global_batch=batch, precision=Precision.BF16),
        level="O2",
    )
    units, splits = graph_units(context), splits_of(context)
    found = shapes(context, units, splits, at_most=_NUM_SHAPES)
    chains = [p for p in (chain_plan(context, units, s, solver="chain") for s in found) if p]
    linear = [m for m in (measured(context, plan, relays=True) for plan in chains) if m]
    direct = [m for m in (measured(context, plan, relays=False) for plan in chains) if m]
    branches = branch_candidates(context, splits, solver="stages")
    direct += [(c.time_s, summary(c.plan, c.time_s)) for c in branches]
    runnable = [m for m in direct if not m[1]["unrunnable"]]
    overall = fitting(Exhaustive().propose(context).candidates)
    row = {
        "model": name,
        "cluster": cluster,
        "global_batch": batch,
        "segments_in_a_row": units.is_chain,
        "linear": min(linear, key=lambda m: m[0])[1],
        "graph": min(direct, key=lambda m: m[0])[1],
        "graph_runnable": min(runnable, key=lambda m: m[0])[1],
        "uniform": summary(overall[0].plan, overall[0].time_s) if overall else None,
        "search_s": time.perf_counter() - start_s,
    }
    row["linear_over_graph"] = row["linear"]["step_time_s"] / row["graph"]["step_time_s"]
    return row


def main() -> None:
    """Compare on every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default=str(HERE / "results/nonlinear_pipelines.json"))
    options = parser.parse_args()
    rows = []
    for name, batch in CASES:
        source = resolve_model(name)
        args, kwargs = source.example_inputs(batch, dtype="bfloat16")
        graph = capture(source.build("bfloat16"), args, kwargs).graph
        for cluster in CLUSTERS:
            rows.append(compared(graph, name, cluster, batch))
            row = rows[-1]
            times = [
                f"{key} {row[key]['step_time_s'] * 1e3:.1f} ms"
                for key in ("linear", "graph", "graph_runnable", "uniform")
                if row[key]
            ]
            print(name, cluster, ", ".join(times), f"{row['search_s']:.0f} s", flush=True)
    document = {
        **heading(
            "step time by the analytic model: stages on the graph's own shape (graph) against "
            "the best linear pipeline (linear), and the best plan with the same choice everywhere, "
            "pipelined or not (uniform)"
        ),
        "rows": rows,
    }
    Path(options.output).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
