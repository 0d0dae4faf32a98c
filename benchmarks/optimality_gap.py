"""Claim: on instances small enough to price every plan, -O2 finds the best one or nearly so.

    python -m benchmarks.optimality_gap --rows FILE [--seconds 400] [--output FILE]

An instance is a model, a batch, a cluster (with its own or slower links), a memory (ample or too
little for plain data parallelism) and pins that keep its plans few enough. ``Enumeration`` prices
all of them exactly; the gap of an answer is how much slower its plan is than the best of those.
Rows are appended to ``--rows`` as they come; instances already there are left out, so a run that
``--seconds`` has ended goes on where it stopped. With all rows there ``--output`` gets the report.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from meshwright.cluster import parse_cluster
from meshwright.cluster.model import Cluster
from meshwright.errors import NoFeasiblePlan
from meshwright.plans.plan import JobSpec
from meshwright.solvers.enumeration import Enumeration, num_plans
from meshwright.solvers.local_search import LOCAL_SEARCHES, LocalSearch
from meshwright.solvers.planner import make_context, proposers_of
from meshwright.solvers.portfolio import run_portfolio
from meshwright.space.pins import parse_pins
from meshwright.space.search import Proposer, SearchContext, SolveStatus
from meshwright.space.skeletons import shardings_for, skeletons
from meshwright.space.uniform import UniformChoice, largest_divisor, price
from tests.cost.graphs import zoo
from tests.solvers.variants import with_faster_links, with_memory

MODELS = (
    ("tiny-mlp?num_layers=3&inputs=1024&hidden=4096", (8, 64)),
    ("tiny-mlp?num_layers=8&hidden=1024", (8, 64)),
    ("tiny-mlp", (12,)),
    ("gpt2?num_layers=1&seq_len=128", (8,)),
    ("tiny-gpt?num_layers=1", (4, 16)),
    ("tiny-llama?num_layers=1", (8,)),
    ("tiny-moe?num_layers=1", (4,)),
    ("tiny-vit?num_layers=1", (12,)),
    ("tiny-bert?num_layers=1", (8,)),
    ("tiny-resnet?blocks=1", (24,)),
    ("tiny-dlrm", (64,)),
)
"""Models of few segment classes, and global batches."""

CLUSTERS = (
    "cpu:2",
    "cpu:4",
    "2xa100-80gb",
    "4xh100",
    "6xa100-80gb",
    "3xt4",
    "2x2xa100-80gb",
    "8xt4",
)
LINK_FACTORS = (1.0, 0.05)
MEMORIES = (None, 0.9, 0.7)
"""Shares of what plain data parallelism needs at its leanest; ``None``: ample."""

PINS: tuple[tuple[str, ...], ...] = (
    (),
    ("no-pipeline",),
    ("recompute=none",),
    ("no-zero",),
    ("no-tensor-parallel",),
    ("recompute=none", "no-pipeline"),
    ("no-zero", "no-pipeline"),
    ("no-tensor-parallel", "recompute=none"),
    ("no-tensor-parallel", "no-zero"),
    ("no-tensor-parallel", "no-pipeline"),
    ("no-zero", "recompute=none"),
    ("no-tensor-parallel", "no-zero", "no-pipeline"),
    ("no-tensor-parallel", "recompute=none", "no-pipeline"),
    ("no-tensor-parallel", "no-zero", "recompute=none"),
    ("no-zero", "recompute=none", "no-pipeline"),
)
"""Tried in turn; the one that leaves the most plans, but not too many, makes the instance."""

MAX_COST_S, MAX_SECONDS = 3.0, 60.0
"""Of one enumeration: as estimated, and at most."""

COMPARED_EVERY, COMPARED_EVALUATIONS = 7, 1000


@dataclass(frozen=True, slots=True)
class Instance:
    """What is planned."""

    model: str
    batch: int
    cluster: str
    links: float
    memory: float | None

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def instances() -> Iterator[Instance]:
    for model, batches in MODELS:
        for batch, cluster in itertools.product(batches, CLUSTERS):
            for links, memory in itertools.product(LINK_FACTORS, MEMORIES):
                yield Instance(model, batch, cluster, links, memory)


# One instance ----------------------------------------------------------------------------------


@cache
def _contexts(model: str, batch: int, cluster: str, links: float) -> SearchContext:
    where = with_faster_links(parse_cluster(cluster), links)
    return _context(model, batch, where)


def _context(model: str, batch: int, cluster: Cluster) -> SearchContext:
    job = JobSpec(global_batch=batch)
    return make_context(zoo(model, batch), reference=model, cluster=cluster, job=job, level="O2")


def context_of(instance: Instance) -> SearchContext:
    """The search, pinned so far that its plans can be enumerated."""
    ample = _contexts(instance.model, instance.batch, instance.cluster, instance.links)
    context = ample
    if instance.memory is not None:
        ways = largest_divisor(ample.batch, at_most=ample.cluster.num_devices)
        micro = ample.batch // ways if ample.can_split_step else 1
        plain = UniformChoice(dp_replicate=ways, num_microbatches=micro)
        needs = price(ample, plain, simulate=False).memory.peak_bytes.max()
        usable = 1.0 if instance.cluster.startswith("cpu") else 0.92
        memory_bytes = int(needs * instance.memory / usable)
        context = _context(instance.model, instance.batch, with_memory(ample.cluster, memory_bytes))
    sized = []
    for pins in PINS:
        pinned = replace(context, pins=parse_pins(pins))
        sized.append((num_plans(pinned), _enumeration_s(pinned), pinned))
    few = [(count, pinned) for count, seconds, pinned in sized if count and seconds < MAX_COST_S]
    if few:
        return max(few, key=lambda item: item[0])[1]
    return min((item for item in sized if item[0]), key=lambda item: item[1])[2]


def _enumeration_s(context: SearchContext) -> float:
    """About what pricing every plan costs: 2 ms each, and 20 ms for each way of sharding."""
    ways = {
        (skeleton.sizes["tp"], skeleton.sizes["ep"], skeleton.sizes["cp"]): len(
            shardings_for(context, skeleton)
        )
        for skeleton in skeletons(context)
    }
    tables = sum(count**context.model.segmentation.num_classes for count in ways.values())
    return 0.002 * num_plans(context) + 0.02 * tables


def answer_s(context: SearchContext, proposers: Sequence[Proposer]) -> float | None:
    """Step time of the plan a user would get."""
    try:
        return run_portfolio(context, proposers, top=1).winner.time_s
    except NoFeasiblePlan:
        return None


def compared(context: SearchContext) -> dict[str, float | None]:
    """By solver its answer, searches at equal evaluations."""
    found: dict[str, float | None] = {}
    for proposer in proposers_of(context):
        found.setdefault(proposer.name, answer_s(context, (proposer,)))
    for search in LOCAL_SEARCHES:
        assert isinstance(search, LocalSearch)
        limited = search.with_evaluations(COMPARED_EVALUATIONS)
        found[search.name] = answer_s(context, (limited,))
    return found


def row_of(instance: Instance, *, compare: bool) -> dict[str, Any]:
    context = context_of(instance)
    start = time.perf_counter()
    oracle = Enumeration().propose(context, time.monotonic() + MAX_SECONDS)
    middle = time.perf_counter()
    row: dict[str, Any] = {
        **asdict(instance),
        "pins": list(context.pins.texts),
        "plans": num_plans(context),
        "priced": oracle.evaluations,
        "oracle_seconds": middle - start,
    }
    if oracle.status in (SolveStatus.NOT_APPLICABLE, SolveStatus.STOPPED):
        return {**row, "skipped": oracle.notes.get("enumeration", "out of time")}
    fits = oracle.status is SolveStatus.DONE
    row["optimum_s"] = oracle.candidates[0].time_s if fits else None
    row["answer_s"] = answer_s(context, proposers_of(context))
    row["seconds"] = time.perf_counter() - middle
    if compare and fits:
        row["solvers"] = compared(context)
    return row


# The report ------------------------------------------------------------------------------------


def gaps_of(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Relative distance of each answer from the optimum; infinite where nothing was found."""
    return np.array(
        [
            (row["answer_s"] or float("inf")) / row["optimum_s"] - 1
            for row in rows
            if row.get("optimum_s")
        ]
    )


