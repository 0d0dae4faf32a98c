"""Claim: at least 10,000 plans a second are evaluated from priced segments, on one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluations -o FILE

Random mixtures and random stages: the worst case for the simulation, which every plan gets. Seconds
are the processor's, of one thread, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.heading import heading
from benchmarks.layerwise import captured
from meshwright.cluster import parse_cluster
from meshwright.plans.plan import JobSpec, Precision
from meshwright.solvers.planner import make_context
from meshwright.space.decision import Skeleton
from meshwright.space.evaluate import PlanSpace
from meshwright.space.skeletons import shardings_for, strategies_for

CASES = (
    ("gpt2", 64, "8xa100", {"dp_shard": 4}, 2, 8),
    ("llama2-7b", 64, "32xa100", {"dp_shard": 4, "tp": 2}, 4, 8),
    ("gpt3-175b", 1536, "1024xh100", {"dp_shard": 16, "tp": 8}, 8, 48),
)
"""Model, global batch, cluster, mesh of a stage, stages, micro-batches."""


def row(
    case: tuple[str, int, str, dict[str, int], int, int], num_plans: int, runs: int
) -> dict[str, Any]:
    """Plans a second on one space, with the schedule simulated and by the closed form."""
    model, batch, cluster, sizes, num_stages, num_microbatches = case
    context = make_context(
        captured(model, batch),
        reference=model,
        cluster=parse_cluster(cluster),
        job=JobSpec(global_batch=batch, precision=Precision.BF16),
    )
    skeleton = Skeleton.of(sizes, num_stages=num_stages, num_microbatches=num_microbatches)
    first = shardings_for(context, skeleton)[0]
    strategies = [s for s in strategies_for(context, skeleton) if s.sharding == first]
    space = PlanSpace(context, skeleton, strategies)
    rng = np.random.default_rng(0)
    count = space.num_segments
    assignment = rng.integers(space.num_strategies, size=(num_plans, count))
    cuts = [
        np.sort(rng.choice(np.arange(1, count), num_stages - 1, replace=False))
        for _ in range(num_plans)
    ]
    starts = np.concatenate([np.zeros((num_plans, 1), np.int64), np.array(cuts)], axis=1)
    found: dict[str, Any] = {
        "model": model,
        "segments": count,
        "strategies": space.num_strategies,
        "stages": num_stages,
        "micro_batches": num_microbatches,
        "plans": num_plans,
        "n": runs,
    }
    for name, simulate in (("simulated", True), ("closed_form", False)):
        rates = []
        for _ in range(runs):
            start_s = time.process_time()
            space.evaluate(assignment, starts, simulate=simulate)
            rates.append(num_plans / (time.process_time() - start_s))
        found[f"{name}_plans_per_s_median"] = round(statistics.median(rates))
        found[f"{name}_plans_per_s_min"] = round(min(rates))
        found[f"{name}_plans_per_s_max"] = round(max(rates))
    return found


def main() -> None:
    """Every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=4000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("-o", "--output", default="benchmarks/results/evaluations.json")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(row(case, options.plans, options.runs))
        print(json.dumps(rows[-1]), flush=True)
    document = {
        **heading("plans evaluated per second from priced segments"),
        "rows": rows,
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
