"""What halos and rings of attention cost, counted by hand."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from meshwright.capture import capture
from meshwright.cluster import parse_cluster
from meshwright.cost.calibration import DEFAULTS
from meshwright.cost.collectives import collective_time_s
from meshwright.cost.neighbors import exposed_ring_s, of_every_rank, of_last_rank
from meshwright.cost.step import StepCost
from meshwright.cost.work import Family
from meshwright.cost.write_columns import columns_of
from meshwright.errors import PlanRefused
from meshwright.graph.opgraph import OpGraph
from meshwright.plans.plan import ParallelPlan, Precision
from meshwright.plans.runnable import unrunnable_reasons
from meshwright.space.search import SearchContext
from meshwright.spmd.prepared import prepare
from meshwright.spmd.program import CollectiveKind
from meshwright.spmd.sharded import shard_graph
from tests.cost.graphs import zoo
from tests.cost.plans import context_of, lowered, uniform_plan


class TwoConvolutions(nn.Module):
    """3x3 and then 5x5 with stride 2, on (N, 4, 16, 16), each with a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 8, 5, stride=2, padding=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).relu().sum()


def payloads(graph: OpGraph, shard: Mapping[str, tuple[str, ...]], ways: int) -> list[object]:
    """Phase, kind and bytes of every exchange inside an operator."""
    prepared = prepare(graph)
    (axis,) = shard
    sharded = shard_graph(
        prepared.analysis,
        prepared.segmentation,
        prepared.labels,
        shards=[
            {axis: [x for x in shard[axis] if x in (*names, "ring")]}
            for names in prepared.labels.by_segment
        ],
        axis_sizes={axis: ways},
    )
    columns = columns_of(sharded, scaled=False)
    table = columns.collectives
    return [
        (int(columns.nodes.phase[node]), table.groups[group][0].value, float(num_bytes))
        for node, group, num_bytes in zip(table.node, table.group, table.num_bytes, strict=True)
        if table.groups[group][0] in {CollectiveKind.HALO, CollectiveKind.RING}
    ]


def test_bytes_of_halos() -> None:
    """fp32, batch 2; a row of x has 2 * 4 * 16 * 4 = 512 bytes, one of the hidden image 1024.

    3x3: one row before and one after. 5x5 with stride 2: two before, one after (4 - 2 - 2 + 1).
    Backward the second gets its input's rows again and sends gradients of as many; the first needs
    no gradient of x.
    """
    graph = capture(TwoConvolutions(), (torch.zeros(2, 4, 16, 16),)).graph
    found = payloads(graph, {"tp": ("height", "height2")}, 2)

    assert [
        (1, "halo", 2 * 512.0),
        (1, "halo", 3 * 1024.0),
        (2, "halo", 3 * 1024.0),
        (2, "halo", 3 * 1024.0),
        (2, "halo", 2 * 512.0),
    ] == found


def test_a_halo_is_one_message_whatever_the_group() -> None:
    cluster = parse_cluster("8xa100")
    link = cluster.hosts[0].link
    expected_s = link.latency_s + 1e6 / (link.bytes_per_s * DEFAULTS.link_efficiency)

    for num_ranks in (2, 8):
        found_s = collective_time_s(
            CollectiveKind.HALO, 1e6, cluster=cluster, ranks=range(num_ranks)
        )
        assert expected_s == pytest.approx(found_s)


def test_bytes_of_a_ring() -> None:
    """Keys and values of all tokens, 16 * 8 * 32 * 4 bytes each; twice that backward."""
    reference = "tiny-gpt?num_layers=1&hidden=32&num_heads=4&vocab_size=64&seq_len=8"
    found = payloads(zoo(reference, 16), {"cp": ("sequence", "ring")}, 4)

    assert [(1, "ring", 16384.0)] * 2 + [(2, "ring", 16384.0)] * 4 == found


def test_a_ring_takes_one_step_less_than_ranks() -> None:
    cluster = parse_cluster("8xa100")
    link = cluster.hosts[0].link
    expected_s = 7 * (link.latency_s + 1e6 / (link.bytes_per_s * DEFAULTS.link_efficiency))
    found_s = collective_time_s(CollectiveKind.RING, 8e6, cluster=cluster, ranks=range(8))

    assert expected_s == pytest.approx(found_s)


def test_a_ring_hides_behind_attention() -> None:
    """Of 3 s, 2 s of compute hide 2, and 5 s hide all."""
    assert [1.0, 0.0] == exposed_ring_s(np.array([3.0, 3.0]), np.array([2.0, 5.0])).tolist()


# Context parallelism of a whole model ------------------------------------------------------------


def context_of_llama(num_kv_heads: int) -> SearchContext:
    reference = f"tiny-llama?num_kv_heads={num_kv_heads}&num_heads=8&hidden=512&seq_len=4096"
    return context_of(zoo(reference, 1, "bfloat16"), "8xh100", 1, Precision.BF16)