def report(rows: Sequence[dict[str, Any]], command: str) -> str:
    kept = [row for row in rows if row.get("optimum_s")]
    nothing = [row for row in rows if "skipped" not in row and row["optimum_s"] is None]
    skipped = [row for row in rows if "skipped" in row]
    gaps = gaps_of(kept)
    lines = [
        "Gap of -O2 to the proven optimum, by the model",
        "",
        f"made by: `{command}` ({platform.machine()}, {os.cpu_count()} cores, no GPU, "
        f"Python {platform.python_version()})",
        "",
        f"{len(kept)} instances of {len({row['model'] for row in kept})} models with "
        f"{min(row['plans'] for row in kept)} to {max(row['plans'] for row in kept)} plans; "
        f"where nothing fits ({len(nothing)} more) -O2 says so in "
        f"{sum(row['answer_s'] is None for row in nothing)} of {len(nothing)}; "
        f"{len(skipped)} left out: too many plans, or out of time.",
        "",
        "| | mean | p95 | max | exactly optimal | better than the enumerated space |",
        "| --- | --- | --- | --- | --- | --- |",
        _gap_row("-O2", gaps),
        "",
        "A negative gap: -O2 also mixes strategies inside a segment class, shards single "
        "operators, has unequal stages and knows more schedules than the enumeration; it counts "
        "as 0 in the mean.",
        "",
        *_grouped(kept),
        "",
        *_by_solver(kept),
        "",
    ]
    return "\n".join(lines)


