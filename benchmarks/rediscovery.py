"""Claim: expert plans come out of the bare program; known plans are matched or beaten.

    python -m benchmarks.rediscovery [--only NAME] -o FILE

``layouts``: what the integer program (``solvers.operators``) cuts at real sizes, without any rule
about what tensor parallelism cuts, and how near its price is to the exact model's. ``shapes``: the
plan shapes that Alpa reports for its GPT and MoE models (arXiv 2201.12023; p3.16xlarge hosts, which
have 8 V100-16GB and 25 Gb/s), each priced by our model with the best recompute, ZeRO stage and
sharding for that shape, against the best plan of our own searches on the same cluster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.heading import heading
from meshwright.capture import capture
from meshwright.capture.references import resolve_model
from meshwright.cluster import parse_cluster
from meshwright.cluster.model import Cluster
from meshwright.errors import PlannerError
from meshwright.plans.plan import AXIS_NAMES, JobSpec, Precision, Recompute
from meshwright.solvers.exhaustive import Exhaustive
from meshwright.solvers.frontier import Frontier
from meshwright.solvers.layerwise import LayerwiseDP
from meshwright.solvers.operator_search import OperatorLevel
from meshwright.solvers.operators import OperatorProblem, operator_shardings
from meshwright.solvers.planner import make_context
from meshwright.solvers.stage_options import StageOption, pools_of
from meshwright.solvers.staged import StagePick, staged_plan
from meshwright.space.decision import Decision, Sharding, Skeleton, Strategy
from meshwright.space.evaluate import candidate_of_decision
from meshwright.space.partition import least_bottleneck
from meshwright.space.search import Candidate, SearchContext
from meshwright.space.skeletons import shardings_for
from meshwright.space.uniform import UniformChoice, stage_times_s

P3_BYTES_PER_S = 25e9 / 8 / 8
"""25 Gb/s a host (AWS, p3.16xlarge), shared by its 8 devices."""


def context_of(model: str, batch: int, cluster: Cluster, precision: Precision) -> SearchContext:
    """Capture and analyze."""
    dtype = {Precision.BF16: "bfloat16", Precision.FP16: "float16"}[precision]
    source = resolve_model(model)
    args, kwargs = source.example_inputs(batch, dtype=dtype)
    graph = capture(source.build(dtype, "meta"), args, kwargs, name=model).graph
    job = JobSpec(global_batch=batch, precision=precision)
    return make_context(graph, reference=model, cluster=cluster, job=job)


# Layouts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayoutCase:
    """A program to solve and what it shows."""

    shows: str
    model: str
    cluster: str
    batch: int
    sizes: dict[str, int]
    num_microbatches: int
    without: frozenset[str] = frozenset()
    memory_gib: float | None = None


TOKENS = frozenset({"batch", "sequence"})
LAYOUTS = (
    LayoutCase(
        "Megatron column-then-row, vocabulary-parallel embedding and loss",
        "llama3-8b", "8xh100", 64, {"tp": 8}, 8, TOKENS,
    ),
    LayoutCase(
        "sequence-parallel form when memory asks",
        "llama3-8b", "8xh100", 64, {"tp": 8}, 64, frozenset({"batch"}), 36.0,
    ),
    LayoutCase(
        "Megatron on a model with biases and tied embedding",
        "gpt3-13b", "8xh100", 64, {"tp": 8}, 16, TOKENS,
    ),
    LayoutCase(
        "expert parallelism with all-to-all", "gpt-moe-10b", "8xh100", 64, {"ep": 8}, 1
    ),
    LayoutCase("data parallelism of a small ResNet", "resnet-50", "8xa100", 1024, {"tp": 8}, 1),
    LayoutCase(
        "channel split of Wide-ResNet where the batch is spent",
        "wide-resnet-50-4b", "8xv100-16gb", 4, {"tp": 8}, 1,
    ),
)  # fmt: skip


def layout_row(case: LayoutCase) -> dict[str, Any]:
    """Solve one case."""
    precision = Precision.FP16 if "v100" in case.cluster else Precision.BF16
    context = context_of(case.model, case.batch, parse_cluster(case.cluster), precision)
    labels = {name for names in context.model.labels.by_segment for name in names}
    start_s = time.perf_counter()
    problem = OperatorProblem(
        context,
        Skeleton.of(case.sizes, num_microbatches=case.num_microbatches),
        zero_stage=0,
        allowed={axis: frozenset(labels - case.without) for axis in case.sizes},
    )
    bound = None if case.memory_gib is None else case.memory_gib * 2**30
    choice = problem.solve(memory_bytes=bound)
    if choice is None:
        return {"shows": case.shows, "model": case.model, "error": "nothing fits the bound"}
    solved_s = time.perf_counter() - start_s
    plan = problem.plan(choice)
    return {
        "shows": case.shows,
        "model": case.model,
        "cluster": case.cluster,
        "mesh": case.sizes,
        "labels_not_allowed": sorted(case.without),
        "memory_bound_gib": case.memory_gib,
        "memory_gib": round(plan.memory_bytes / 2**30, 2),
        "build_and_solve_s": round(solved_s, 2),
        "variables_rows": problem.program.size,
        "gap_to_bound": round(plan.program_s / plan.bound_s - 1, 5),
        "program_over_exact": round(plan.repeated_s / plan.exact_s, 4),
        "lists": {
            segment.name or str(segment.segment_class): plan.sharding.labels_of(
                segment.segment_class
            )
            for segment in context.model.segmentation.representatives()
        },
        "exceptions": sum(len(every) for every in plan.sharding.operators_by_class),
    }


# Shapes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A plan shape from the literature."""

    model: str
    devices: int
    pp: int
    axes: dict[str, int]
    num_microbatches: int
    stages: tuple[tuple[int, int], ...] = ()
    """Layers and devices of each stage, where stages are unequal; data parallel inside."""


