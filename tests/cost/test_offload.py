"""Optimizer state on the host: what it saves, what it costs, where it is refused."""

from __future__ import annotations

import msgspec
import pytest

from meshwright.cluster.catalog import find_device
from meshwright.cost.offload import HOST_BYTES_PER_S
from meshwright.cost.step import StepCost
from meshwright.errors import PlanRefused
from meshwright.plans.plan import ParallelPlan, Precision
from meshwright.space.search import SearchContext
from tests.cost.graphs import tiny_gpt, zoo
from tests.cost.plans import context_of, uniform_plan


def offloaded(plan: ParallelPlan, *, only: int | None = None) -> ParallelPlan:
    """The plan with the optimizer state of all segment classes, or one, on the host."""
    segments = [
        msgspec.structs.replace(entry, offload=only is None or only == entry.segment_class)
        for entry in plan.segments
    ]
    return msgspec.structs.replace(plan, segments=segments)


def costs(context: SearchContext, plan: ParallelPlan) -> tuple[StepCost, StepCost]:
    """Without offload and with it."""
    return context.model.cost(plan), context.model.cost(offloaded(plan))


def context_of_bf16() -> SearchContext:
    graph = zoo("tiny-gpt?num_layers=2&hidden=32&num_heads=4&vocab_size=64", 16, "bfloat16")
    return context_of(graph, "2xa100", 16, Precision.BF16)


def test_time_is_the_way_there_and_back_and_the_host_step() -> None:
    """P parameters in bf16: 2 P bytes of gradients go, 2 P of parameters come.

    AdamW reads and writes what it would on the device, at the host's bandwidth.
    """
    context = context_of_bf16()
    plan = uniform_plan(context, dp_replicate=2)
    kept, moved = costs(context, plan)
    roofline = next(iter(context.model.pricer.rooflines.values()))
    num_parameters = context.model.analysis.graph.num_parameters
    traffic_bytes = kept.breakdown_s["optimizer"] * roofline.bytes_per_s
    expected_s = 4 * num_parameters / roofline.to_host_bytes_per_s
    expected_s += traffic_bytes / HOST_BYTES_PER_S

    assert expected_s == pytest.approx(moved.breakdown_s["optimizer"], rel=1e-9)
    assert moved.breakdown_s["optimizer"] > 3 * kept.breakdown_s["optimizer"]
    assert kept.breakdown_s["compute"] == moved.breakdown_s["compute"]


def test_moments_and_copy_leave_the_device() -> None:
    """AdamW in bf16: 12 bytes for each parameter, rounded up to 512 bytes a tensor."""
    context = context_of_bf16()
    kept, moved = costs(context, uniform_plan(context))
    num_parameters = context.model.analysis.graph.num_parameters

    assert 0 == moved.memory.by_cause["optimizer"][0]
    assert kept.memory.by_cause["optimizer"][0] >= 12 * num_parameters
    assert kept.memory.peak_bytes[0] - moved.memory.peak_bytes[0] >= 12 * num_parameters


def test_one_class_moves_alone() -> None:
    context = context_of_bf16()
    plan = uniform_plan(context)
    kept, every = costs(context, plan)
    one = context.model.cost(offloaded(plan, only=2))

    state = [cost.memory.by_cause["optimizer"][0] for cost in (kept, one, every)]
    assert state[0] > state[1] > state[2]
    assert kept.time_s < one.time_s < every.time_s


def test_a_chunk_of_zero_moves_alone() -> None:
    """ZeRO 1 over two ranks: each sends and steps half."""
    context = context_of_bf16()
    whole = context.model.cost(offloaded(uniform_plan(context, dp_shard=2)))
    halves = context.model.cost(offloaded(uniform_plan(context, dp_shard=2, zero_stage=1)))

    share = halves.breakdown_s["optimizer"] / whole.breakdown_s["optimizer"]
    assert share == pytest.approx(0.5, rel=0.02)


def test_a_device_without_a_way_to_the_host_is_refused() -> None:
    context = context_of(tiny_gpt(), "cpu:2", 16)

    with pytest.raises(PlanRefused, match="to_host_bytes_per_s"):
        context.model.cost(offloaded(uniform_plan(context, dp_replicate=2)))


@pytest.mark.parametrize(
    ("name", "bytes_per_s"), [("a100-sxm-80gb", 32e9), ("h100-sxm-80gb", 64e9), ("t4", 16e9)]
)
def test_the_way_to_the_host_is_that_of_the_bus(name: str, bytes_per_s: float) -> None:
    device = find_device(name, where="test").device

    assert bytes_per_s == device.to_host_bytes_per_s
    assert "to the host: PCI Express" in device.source