def _gap_row(name: str, gaps: np.ndarray) -> str:
    positive = np.maximum(gaps, 0)
    return (
        f"| {name} | {positive.mean():.3%} | {np.quantile(positive, 0.95):.3%} | "
        f"{positive.max():.3%} | {(positive <= 1e-6).mean():.1%} | {(gaps < -1e-6).mean():.1%} |"
    )


def _grouped(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| by | n | mean | p95 | max |", "| --- | --- | --- | --- | --- |"]
    for field in ("model", "cluster", "links", "memory"):
        for value in dict.fromkeys(row[field] for row in rows):
            gaps = np.maximum(gaps_of([row for row in rows if row[field] == value]), 0)
            shown = "ample" if value is None else value
            lines.append(
                f"| {field} {shown} | {len(gaps)} | {gaps.mean():.3%} | "
                f"{np.quantile(gaps, 0.95):.3%} | {gaps.max():.3%} |"
            )
    return lines


def _by_solver(rows: Sequence[dict[str, Any]]) -> list[str]:
    rows = [row for row in rows if "solvers" in row]
    lines = [
        f"Each solver alone on {len(rows)} of them, annealing, genetic and beam with "
        f"{COMPARED_EVALUATIONS} evaluations each:",
        "",
        "| solver | found a plan | mean gap of those | p95 | max | exactly optimal |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(name for row in rows for name in row["solvers"]):
        answers = [(row["solvers"].get(name), row["optimum_s"]) for row in rows]
        gaps = np.array([max(mine / best - 1, 0) for mine, best in answers if mine])
        if not len(gaps):
            lines.append(f"| {name} | 0% | | | | |")
            continue
        lines.append(
            f"| {name} | {len(gaps) / len(rows):.0%} | {gaps.mean():.2%} | "
            f"{np.quantile(gaps, 0.95):.2%} | {gaps.max():.2%} | {(gaps <= 1e-6).mean():.0%} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--part", default="1/1", help="every n-th instance from the k-th: k/n")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    first, step = (int(number) for number in options.part.split("/"))
    text = options.rows.read_text(encoding="utf-8") if options.rows.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    keys = {Instance(*(row[f] for f in Instance.__dataclass_fields__)).key for row in rows}
    every = list(enumerate(instances()))
    part = every[first - 1 :: step]
    with options.rows.open("a", encoding="utf-8") as file:
        for number, instance in part:
            if instance.key in keys or time.monotonic() > end:
                continue
            row = row_of(instance, compare=number % COMPARED_EVERY == 0)
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    print(f"{len(rows)} of {len(every)} instances")
    if options.output is not None and len(rows) >= len(part):
        of = "" if step == 1 else f" --part {options.part}"
        command = f"python -m benchmarks.optimality_gap --rows ROWS{of} --output FILE"
        options.output.write_text(report(rows, command), encoding="utf-8")


if __name__ == "__main__":
    main()
