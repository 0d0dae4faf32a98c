"""Plans that experts wrote by hand come out of the bare program.

No rule says what tensor parallelism cuts: the integer program knows operators, shapes and prices.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from meshwright.capture.captured import capture
from meshwright.cluster import parse_cluster
from meshwright.plans.plan import JobSpec, Precision
from meshwright.solvers.operator_search import OperatorLevel
from meshwright.solvers.operators import OperatorProblem
from meshwright.solvers.planner import make_context
from meshwright.solvers.portfolio import run_portfolio
from meshwright.spmd.nodes import ShardedPhase
from tests.cost.graphs import zoo
from tests.solvers.operator_problems import context_of, solved, with_tp

GPT = "gpt2?num_layers=2&hidden=1024&num_heads=16&vocab_size=65536"
"""Segments: token embedding, position embedding, then attention and mlp twice, then the loss."""

ATTENTION, MLP, LOSS = 2, 3, 6
FORWARD, BACKWARD = ShardedPhase.FORWARD, ShardedPhase.BACKWARD
NO_BATCH = frozenset({"batch"})
NO_TOKENS = frozenset({"batch", "sequence"})


def test_megatron_column_then_row_with_one_all_reduce_a_block() -> None:
    """What may not cut tokens cuts heads and ffn: columns, then rows (arXiv 1909.08053)."""
    found = solved(context_of(GPT, 8, "8xh100"), with_tp(4, num_microbatches=4), without=NO_TOKENS)

    assert [("heads",), ("inner",)] == found.label_lists("tp")[2:4]
    assert () == found.sharding.operators_by_class
    for block in (ATTENTION, MLP):
        assert {"all_reduce": 1} == found.collectives(block, FORWARD)
        assert {"all_reduce": 1} == found.collectives(block, BACKWARD)


def test_sequence_parallel_form_when_memory_asks() -> None:
    """The all-reduce falls apart into reduce-scatter and all-gather (arXiv 2205.05198)."""
    context = context_of(GPT, 8, "8xh100")
    found = solved(context, with_tp(4, num_microbatches=4), without=NO_BATCH, lean=0.02)

    assert [("heads", "sequence"), ("inner", "sequence")] == found.label_lists("tp")[2:4]
    for block in (ATTENTION, MLP):
        assert {"all_gather": 1, "reduce_scatter": 1} == found.collectives(block, FORWARD)


def test_vocabulary_parallel_embedding_and_loss() -> None:
    """The table is cut by rows, and nobody ever holds all logits."""
    found = solved(context_of(GPT, 8, "8xh100"), with_tp(4, num_microbatches=4), without=NO_TOKENS)

    lists = found.label_lists("tp")
    assert (("vocab",), ("vocab",)) == (lists[0], lists[-1])
    assert 4 == found.parameter_ways()["embedding.token.weight"]
    assert {"all_reduce": 1} == found.collectives(0, FORWARD) + found.collectives(1, FORWARD)
    graph = found.sharded.analysis.graph
    logits = [
        layout
        for value, layout in zip(found.sharded.graph_value, found.sharded.layouts, strict=True)
        if graph.values[value].shape[-1:] == (65536,) and len(graph.values[value].shape) == 2
    ]
    assert logits
    assert all("tp" in layout.sharding_axes for layout in logits)


def test_program_and_exact_model_agree() -> None:
    """Within 2 %, on what every micro-batch repeats."""
    for without in (frozenset(), NO_BATCH, NO_TOKENS):
        plan = solved(
            context_of(GPT, 8, "8xh100"), with_tp(4, num_microbatches=2), without=without
        ).plan

        assert plan.is_proven
        assert plan.exact_s == pytest.approx(plan.repeated_s, rel=0.02)


def test_a_memory_bound_is_kept_and_costs_time() -> None:
    """Leaner choices are slower, and none is both faster and leaner than another."""
    problem = OperatorProblem(context_of(GPT, 8, "8xh100"), with_tp(4, num_microbatches=2))
    found = problem.pareto()

    assert len(found) >= 2
    for fast, lean in itertools.pairwise(found):
        assert lean.memory_bytes < fast.memory_bytes
        assert lean.step_s >= fast.step_s * (1 - 1e-3)


def test_experts_are_exchanged_by_all_to_all() -> None:
    """On ``ep`` samples go to their experts and come back (GShard, arXiv 2006.16668)."""
    reference = "gpt-moe-2.4b?num_layers=2&hidden=512&num_heads=8"
    found = solved(context_of(reference, 16, "8xh100"), with_tp(1, ep=8))

    experts = {name: ways for name, ways in found.parameter_ways().items() if "experts" in name}
    assert experts
    assert {8} == set(experts.values())
    model = found.problem.context.model
    segment = next(
        s.index
        for s in model.segmentation.segments
        if "experts" in model.labels.by_segment[s.index]
    )
    assert 2 == found.collectives(segment, FORWARD)["all_to_all"]
    assert "experts" in found.label_lists("ep")[model.segment_classes[segment]]


def test_small_resnet_is_data_parallel() -> None:
    """Of a large batch of images every device takes some, whatever the axis is called."""
    found = solved(context_of("resnet-50", 1024, "8xh100", "bfloat16"), with_tp(8))

    assert {("batch",)} == set(found.label_lists("tp")[:-1])


def test_large_wide_resnet_cuts_channels_where_the_batch_is_spent() -> None:
    """Two images, eight devices: the wide layers' channels are what is left to cut."""
    context = context_of("wide-resnet-50-1b", 2, "8xv100-16gb", "float32")
    found = solved(context, with_tp(8))

    graph = found.sharded.analysis.graph
    ways = found.parameter_ways()
    large = [
        item.name for item in graph.parameters if graph.values[item.value].num_elements > 2**21
    ]
    assert large
    assert {8} == {ways[name] for name in large}
    assert "batch" not in {label for labels in found.label_lists("tp") for label in labels}