SHAPES = (
    Shape("gpt-1.3b", 4, 2, {"dp": 2}, 128),
    Shape("gpt-2.6b", 8, 3, {}, 128, ((8, 2), (8, 2), (16, 4))),
    Shape("gpt-6.7b", 16, 2, {"dp": 2, "tp": 4}, 64),
    Shape("gpt-15b", 32, 4, {"dp": 2, "tp": 4}, 128),
    Shape("gpt-39b", 64, 16, {"tp": 4}, 1024),
    Shape("gpt-moe-10b", 16, 2, {"ep": 8}, 16),
)  # fmt: skip
BATCH = 1024


def p3_cluster(devices: int) -> Cluster:
    """Hosts of 8 V100 with 25 Gb/s each."""
    cluster = parse_cluster(f"{devices}xv100-16gb")
    levels = tuple(
        (span, replace(link, name="ethernet-25g", bytes_per_s=P3_BYTES_PER_S, latency_s=3e-5))
        for span, link in cluster.levels
    )
    return replace(cluster, levels=levels)


def shape_candidates(context: SearchContext, shape: Shape) -> Iterator[Candidate]:
    """The shape with every sharding, ZeRO stage and recompute policy."""
    count = len(context.model.segment_classes)
    data = shape.axes.get("dp", 1)
    others = {axis: size for axis, size in shape.axes.items() if axis != "dp"}
    base = UniformChoice(tp=others.get("tp", 1), num_microbatches=shape.num_microbatches)
    starts = least_bottleneck(stage_times_s(context, base), shape.pp)
    assert starts is not None, f"{shape.model}: {shape.pp} stages of {count} segments"
    for is_sharded in (False, True) if data > 1 else (False,):
        axis = "dp_shard" if is_sharded else "dp_replicate"
        skeleton = Skeleton.of(
            {axis: data, **others},
            num_stages=shape.pp,
            num_microbatches=shape.num_microbatches,
        )
        shardings: list[Sharding] = list(shardings_for(context, skeleton))
        shardings += operator_shardings(context, skeleton)[:3]
        stages = (1, 2, 3) if is_sharded else (0,)
        for sharding, zero_stage, recompute in product(shardings, stages, Recompute):
            strategy = Strategy(sharding=sharding, zero_stage=zero_stage, recompute=recompute)
            decision = Decision(skeleton=skeleton, starts=starts, strategies=(strategy,) * count)
            try:
                yield candidate_of_decision(context, decision, solver="shape")
            except PlannerError:
                continue


