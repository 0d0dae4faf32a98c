"""Checks that ``validate``, ``explain`` and ``run`` share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from meshwright.cluster import Cluster, parse_cluster
from meshwright.cost.pricing import ANALYTIC, Pricing
from meshwright.errors import DoesNotFit, PlanRefused
from meshwright.graph.segments import Segmentation
from meshwright.plans import ParallelPlan, Prediction, check_plan
from meshwright.spmd.program import Collective, StageProgram
from meshwright.units import format_bytes

__all__ = ["check_against", "check_fits", "check_traffic", "pricing_of_plan"]

_DATA_CAUSES = frozenset({"zero_gather", "dp_gradient"})
"""Collectives whose number depends on how buckets fill; their bytes do not."""

_Traffic = dict[tuple[str, tuple[str, ...]], tuple[int, int]]
"""Calls and bytes by kind and axes."""


def check_against(
    plan: ParallelPlan, *, cluster: Cluster, segmentation: Segmentation, graph_sha256: str
) -> None:
    """Check that ``plan`` is for this graph and cluster.

    Raises:
        PlanRefused: it is not.
    """
    check_plan(
        plan,
        num_devices=cluster.num_devices,
        num_segments=len(segmentation.segments),
        segment_classes=[segment.segment_class for segment in segmentation.segments],
        host_of_device=[
            number for number, host in enumerate(cluster.hosts) for _ in range(host.num_devices)
        ],
        graph_sha256=graph_sha256,
    )


def pricing_of_plan(plan: ParallelPlan, name: str | None) -> Pricing:
    """What ``--cost-model`` names; without it, the kind of cost model that priced ``plan``.

    Raises:
        BadRequest: there is no such cost model.
        BadClusterFile: the plan's cluster cannot be read.
    """
    from meshwright.gnn_cost.pretrained_pricing import named_pricing

    if name is None and plan.provenance.cost_model == ANALYTIC.label:
        return ANALYTIC
    return named_pricing(name, parse_cluster(plan.cluster))


def check_fits(prediction: Prediction) -> None:
    """Check that the plan fits the memory of its devices.

    Raises:
        DoesNotFit: with what it needs most memory for.
    """
    if prediction.fits:
        return
    cause, num_bytes = max(prediction.memory_breakdown.items(), key=lambda item: item[1])
    raise DoesNotFit(
        f"the plan needs {format_bytes(prediction.peak_memory_bytes)} on its fullest device, which "
        f"has {format_bytes(prediction.memory_capacity_bytes)} ({cause.replace('_', ' ')} take "
        f"{format_bytes(num_bytes)}); plan again with `meshwright plan`, shard or recompute more, "
        "or use more devices"
    )


def check_traffic(
    plan: ParallelPlan, programs: Sequence[StageProgram], model: Any
) -> tuple[int, int]:
    """Compare the collectives of the lowered programs with those ``model`` prices.

    Number and bytes of collectives between operators must be equal, of gradient reductions and
    ZeRO gathers the bytes: their number depends on how buckets fill.

    Returns:
        Collectives and bytes of one step of one rank of every stage, summed.

    Raises:
        PlanRefused: they differ, which is a mistake of ours.
    """
    between, data = model.collective_counts(plan), model.data_bytes(plan)
    num_calls = num_bytes = 0
    for stage, program in enumerate(programs):
        found_between, found_data = _traffic(program, plan.num_microbatches)
        num_calls += sum(calls for calls, _ in (*found_between.values(), *found_data.values()))
        num_bytes += sum(size for _, size in (*found_between.values(), *found_data.values()))
        expected = {
            (str(kind), tuple(axes)): (item.count, item.num_bytes)
            for (kind, axes), item in between[stage].items()
        }
        _compare(stage, expected, found_between, "between operators")
        _compare(
            stage,
            {
                (str(kind), tuple(axes)): (0, item.num_bytes)
                for (kind, axes), item in data[stage].items()
            },
            {key: (0, size) for key, (_, size) in found_data.items()},
            "of gradients and ZeRO",
        )
    return num_calls, num_bytes


def _traffic(program: StageProgram, num_microbatches: int) -> tuple[_Traffic, _Traffic]:
    """Collectives of one step between operators, and of gradients and ZeRO."""
    calls: tuple[Counter[Any], Counter[Any]] = (Counter(), Counter())
    sizes: tuple[Counter[Any], Counter[Any]] = (Counter(), Counter())
    for function, times in (
        (program.prologue, 1),
        (program.forward, num_microbatches),
        (program.backward, num_microbatches - 1),
        (program.backward_final, 1),
        (program.finalize_tied, 1),
        (program.publish, 1),
    ):
        for item in function.body:
            if isinstance(item, Collective) and times:
                side, key = int(item.cause in _DATA_CAUSES), (str(item.kind), item.axes)
                calls[side][key] += times
                sizes[side][key] += times * item.num_bytes
    between, data = (
        {key: (calls[side][key], sizes[side][key]) for key in calls[side]} for side in (0, 1)
    )
    return between, data


def _compare(stage: int, expected: _Traffic, found: _Traffic, what: str) -> None:
    for key in sorted({*expected, *found}):
        if expected.get(key, (0, 0)) != found.get(key, (0, 0)):
            kind, axes = key
            priced, lowered = expected.get(key, (0, 0)), found.get(key, (0, 0))
            raise PlanRefused(
                f"stage {stage}: collectives {what}, {kind} along {'+'.join(axes)}: the cost model "
                f"prices {priced[0]} calls and {priced[1]} bytes, the lowered program has "
                f"{lowered[0]} and {lowered[1]}; this is a mistake of ours, please report it"
            )
