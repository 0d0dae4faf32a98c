"""Claim: under a tight memory budget a layer-wise mixture beats the best uniform plan, in seconds.

    python -m benchmarks.layerwise -o FILE

Every row is one model on 8 devices whose memory is set to the budget: the best uniform plan of all
skeletons, and the best mixture of the layer-wise solvers, both by the exact model. Seconds are of
the search, after capture, on one thread: of the clock, and of the processor, which others that run
at the same time do not lengthen.
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
from meshwright.cluster.model import Cluster
from meshwright.graph.opgraph import OpGraph
from meshwright.plans.plan import JobSpec, ParallelPlan, Precision
from meshwright.solvers.exhaustive import Exhaustive
from meshwright.solvers.frontier import Frontier
from meshwright.solvers.layerwise import LayerwiseDP, LayerwiseILP
from meshwright.solvers.planner import make_context
from meshwright.space.search import Candidate

CASES = (
    ("llama2-7b", 64, (16, 24, 38, 80)),
    ("gpt-2.6b", 64, (10, 16)),
    ("bert-large", 512, (4, 6)),
    ("vit-h14", 512, (5, 6)),
    ("t5-large", 128, (6,)),
)
"""Model, global batch, gigabytes of a device's memory."""

_CLUSTER = "8xa100"


def with_memory(cluster: Cluster, memory_bytes: int) -> Cluster:
    """The cluster with devices of another size."""
    hosts = tuple(
        dataclasses.replace(
            host, device=dataclasses.replace(host.device, memory_bytes=memory_bytes)
        )
        for host in cluster.hosts
    )
    return dataclasses.replace(cluster, hosts=hosts)


def captured(model: str, batch: int) -> OpGraph:
    """The training step of a built-in model."""
    source = resolve_model(model)
    args, kwargs = source.example_inputs(batch, dtype="bfloat16")
    return capture(source.build("bfloat16"), args, kwargs).graph


def described(plan: ParallelPlan) -> str:
    """Mesh and micro-batches."""
    mesh = plan.mesh
    sizes = [f"pp{mesh.pp}", f"dp{mesh.dp_replicate * mesh.dp_shard}", f"tp{mesh.tp}"]
    return " ".join([*(s for s in sizes if not s.endswith("p1")), f"mb{plan.num_microbatches}"])


def num_strategies(candidate: Candidate, segment_classes: tuple[int, ...]) -> int:
    """Distinct triples of ZeRO stage, recompute and offload, and of sharding in classes."""
    entries = candidate.plan.segment_plans(segment_classes)
    return len(
        {
            (
                repr(entry.shard.get("tp")) if mixed else "",
                entry.zero_stage,
                entry.recompute,
                entry.offload,
            )
            for entry in entries
            for mixed in (_mixes_shardings(candidate.plan),)
        }
    )


def _mixes_shardings(plan: ParallelPlan) -> bool:
    """Whether segments of one class are sharded in two ways."""
    ways = {(entry.segment_class, repr(entry.shard)) for entry in plan.segments}
    return len(ways) > len({entry.segment_class for entry in plan.segments})


def row(graph: OpGraph, model: str, batch: int, gigabytes: int) -> dict[str, Any]:
    """One line of the table."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    context = make_context(
        graph,
        reference=model,
        cluster=with_memory(parse_cluster(_CLUSTER), gigabytes * 10**9),
        job=JobSpec(global_batch=batch, precision=Precision.BF16),
        level="O2",
    )
    frontier = Frontier(context)
    looked = Exhaustive(frontier.survey).propose(context).candidates
    uniform = [c for c in looked if c.cost.fits]
    results = [LayerwiseDP(frontier).propose(context), LayerwiseILP(frontier).propose(context)]
    seconds, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    mixed = [c for result in results for c in result.candidates]
    found: dict[str, Any] = {"model": model, "global_batch": batch, "memory_gb": gigabytes}
    found["search_s"], found["search_cpu_s"] = round(seconds, 2), round(cpu_s, 2)
    best = min(mixed, key=lambda c: c.time_s, default=None)
    if uniform:
        found["uniform_s"] = uniform[0].time_s
        found["uniform"] = described(uniform[0].plan)
    if best is not None:
        found["mixture_s"] = best.time_s
        found["mixture"] = described(best.plan)
        found["solver"] = best.solver
        found["num_strategies"] = num_strategies(best, context.model.segment_classes)
        entries = best.plan.segment_plans(context.model.segment_classes)
        found["offloaded_segments"] = sum(entry.offload for entry in entries)
    if not uniform and looked:
        stage = looked[0].cost.fullest_stage
        found["leanest_uniform_bytes"] = {
            cause: round(float(amount[stage]))
            for cause, amount in looked[0].cost.memory.by_cause.items()
        }
    if uniform and best is not None:
        found["gain"] = uniform[0].time_s / best.time_s - 1
    found["notes"] = dict(results[1].notes)
    return found


def main() -> None:
    """Every case and budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[case[0] for case in CASES])
    parser.add_argument("-o", "--output", default="benchmarks/results/layerwise.json")
    options = parser.parse_args()
    rows = []
    for model, batch, budgets in CASES:
        if model not in options.models:
            continue
        graph = captured(model, batch)
        for gigabytes in budgets:
            rows.append(row(graph, model, batch, gigabytes))
            print(json.dumps(rows[-1]), flush=True)
    document = {
        **heading("layer-wise mixtures against the best uniform plan, by the model"),
        "rows": rows,
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
