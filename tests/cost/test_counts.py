"""What the cost model counts is what the lowered programs contain."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from meshwright.plans.plan import ParallelPlan, Recompute
from meshwright.space.search import SearchContext
from meshwright.spmd.program import Collective, StageProgram
from tests.cost.graphs import tiny_gpt, zoo
from tests.cost.plans import context_of, lowered, uniform_plan

DATA_CAUSES = {"zero_gather", "dp_gradient"}


@dataclass(frozen=True)
class Case:
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    num_microbatches: int = 1
    zero_stage: int = 0
    recompute: Recompute = Recompute.NONE
    sequence_parallel: bool = False


CASES = [
    Case(dp_replicate=2),
    Case(dp_shard=2, num_microbatches=2, zero_stage=1),
    Case(dp_shard=4, zero_stage=2, num_microbatches=2, recompute=Recompute.SELECTIVE),
    Case(dp_shard=2, zero_stage=3, num_microbatches=2, recompute=Recompute.FULL),
    Case(dp_replicate=2, dp_shard=2, zero_stage=3),
    Case(tp=2),
    Case(tp=4, recompute=Recompute.FULL),
    Case(dp_replicate=2, tp=2, sequence_parallel=True, recompute=Recompute.SELECTIVE),
    Case(pp=2, num_microbatches=4),
    Case(pp=2, dp_shard=2, tp=2, num_microbatches=2, zero_stage=2, recompute=Recompute.FULL),
]


def totals(
    program: StageProgram, num_microbatches: int
) -> tuple[dict[object, tuple[int, int]], dict[object, int]]:
    """Redistributions as (count, bytes) and data-parallel traffic in bytes, of one step."""
    counts: Counter[object] = Counter()
    sizes: Counter[object] = Counter()
    data: Counter[object] = Counter()
    for function, times in (
        (program.prologue, 1),
        (program.forward, num_microbatches),
        (program.backward, num_microbatches - 1),
        (program.backward_final, 1),
        (program.finalize_tied, 1),
        (program.publish, 1),
    ):
        for item in function.body if times else ():
            if not isinstance(item, Collective):
                continue
            key = (item.kind, item.axes)
            if item.cause in DATA_CAUSES:
                data[key] += times * item.num_bytes
            else:
                counts[key] += times
                sizes[key] += times * item.num_bytes
    return {key: (counts[key], sizes[key]) for key in counts}, dict(data)


Totals = list[tuple[dict[object, tuple[int, int]], dict[object, int]]]


def counted(context: SearchContext, plan: ParallelPlan) -> Totals:
    """The cost model's totals of every stage."""
    return [
        (
            {key: (item.count, item.num_bytes) for key, item in converts.items()},
            {key: item.num_bytes for key, item in data.items()},
        )
        for converts, data in zip(
            context.model.collective_counts(plan), context.model.data_bytes(plan), strict=True
        )
    ]


def contained(context: SearchContext, plan: ParallelPlan) -> Totals:
    """What the lowered programs contain."""
    return [totals(program, plan.num_microbatches) for program in lowered(context, plan)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpt_counts_equal_the_lowered_program(case: Case) -> None:
    context = context_of(tiny_gpt(), "cpu:8", 16)

    plan = uniform_plan(context, **vars(case))

    assert contained(context, plan) == counted(context, plan)


@pytest.mark.parametrize(
    ("reference", "case"),
    [
        ("tiny-llama", Case(dp_shard=2, tp=2, zero_stage=3, recompute=Recompute.FULL)),
        ("tiny-bert", Case(dp_replicate=2, tp=2, num_microbatches=2)),
    ],
)
def test_other_models_count_alike(reference: str, case: Case) -> None:
    context = context_of(zoo(reference, 8), "cpu:8", 8)

    plan = uniform_plan(context, **vars(case))

    assert contained(context, plan) == counted(context, plan)


def test_one_table_serves_every_split_of_the_batch() -> None:
    """The table for many splits prices a plan as its own table does."""
    context = context_of(tiny_gpt(), "cpu:8", 16)
    model = context.model
    plan = uniform_plan(context, dp_shard=4, tp=2, num_microbatches=4, zero_stage=1)
    shards = [entry.shard for entry in plan.segment_plans(model.segment_classes)]
    sizes = {"dp_shard": 4, "tp": 2, "micro": 4}
    from meshwright.cost.model import choice_of
    from meshwright.cost.table import CostTable
    from meshwright.cost.write_columns import columns_of
    from meshwright.spmd.sharded import shard_graph

    sharded = shard_graph(
        model.analysis, model.segmentation, model.labels, shards=shards, axis_sizes=sizes
    )
    exact = model.pricer.price(
        CostTable(columns_of(sharded, scaled=False), is_rounded=False),
        choice_of(plan, model.segment_classes),
    )
    general = model.cost(plan)

    assert pytest.approx(exact.breakdown_s) == general.breakdown_s
    assert pytest.approx(exact.memory.peak_bytes) == general.memory.peak_bytes