class FusedAttention(nn.Module):
    """One product makes queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(256, 768, bias=False)
        self.out = nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, 8, 32).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, 256)).square().sum()


def test_fused_qkv_is_cut_by_heads_without_communication() -> None:
    """A strided part of the fused dim: every rank has q, k and v of its heads."""
    graph = capture(FusedAttention(), (torch.zeros(4, 4096, 256),)).graph
    context = make_context(
        graph,
        reference="fused",
        cluster=parse_cluster("8xh100"),
        job=JobSpec(global_batch=4),
    )
    found = solved(context, with_tp(4), without=NO_TOKENS)

    assert {4} == set(found.parameter_ways().values())
    # Only the output projection's partial sums are reduced.
    assert 1 == sum(found.collectives(0, FORWARD).values())
    (stored,) = {
        found.sharded.layouts[found.sharded.inputs[item.value]]
        for item in graph.parameters
        if item.name == "qkv.weight"
    }
    # Rows of the weight are 3 x 8 heads x 32: the middle leaf is cut.
    assert ((0, 1), ("tp",)) in stored.shards


def test_what_fits_one_device_is_replicated() -> None:
    """Nothing that operators alone can do is worth leaving plain data parallelism for."""
    context = context_of("resnet-50", 512, "8xa100", "float32")
    result = run_portfolio(context, (OperatorLevel(),), top=1)

    mesh = result.winner.plan.mesh
    assert (8, 1, 1) == (mesh.data_parallel, mesh.tp, mesh.dp_shard)
    assert "fits one device" in result.reason


def test_zero_3_when_only_that_fits() -> None:
    """With ZeRO 2 a device holds 3.75 of 16 bytes a parameter, with ZeRO 3 it holds 2."""
    reference = "gpt2?num_layers=8&hidden=1024&num_heads=8&vocab_size=4096&seq_len=128"
    roomy = context_of(reference, 64, "8xa100")
    state_bytes = 16 * roomy.model.analysis.graph.num_parameters
    cluster = parse_cluster("8xa100")
    hosts = tuple(
        replace(host, device=replace(host.device, memory_bytes=int(0.25 * state_bytes)))
        for host in cluster.hosts
    )
    context = make_context(
        zoo(reference, 64, "bfloat16"),
        reference=reference,
        cluster=replace(cluster, hosts=hosts),
        job=JobSpec(global_batch=64, precision=Precision.BF16),
    )
    result = OperatorLevel().propose(context)

    plans = [candidate.plan for candidate in result.candidates]
    assert plans
    assert all(p.mesh.tp > 1 or p.segments[0].zero_stage == 3 for p in plans)
    assert any(p.segments[0].zero_stage == 3 for p in plans)


def test_two_axes_at_once() -> None:
    """Tokens on ``cp``, tensors on ``tp``: what an operator does on both is one choice."""
    context = context_of(GPT.replace("num_layers=2", "num_layers=1"), 8, "8xh100")
    found = solved(
        context, with_tp(2, cp=2, num_microbatches=4), without=NO_BATCH | {"hidden", "inner2"}
    )

    assert any(
        {"tp", "cp"} == {axis for axis, _ in node.choices[pick].labels}
        for node, pick in zip(found.problem.graph.nodes, found.choice.picks, strict=True)
        if node.op >= 0
    )
    assert found.plan.exact_s == pytest.approx(found.plan.repeated_s, rel=0.05)
