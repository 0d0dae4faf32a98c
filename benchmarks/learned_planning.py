"""Claim: the cost tables of GPT-3 175B on 1,024 H100 take 3 s at most, planning at -O1 10 s.

    OMP_NUM_THREADS=1 python -m benchmarks.learned_planning [--repeats 3] [-o FILE]

Plans at -O1 with the analytic and with the learned prices, in turn, in this process, the graph
captured beforehand. Timed beside the whole: what it took to build every cost table of the search,
and the network to price its operators. Seconds are the processor's, of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.heading import heading
from meshwright.capture import capture
from meshwright.capture.references import resolve_model
from meshwright.cluster import Cluster, Device, parse_cluster
from meshwright.cost.pricing import ANALYTIC, OperatorPricer, Priced, Pricing
from meshwright.cost.tabulate import Tabulator
from meshwright.cost.work import OperatorWork
from meshwright.gnn_cost.pretrained_pricing import load_pricing
from meshwright.graph.opgraph import OpGraph
from meshwright.plans import JobSpec
from meshwright.plans.plan import Precision
from meshwright.runtime.job import TORCH_DTYPES
from meshwright.solvers.planner import plan_graph

MODEL, CLUSTER, BATCH = "gpt3-175b", "1024xh100", 1536
TABLES_BAR_S, PLANNING_BAR_S = 3.0, 10.0


class Watched:
    """A pricer that counts what it is asked."""

    def __init__(self, pricer: OperatorPricer) -> None:
        self._pricer = pricer
        self.calls = self.rows = 0
        self.seconds = 0.0

    def operators(self, work: OperatorWork, device: Device) -> Priced:
        start_s = time.process_time()
        found = self._pricer.operators(work, device)
        self.seconds += time.process_time() - start_s
        self.calls += 1
        self.rows += work.count
        return found


class Timed:
    """Times a method while it takes its place."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.calls, self.seconds = 0, 0.0

    @property
    def call(self) -> Callable[..., Any]:
        """What to put in the method's place."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s = time.process_time()
            try:
                return self._method(*args, **kwargs)
            finally:
                self.calls += 1
                self.seconds += time.process_time() - start_s

        return timed


def planned(graph: OpGraph, cluster: Cluster, job: JobSpec, pricing: Pricing) -> dict[str, Any]:
    """One search: its seconds, and those of the network in it."""
    watched = None if pricing.operators is None else Watched(pricing.operators)
    if watched is not None:
        pricing = replace(pricing, operators=watched)
    tables = Timed(Tabulator.columns)
    start_s = time.process_time()
    with patch.object(Tabulator, "columns", tables.call):
        result = plan_graph(
            graph, reference=MODEL, cluster=cluster, job=job, level="O1", pricing=pricing
        )
    found: dict[str, Any] = {
        "search_s": time.process_time() - start_s,
        "tables_s": tables.seconds,
        "tables": tables.calls,
        "evaluations": result.search.evaluations,
        "mesh": repr(result.plan.mesh),
        "step_time_s": result.plan.prediction.step_time_s if result.plan.prediction else None,
    }
    if watched is not None:
        found |= {
            "network_s": watched.seconds,
            "network_calls": watched.calls,
            "operators_priced": watched.rows,
        }
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {
        "median": float(np.median(values)),
        "least": min(values),
        "most": max(values),
        "n": len(values),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    job = JobSpec(global_batch=BATCH, precision=Precision.BF16)
    source, dtype = resolve_model(MODEL), TORCH_DTYPES[job.precision]
    args, kwargs = source.example_inputs(BATCH, None, "meta", dtype=dtype)
    start_s = time.process_time()
    captured = capture(source.build(dtype), args, kwargs, name=MODEL)
    capture_s = time.process_time() - start_s
    cluster = parse_cluster(CLUSTER)
    rows: dict[str, list[dict[str, Any]]] = {"analytic": [], "learned": []}
    for _ in range(options.repeats):
        for name, pricing in (("analytic", ANALYTIC), ("learned", load_pricing())):
            rows[name].append(planned(captured.graph, cluster, job, pricing))
    learned, analytic = rows["learned"], rows["analytic"]
    found = heading(
        "cost tables of GPT-3 175B on 1,024 H100 in 3 s, operators priced; planning at -O1 in 10 s",
        bars_s={"tables": TABLES_BAR_S, "planning": PLANNING_BAR_S},
        capture_s=capture_s,
        tables_and_network_s=spread([row["tables_s"] + row["network_s"] for row in learned]),
        network_s=spread([row["network_s"] for row in learned]),
        capture_and_search_s=spread([capture_s + row["search_s"] for row in learned]),
        learned_over_analytic_search=spread(
            [
                one["search_s"] / other["search_s"]
                for one, other in zip(learned, analytic, strict=True)
            ]
        ),
        rows=rows,
    )
    text = json.dumps(found, indent=2) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