def with_context_parallel(
    context: SearchContext, ways: int, labels: tuple[str, ...]
) -> ParallelPlan:
    plan = uniform_plan(context)
    names = context.model.labels.by_segment
    first = {s.segment_class: s.index for s in context.model.segmentation.representatives()}
    segments = [
        msgspec.structs.replace(
            entry,
            shard={"cp": [x for x in labels if x in (*names[first[entry.segment_class]], "ring")]},
        )
        for entry in plan.segments
    ]
    stage = msgspec.structs.replace(plan.stages[0], num_devices=ways)
    mesh = msgspec.structs.replace(plan.mesh, cp=ways)
    return msgspec.structs.replace(plan, mesh=mesh, stages=[stage], segments=segments)


def step(context: SearchContext, ways: int, labels: tuple[str, ...]) -> StepCost:
    return context.model.cost(with_context_parallel(context, ways, labels))


def test_exchanging_heads_is_cheaper_than_gathering() -> None:
    """Without another label attention gets all tokens and every rank attends to all of them."""
    context = context_of_llama(num_kv_heads=8)
    gathered = step(context, 4, ("sequence",))
    exchanged = step(context, 4, ("sequence", "heads"))

    ratio = exchanged.breakdown_s["tp_communication"] / gathered.breakdown_s["tp_communication"]
    assert ratio < 0.7
    assert exchanged.time_s < gathered.time_s


def test_few_key_heads_limit_the_exchange_and_not_the_ring() -> None:
    """With two key heads four ranks cannot exchange heads, and gather instead; a ring still goes.

    With eight, exchanged heads divide attention by four; of a ring of consecutive tokens the last
    rank does 7/4 of that.
    """
    few, many = context_of_llama(2), context_of_llama(8)
    compute = {
        (context, labels): step(context, 4, labels).breakdown_s["compute"]
        for context in (few, many)
        for labels in (("sequence",), ("sequence", "heads"), ("sequence", "ring"))
    }

    assert compute[few, ("sequence",)] == compute[few, ("sequence", "heads")]
    assert compute[few, ("sequence", "ring")] < 0.8 * compute[few, ("sequence", "heads")]
    divided, ring = compute[many, ("sequence", "heads")], compute[many, ("sequence", "ring")]
    assert divided < ring < 1.75 * divided


def test_the_runtime_says_that_it_lacks_rings() -> None:
    context = context_of_llama(2)
    plan = with_context_parallel(context, 4, ("sequence", "ring"))

    assert any("rows that ring needs" in reason for reason in unrunnable_reasons(plan))
    with pytest.raises(PlanRefused, match="with a ring, which the runtime does not exchange"):
        lowered(context, plan)


# Wide-ResNet -----------------------------------------------------------------------------------


def test_small_batches_of_a_wide_resnet_prefer_a_cut_of_space_or_channels() -> None:
    """8 devices and 4 images: data parallelism leaves 4 idle, a cut of each image uses all.

    Halos move fewer bytes than channels do, which in turn need no copies of the weights.
    """
    context = context_of(zoo("wide-resnet-50-1b", 4), "8xa100", 4, Precision.FP32)
    data = context.model.cost(uniform_plan(context, dp_replicate=4))
    names = context.model.labels.by_segment
    first = {s.segment_class: s.index for s in context.model.segmentation.representatives()}
    plan = uniform_plan(context, dp_replicate=4, tp=2)

    def cut(kind: str) -> StepCost:
        segments = [
            msgspec.structs.replace(
                entry,
                shard={
                    **entry.shard,
                    "tp": [
                        label
                        for label in names[first[entry.segment_class]]
                        if label.rstrip("0123456789") == kind
                    ],
                },
            )
            for entry in plan.segments
        ]
        return context.model.cost(msgspec.structs.replace(plan, segments=segments))

    by_height, by_channel = cut("height"), cut("inner")

    assert by_height.time_s < data.time_s
    assert by_channel.time_s < data.time_s
    assert by_height.breakdown_s["tp_communication"] < by_channel.breakdown_s["tp_communication"]
    assert by_height.breakdown_s["compute"] < 0.65 * data.breakdown_s["compute"]


@pytest.mark.parametrize(
    ("family", "causal", "last"),
    [(Family.ATTENTION, 0.5, 0.875), (Family.ATTENTION_BACKWARD, 0.625, 1.09375)],
)
def test_last_rank_of_a_causal_ring(family: Family, causal: float, last: float) -> None:
    """Of 4 ranks it does 3 1/2 blocks of 4, and 5/4 of that backward; evenly shared, a half."""
    shared = of_every_rank(np.array([last]), np.array([family]), 4)

    assert last == of_last_rank(causal, family, 4)
    assert [causal] == shared.tolist()
    assert 1.0 == of_last_rank(1.0, Family.ATTENTION, 4)
