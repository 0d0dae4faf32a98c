"""Claim: the same operators timed twice differ by at most 5 % in the median, from 1 ms on.

    OMP_NUM_THREADS=1 python -m benchmarks.repeatability [--busy 2] [-o FILE]

Operators of every family, forward, backward and update, in fp32 and bf16. The second sweep runs in
the opposite order, so that the time between the two measurements of an operator is anything from
nothing to the whole run, and slow drift of the machine shows. Then the same beside processes that
do nothing but compute (``--busy``, 0 for none), first by the clock on the wall, then by the
processor's time of the process. The load the machine had anyway stands in the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.heading import heading
from meshwright.profiling.operators import (
    FAMILIES,
    Candidate,
    DtypeName,
    Limits,
    OperatorBench,
    sampled_candidates,
)
from meshwright.profiling.operators.running import candidate_problem
from meshwright.profiling.timer import Effort

SHORTEST_S = 1e-3
BAR = 0.05
LIMITS = Limits(flop=2e9, bytes=2**26)
"""Of what is drawn: well below a second for each call."""


def chosen(num_ops: int, seed: int, device: str) -> list[tuple[Candidate, float]]:
    """Candidates that take 1 ms or more, spread over families, and about how long they take."""
    dtypes = [DtypeName.FP32, DtypeName.BF16]
    pool = [
        candidate
        for candidate in sampled_candidates(
            list(FAMILIES), dtypes, num_shapes=4, limits=LIMITS, seed=seed
        )
        if not candidate_problem(candidate, device=device)
    ]
    order = np.random.default_rng(seed).permutation(len(pool))
    quick = OperatorBench(
        device=device, effort=Effort(budget_s=0.02, max_repeats=9), keep_memory=True
    )
    found: list[tuple[Candidate, float]] = []
    for index in order:
        median_s = quick.measure(pool[index]).median
        if SHORTEST_S <= median_s <= 0.1:
            found.append((pool[index], median_s))
        if len(found) == num_ops:
            break
    return found


def sweep(candidates: Sequence[Candidate], bench: OperatorBench) -> dict[object, float]:
    """Median seconds by candidate."""
    return {candidate.key: bench.measure(candidate).median for candidate in candidates}


def compared(candidates: Sequence[Candidate], bench: OperatorBench, *, name: str) -> dict[str, Any]:
    """Both sweeps and how they differ."""
    load_before, start_s = os.getloadavg()[0], time.monotonic()
    first = sweep(candidates, bench)
    second = sweep(candidates[::-1], bench)
    rows = []
    for candidate in candidates:
        one_s, two_s = first[candidate.key], second[candidate.key]
        if min(one_s, two_s) >= SHORTEST_S:
            difference = abs(one_s - two_s) / ((one_s + two_s) / 2)
            rows.append(
                {
                    "operator": str(candidate),
                    "first_s": one_s,
                    "second_s": two_s,
                    "relative_difference": round(difference, 4),
                }
            )
    differences = [row["relative_difference"] for row in rows]
    if not differences:
        raise SystemExit("no operator took 1 ms or more in both sweeps; give more with --ops")
    return {
        "condition": name,
        "clock": "process_time" if bench.processor_time else "wall",
        "operators": len(rows),
        "median_relative_difference": round(statistics.median(differences), 4),
        "p90_relative_difference": round(float(np.quantile(differences, 0.9)), 4),
        "max_relative_difference": max(differences),
        "bar_is_met": statistics.median(differences) <= BAR,
        "load_average_before": round(load_before, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
        "seconds": round(time.monotonic() - start_s, 1),
        "rows": rows,
    }  # fmt: skip


@contextmanager
def busy(num_processes: int) -> Iterator[None]:
    """Others who compute: matrix products that fill the caches too."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_spin, daemon=True) for _ in range(num_processes)]
    for other in others:
        other.start()
    time.sleep(3.0 if others else 0.0)
    try:
        yield
    finally:
        for other in others:
            other.terminate()
            other.join()


def _spin() -> None:
    torch.set_num_threads(1)
    matrix = torch.ones(1024, 1024)
    while True:
        matrix = torch.tanh(matrix @ matrix)


def main() -> None:
    """Alone and beside busy processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", type=int, default=30)
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--effort", type=float, default=0.7, help="seconds for each measurement")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="benchmarks/results/repeatability.json")
    options = parser.parse_args()
    effort = Effort(budget_s=options.effort)
    wall = OperatorBench(device=options.device, effort=effort, keep_memory=True)
    candidates = [item for item, _ in chosen(options.ops, options.seed, options.device)]
    results = [compared(candidates, wall, name="nothing else started")]
    if options.busy:
        used = dataclasses.replace(wall, processor_time=True)
        fewer = candidates[: len(candidates) // 2]
        with busy(options.busy):
            name = f"beside {options.busy} busy processes"
            results.append(compared(fewer, wall, name=name))
            results.append(compared(fewer, used, name=name))
    document = {
        **heading(
            "the same sweep twice: median relative difference at most 5 % from 1 ms on",
            threads=torch.get_num_threads(),
            method="median of repeats, second sweep in the opposite order",
        ),
        "results": results,
    }
    for result in results:
        print(json.dumps({key: value for key, value in result.items() if key != "rows"}))
    Path(options.output).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