def unequal_candidates(context: SearchContext, shape: Shape) -> Iterator[Candidate]:
    """Stages on sub-meshes of their own, with every ZeRO stage and recompute policy."""
    bounds = [0]
    for layers, _ in shape.stages:
        # Two embedding segments come first, and a layer is two segments.
        bounds.append(bounds[-1] + 2 * layers + (2 if len(bounds) == 1 else 0))
    bounds[-1] = len(context.model.segment_classes)
    runs = [tuple(range(*ends)) for ends in itertools.pairwise(bounds)]
    for zero_stage, recompute in product((0, 1, 2, 3), Recompute):
        picks = [
            StagePick(
                segments=segments,
                option=StageOption(
                    pool=0,
                    tp=1,
                    sequence_parallel=False,
                    data_parallel=size,
                    dp_shard=size if zero_stage else 1,
                    zero_stage=zero_stage,
                    recompute=recompute,
                ),
            )
            for segments, (_, size) in zip(runs, shape.stages, strict=True)
        ]
        plan = staged_plan(
            context,
            picks,
            pools_of(context.cluster),
            num_microbatches=shape.num_microbatches,
            solver="shape",
        )
        if plan is not None:
            yield Candidate(plan=plan, cost=context.model.cost(plan), solver="shape")


def shape_row(shape: Shape) -> dict[str, Any]:
    """Price one shape and our best plan."""
    context = context_of(shape.model, BATCH, p3_cluster(shape.devices), Precision.FP16)
    candidates = unequal_candidates if shape.stages else shape_candidates
    every = list(candidates(context, shape))
    fitting = sorted((c for c in every if c.cost.fits), key=lambda c: c.time_s)
    row: dict[str, Any] = {
        "model": shape.model,
        "devices": shape.devices,
        "shape": {"pp": shape.pp, **shape.axes, "micro_batches": shape.num_microbatches},
    }
    if shape.stages:
        row["shape"]["stages"] = [{"layers": layers, "dp": size} for layers, size in shape.stages]
    ours: list[Candidate] = []
    frontier = Frontier(context)
    for proposer in (Exhaustive(frontier.survey), LayerwiseDP(frontier), OperatorLevel()):
        result = proposer.propose(context, time.monotonic() + 120)
        ours += [c for c in result.candidates if c.cost.fits]
    if not ours:
        return {**row, "error": "none of our plans fits"}
    best = min(ours, key=lambda c: c.time_s)
    if not fitting:
        leanest = min(every, key=lambda c: float(c.cost.memory.peak_bytes.max()))
        row["shape_needs_gib"] = round(float(leanest.cost.memory.peak_bytes.max()) / 2**30, 2)
        row["error"] = "the shape does not fit by our model"
    else:
        entry = fitting[0].plan.segments[0]
        row["shape_s"] = round(fitting[0].time_s, 3)
        row["shape_choice"] = {"zero": entry.zero_stage, "recompute": entry.recompute}
        row["shape_breakdown_s"] = rounded(fitting[0].cost.breakdown_s)
        row["shape_over_best"] = round(fitting[0].time_s / best.time_s, 3)
    mesh = best.plan.mesh
    row["best_s"] = round(best.time_s, 3)
    row["best"] = {
        "solver": best.solver,
        "pp": mesh.pp,
        "axes": dict(zip(AXIS_NAMES, mesh.stage_shape, strict=True)),
        "micro_batches": best.plan.num_microbatches,
        "zero": best.plan.segments[0].zero_stage,
        "recompute": best.plan.segments[0].recompute,
    }
    row["best_breakdown_s"] = rounded(best.cost.breakdown_s)
    return row


def rounded(breakdown_s: dict[str, float]) -> dict[str, float]:
    """Without what is nothing."""
    return {cause: round(value, 3) for cause, value in breakdown_s.items() if value >= 5e-4}


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    claim = "expert plans come out of the bare program; known plans are matched or beaten"
    document: dict[str, Any] = {**heading(claim), "layouts": [], "shapes": []}
    for case in LAYOUTS:
        if options.only in case.model:
            document["layouts"].append(layout_row(case))
    for shape in SHAPES:
        if options.only in shape.model:
            document["shapes"].append(shape_row(shape))
    text = json.dumps(document, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
