"""Claim: operators of a large model are sharded one by one, mesh chosen, in seconds.

    python -m benchmarks.operator_level [--runs 3] -o FILE

Llama-3-8B on 64 H100: from the start of the process to the plan, capture included. Every run is a
process of its own; time and peak memory are the operating system's account of it. The plan is
that of ``OperatorLevel`` alone: one integer program for each mesh over all segment classes, no
rule about what tensor parallelism cuts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.heading import heading

MODEL, CLUSTER, BATCH = "llama3-8b", "64xh100", 512
BAR_S, BAR_BYTES = 10.0, 2e9


def planned(model: str, cluster: str, batch: int) -> dict[str, Any]:
    """Plan in this process; seconds of each part and what was chosen."""
    start = time.perf_counter()
    from meshwright.capture import capture
    from meshwright.capture.references import resolve_model
    from meshwright.cluster import parse_cluster
    from meshwright.plans.plan import JobSpec, Precision
    from meshwright.solvers.operator_search import OperatorLevel
    from meshwright.solvers.planner import make_context

    imported = time.perf_counter()
    source = resolve_model(model)
    args, kwargs = source.example_inputs(batch, dtype="bfloat16")
    graph = capture(source.build("bfloat16", "meta"), args, kwargs, name=model).graph
    captured = time.perf_counter()
    context = make_context(
        graph,
        reference=model,
        cluster=parse_cluster(cluster),
        job=JobSpec(global_batch=batch, precision=Precision.BF16),
    )
    analyzed = time.perf_counter()
    result = OperatorLevel().propose(context)
    done = time.perf_counter()
    best = result.candidates[0]
    plan = best.plan
    return {
        "operators": len(graph.ops),
        "import_s": imported - start,
        "capture_s": captured - imported,
        "analysis_s": analyzed - captured,
        "operator_level_s": done - analyzed,
        "plans_priced": result.evaluations,
        "step_time_s": best.time_s,
        "mesh": [plan.mesh.pp, *plan.mesh.stage_shape],
        "num_microbatches": plan.num_microbatches,
        "zero_stage": plan.segments[0].zero_stage,
        "shard": [entry.shard for entry in plan.segments],
        "exceptions": sum(len(entry.operators) for entry in plan.segments),
    }


def measured() -> dict[str, Any]:
    """One planning process: wall and CPU seconds, peak resident bytes."""
    command = [sys.executable, "-m", "benchmarks.operator_level", "--one"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        **json.loads(text),
    }


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", action="store_true", help="plan once, here, and print it")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.one:
        from meshwright.cli.garbage import few_collections

        with few_collections():  # as ``meshwright plan`` does
            print(json.dumps(planned(MODEL, CLUSTER, BATCH)))
        return
    runs = [measured() for _ in range(options.runs)]
    seconds = [run["seconds"] for run in runs]
    document = {
        **heading(f"{MODEL} on {CLUSTER} at operator level, capture included, mesh chosen"),
        "bar": {"seconds": BAR_S, "peak_bytes": BAR_BYTES},
        "load_average_1_min": os.getloadavg()[0],
        "runs": runs,
        "median_s": statistics.median(seconds),
        "median_cpu_s": statistics.median(run["cpu_seconds"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
    }
    text = json.dumps(document, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
