"""Claim: the learned model prices at least 20,000 operators a second, and loads in under 0.3 s.

    OMP_NUM_THREADS=1 python -m benchmarks.prediction_speed [--weights FILE] [-o FILE]

Operators of mixed families and sizes, alone; in graphs of 500 with an edge from each to the next,
of which those carry messages that join families that were fitted together (their share is told);
and products in graphs of 500 in the order of a stream, where with the package's weights every edge
does. Seconds are the processor's, of
one thread, so that others on the machine do not count. Loading is timed in fresh processes, the
import of the module included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.heading import heading
from meshwright.cluster.catalog import find_device
from meshwright.cost.work import EdgeKind, Family, OperatorWork
from meshwright.gnn_cost.predictor import LearnedOperators, load_operators, pretrained
from meshwright.gnn_cost.trust import is_seen

NUM_OPERATORS = 50_000
REPEATS = 7
GRAPH_LENGTH = 500
FAMILIES = (Family.MATMUL, Family.NORM, Family.ELEMENTWISE, Family.ATTENTION)


def random_operators(
    rng: np.random.Generator, families: Sequence[Family], edge: EdgeKind | None
) -> OperatorWork:
    family = rng.choice(families, NUM_OPERATORS)
    dims = np.round(2.0 ** rng.uniform(4, 13, (NUM_OPERATORS, 4)))
    dims[family != Family.ATTENTION, 0] = 1
    b, m, n, k = dims.T
    is_product = np.isin(family, (Family.MATMUL, Family.ATTENTION))
    first = np.flatnonzero(np.arange(NUM_OPERATORS) % GRAPH_LENGTH < GRAPH_LENGTH - 1)
    first = first[:0] if edge is None else first
    return OperatorWork(
        family=family.astype(np.int64),
        dtype=np.full(NUM_OPERATORS, 3),
        dims=dims,
        flop=np.where(is_product, 2 * b * m * n * k, b * m * n),
        num_bytes=2 * b * np.where(is_product, m * k + k * n + m * n, 2 * m * n),
        edges=np.stack([first, first + 1]),
        edge_kind=np.full(len(first), int(edge or 0)),
    )


def operators_per_s(
    model: LearnedOperators, families: Sequence[Family], edge: EdgeKind | None
) -> dict[str, float]:
    device = find_device("a100-sxm-80gb", where="benchmark").device
    work = random_operators(np.random.default_rng(0), families, edge)
    rates = []
    for _ in range(REPEATS + 1):
        start_s = time.process_time()
        model.operators(work, device)
        rates.append(NUM_OPERATORS / (time.process_time() - start_s))
    if edge is None:
        return spread(rates[1:])
    seen = model.tensors.get("edges_seen") if model.uses_messages else None
    carries = 0.0 if seen is None else float(is_seen(seen, work).mean())
    return {**spread(rates[1:]), "share_of_edges_with_messages": carries}


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": float(np.median(values)),
        "least": min(values),
        "most": max(values),
        "n": len(values),
    }


def load_times_s() -> list[float]:
    """Of fresh processes: the module's own import and the weights, numpy being there already."""
    program = (
        "import time, numpy, meshwright.cost.pricing; start = time.process_time();"
        "from meshwright.gnn_cost.predictor import pretrained; pretrained();"
        "print(time.process_time() - start); import sys; assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program]
    return [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(REPEATS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("-o", type=Path)
    chosen = parser.parse_args()
    model = pretrained() if chosen.weights is None else load_operators(chosen.weights)
    result: dict[str, Any] = heading("20,000 operators a second, loaded in 0.3 s", n=REPEATS)
    result["operators_per_s"] = {
        "alone": operators_per_s(model, FAMILIES, None),
        f"in graphs of {GRAPH_LENGTH}": operators_per_s(model, FAMILIES, EdgeKind.DATA),
        f"products in graphs of {GRAPH_LENGTH}": operators_per_s(
            model, (Family.MATMUL,), EdgeKind.ORDER
        ),
    }
    if chosen.weights is None:
        result["load_s"] = spread(load_times_s())
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.o is not None:
        chosen.o.write_text(text + "\n")


if __name__ == "__main__":
    main()
