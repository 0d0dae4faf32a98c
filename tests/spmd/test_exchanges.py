"""Expert, context and head parallelism of small models: which collectives the algebra places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from meshwright.capture import capture
from meshwright.capture.references import resolve_model
from meshwright.cluster import parse_cluster
from meshwright.cost.collectives import collective_time_s
from meshwright.spmd.nodes import ConvertNode, ShardedGraph, ShardedPhase
from meshwright.spmd.prepared import PreparedGraph, prepare
from meshwright.spmd.program import CollectiveKind
from meshwright.spmd.redistribute import Step, StepKind
from meshwright.spmd.sharded import shard_graph

Shard = Mapping[str, tuple[str, ...]]

EXPERTS: Shard = {"ep": ("experts", "batch")}
ULYSSES: Shard = {"cp": ("sequence", "heads")}
EXCHANGE = str(StepKind.ALL_TO_ALL)


@lru_cache(maxsize=4)
def prepared_of(reference: str) -> PreparedGraph:
    source = resolve_model(reference)
    args, kwargs = source.example_inputs(8)
    return prepare(capture(source.build(), args, kwargs, name=reference).graph)


def sharded_of(prepared: PreparedGraph, shard: Shard, sizes: Mapping[str, int]) -> ShardedGraph:
    """The graph with every segment sharded by those labels it has."""
    return shard_graph(
        prepared.analysis,
        prepared.segmentation,
        prepared.labels,
        shards=[
            {axis: [label for label in wanted if label in names] for axis, wanted in shard.items()}
            for names in prepared.labels.by_segment
        ],
        axis_sizes=sizes,
    )


def steps_by_segment(
    sharded: ShardedGraph, phase: ShardedPhase, axis: str
) -> dict[int, Counter[str]]:
    """How often each segment takes each kind of step along ``axis``, slices left out."""
    found: dict[int, Counter[str]] = {}
    for node in sharded.nodes:
        if isinstance(node, ConvertNode) and node.phase == phase and node.segment >= 0:
            kinds = Counter(str(s.kind) for s in node.steps if axis in s.axes)
            del kinds[str(StepKind.SLICE)]
            if kinds:
                found.setdefault(node.segment, Counter()).update(kinds)
    return found


@pytest.mark.parametrize("reference", ["tiny-moe", "tiny-gpt-moe"])
@pytest.mark.parametrize("sizes", [{"ep": 2}, {"ep": 4}, {"dp_shard": 2, "ep": 2, "micro": 2}])
def test_experts_cost_two_exchanges_each_way(reference: str, sizes: dict[str, int]) -> None:
    """GShard: tokens go to their experts and come back; nothing else moves but the loss."""
    prepared = prepared_of(reference)
    sharded = sharded_of(prepared, {**EXPERTS, "dp_shard": ("batch",)}, sizes)
    layers = [i for i, names in enumerate(prepared.labels.by_segment) if "experts" in names]
    head = len(prepared.labels.by_segment) - 1
    forward = steps_by_segment(sharded, ShardedPhase.FORWARD, "ep")
    backward = steps_by_segment(sharded, ShardedPhase.BACKWARD, "ep")
    forward.pop(head)

    assert {layer: {EXCHANGE: 2} for layer in layers} == forward
    assert {layer: {EXCHANGE: 2} for layer in layers} == backward


def test_experts_weights_are_cut_and_the_router_is_whole() -> None:
    prepared = prepared_of("tiny-moe")
    sharded = sharded_of(prepared, EXPERTS, {"ep": 2})
    cut = {
        item.name.split(".")[-2]
        for item in prepared.graph.parameters
        if sharded.layouts[sharded.inputs[item.value]].sharding_axes
    }

    assert {"experts"} == cut


def test_all_axes_of_the_batch_lie_beside_the_experts() -> None:
    """Of the rows an expert gets, those of other data-parallel ranks stay away."""
    prepared = prepared_of("tiny-moe")
    sharded = sharded_of(prepared, {**EXPERTS, "dp_shard": ("batch",)}, {"dp_shard": 2, "ep": 2})
    gathers = [s for s in steps_of(sharded) if s.kind == StepKind.ALL_GATHER]

    assert [] == gathers


def steps_of(sharded: ShardedGraph) -> list[Step]:
    return [s for node in sharded.nodes if isinstance(node, ConvertNode) for s in node.steps]


@pytest.mark.parametrize("reference", ["tiny-gpt", "tiny-llama", "tiny-bert"])
def test_context_parallel_attention_costs_four_exchanges_each_way(reference: str) -> None:
    """DeepSpeed-Ulysses: queries, keys and values there, the result back; weights are whole."""
    prepared = prepared_of(reference)
    sharded = sharded_of(prepared, ULYSSES, {"cp": 2})
    layers = [i for i, names in enumerate(prepared.labels.by_segment) if "heads" in names]
    every = {
        phase: steps_by_segment(sharded, phase, "cp")
        for phase in (ShardedPhase.FORWARD, ShardedPhase.BACKWARD)
    }

    for found in every.values():
        assert [4] * len(layers) == [found[layer][EXCHANGE] for layer in layers]
    assert not any(
        sharded.layouts[sharded.inputs[item.value]].sharding_axes
        for item in prepared.graph.parameters
        if "position" not in item.name
    )


@pytest.mark.parametrize("cluster", ["8xa100", "16xa100"])
def test_an_exchange_costs_less_than_a_gather(cluster: str) -> None:
    """Of B bytes on n ranks an exchange sends B (n - 1) / n^2, a gather B (n - 1) / n."""
    machine = parse_cluster(cluster)
    ranks = range(machine.num_devices)
    num_bytes = 1 << 28
    exchange_s = collective_time_s(
        CollectiveKind.ALL_TO_ALL, num_bytes / len(ranks), cluster=machine, ranks=ranks
    )
    gather_s = collective_time_s(CollectiveKind.ALL_GATHER, num_bytes, cluster=machine, ranks=ranks)

    assert 0 < exchange_s < gather_s / 2


class FusedBlock(nn.Module):
    """Attention whose queries, keys and values come from one product, and a projection."""

    def __init__(self, split: str) -> None:
        super().__init__()
        self.split = split
        self.qkv = nn.Linear(32, 96)
        self.project = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(x)
        if self.split == "view":
            q, k, v = fused.view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                part.view(*x.shape[:2], 4, 8).transpose(1, 2) for part in fused.split(32, dim=-1)
            )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.project(mixed.transpose(1, 2).flatten(2))


class FusedModel(nn.Module):
    def __init__(self, split: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FusedBlock(split) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().sum()


@pytest.mark.parametrize("split", ["view", "split"])
def test_a_fused_product_is_cut_by_heads_without_communication(split: str) -> None:
    """Each rank holds its heads' rows of all three parts, a strided cut of one dim of 96.

    What is left is Megatron's one all-reduce for each block and phase; the first block needs no
    gradient of its input.
    """
    prepared = prepare(capture(FusedModel(split), (torch.zeros(2, 16, 32),)).graph)
    sharded = sharded_of(prepared, {"tp": ("heads", "heads2")}, {"tp": 2})
    kinds = Counter(
        (node.phase, str(step.kind))
        for node in sharded.nodes
        if isinstance(node, ConvertNode)
        for step in node.steps
        if step.kind not in {StepKind.SLICE, StepKind.MASK}
    )

    assert {
        (ShardedPhase.FORWARD, "all_reduce"): 2,
        (ShardedPhase.BACKWARD, "all_reduce"): 1,
    } == kinds
    weight = next(i for i in prepared.graph.parameters if i.name == "blocks.0.qkv.weight")
    ((place, _),) = sharded.layouts[sharded.inputs[weight.value]].shards
    assert (0, 1) == place
