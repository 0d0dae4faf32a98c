"""Redistributions: what the emitted steps leave on each rank is the slice the layout says."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.graph.factors import Place, analyze_factors
from meshwright.graph.opgraph import (
    GraphInput,
    GraphOutput,
    InputRole,
    Op,
    OpGraph,
    OutputRole,
    Phase,
    Ref,
    TensorSpec,
    contiguous_stride,
)
from meshwright.runtime.mesh import Layout as RankLayout
from meshwright.spmd.body import Body, ValueTable
from meshwright.spmd.emit import Emitter
from meshwright.spmd.layout import MICRO, Layout
from meshwright.spmd.nodes import ConvertNode, ShardedPhase
from meshwright.spmd.program import Collective
from meshwright.spmd.redistribute import StepKind, plan_steps
from meshwright.spmd.specs import LocalSpecs
from tests.graph.one_op import collect, distribute, lone_sharded, run_instructions

AXES = ("dp_shard", "cp", "tp")
SIZES = {"dp_shard": 2, "cp": 2, "tp": 2}
COORDINATES = RankLayout(stage_shape=(1, 2, 2, 1, 2), first_devices=(0,)).coordinates


def _two_leaves(rows: int, parts: tuple[int, int], last: int) -> OpGraph:
    """``(rows, a b, last)`` viewed as ``(rows, a, b, last)``: ``a`` and ``b`` are leaves."""
    whole, apart = (rows, parts[0] * parts[1], last), (rows, *parts, last)
    specs = [
        TensorSpec(shape=shape, dtype="float64", stride=contiguous_stride(shape))
        for shape in (whole, apart)
    ]
    op = Op(
        index=0, target="aten.view.default", args=(Ref(0), apart), outputs=(1,), phase=Phase.FORWARD
    )
    return OpGraph(
        name="view",
        values=tuple(specs),
        inputs=(GraphInput(value=0, name="x", role=InputRole.DATA),),
        ops=(op,),
        outputs=(GraphOutput(value=1, name="loss", role=OutputRole.LOSS),),
    )


PLACES: tuple[Place, ...] = ((0, 0), (1, 0), (1, 1), (2, 0))


@st.composite
def layouts(draw: st.DrawFn, *, maxima: bool) -> Layout:
    """Every axis shards a leaf, holds partial results, or copies."""
    shards: dict[Place, list[str]] = {}
    partial: dict[str, str] = {}
    for axis in AXES:
        what = draw(st.sampled_from([*PLACES, "partial", "copies"]))
        if what == "partial":
            partial[axis] = "max" if maxima else "sum"
        elif what != "copies":
            shards.setdefault(what, []).append(axis)
    return Layout.of(shards, partial)


@settings(max_examples=150, deadline=None)
@given(
    source=layouts(maxima=False),
    target=layouts(maxima=False),
    rows=st.sampled_from([8, 16]),
    parts=st.sampled_from([(8, 8), (8, 16)]),
)
def test_every_rank_gets_its_slice(
    source: Layout, target: Layout, rows: int, parts: tuple[int, int]
) -> None:
    analysis = analyze_factors(_two_leaves(rows, parts, 8))
    steps = plan_steps(source, target)
    node = ConvertNode(source=0, result=1, steps=steps, segment=0, phase=ShardedPhase.FORWARD)
    sharded = lone_sharded(
        analysis, nodes=(node,), graph_value=[0, 0], layouts=[source, target], axis_sizes=SIZES
    )
    specs = LocalSpecs(sharded)
    body = Body(ValueTable())
    local = body.values.new(specs.spec(0))
    result = Emitter(sharded, specs).convert(body, node, local)
    full = torch.randn(rows, parts[0] * parts[1], 8, dtype=torch.float64)
    given_ranks = distribute(full, specs, 0, source, COORDINATES)
    held = run_instructions(body.instructions, {local: given_ranks}, COORDINATES)

    found = collect(held[result], specs, 1, target, COORDINATES)
    torch.testing.assert_close(found, full, rtol=1e-12, atol=1e-12)
    stated = {
        item.output: item.num_bytes for item in body.instructions if isinstance(item, Collective)
    }
    for item in body.instructions:
        if isinstance(item, Collective):
            larger = max(held[item.input][0].nbytes, held[item.output][0].nbytes)
            assert larger == stated[item.output]


@settings(max_examples=150, deadline=None)
@given(target=layouts(maxima=False), kept=st.integers(0, 3))
def test_cutting_what_is_whole_costs_nothing(target: Layout, kept: int) -> None:
    """Each leaf of the source is cut by the first axes of the target alone: all is at hand."""
    shards = {place: axes[:kept] for place, axes in target.shards}
    source = Layout.of(shards, {})
    kinds = {step.kind for step in plan_steps(source, target)}

    assert kinds <= {StepKind.SLICE, StepKind.MASK}


@given(layout=layouts(maxima=True))
def test_the_same_layout_needs_no_step(layout: Layout) -> None:
    assert () == plan_steps(layout, layout)


def test_a_partial_sum_that_is_cut_goes_by_reduce_scatter() -> None:
    """Twice, for ``dp_shard`` and ``tp`` share a leaf; never an all-reduce."""
    source = Layout.of({}, {"dp_shard": "sum", "tp": "sum"})
    target = Layout.of({(0, 0): ["tp", "dp_shard"]}, {})

    assert [(StepKind.REDUCE_SCATTER, ("dp_shard",)), (StepKind.REDUCE_SCATTER, ("tp",))] == [
        (step.kind, step.axes) for step in plan_steps(source, target)
    ]


def test_a_partial_maximum_is_never_scattered() -> None:
    steps = plan_steps(Layout.of({}, {"tp": "max"}), Layout.of({(0, 0): ["tp"]}, {}))

    assert [StepKind.ALL_REDUCE, StepKind.SLICE] == [step.kind for step in steps]


def test_an_axis_that_changes_leaf_goes_by_all_to_all() -> None:
    steps = plan_steps(Layout.of({(0, 0): ["tp"]}, {}), Layout.of({(1, 0): ["tp"]}, {}))

    assert [StepKind.ALL_TO_ALL] == [step.kind for step in steps]


def test_what_happens_inside_a_micro_batch_leaves_the_others_alone() -> None:
    """Micro-batches cut the batch outermost, so an expert axis comes and goes inside one."""
    source = Layout.of({(0, 0): ["ep", MICRO]}, {})
    target = Layout.of({(0, 0): [MICRO], (1, 0): ["ep"]}, {})

    assert [(StepKind.ALL_TO_ALL, ("ep",))] == [
        (step.kind, step.axes) for step in plan_steps(source, target)
    ]


def test_axes_that_move_together_go_in_one_exchange() -> None:
    source = Layout.of({(0, 0): ["dp_shard", "tp"]}, {})
    target = Layout.of({(1, 0): ["dp_shard", "tp"]}, {})

    assert [(StepKind.ALL_TO_ALL, ("dp_shard", "tp"))] == [
        (step.kind, step.axes) for step in plan_steps(source, target)
    ]


def test_axes_of_two_leaves_meet_by_one_exchange_each() -> None:
    """The outer one first, there and, in reverse, back."""
    apart = Layout.of({(0, 0): ["dp_shard"], (0, 1): ["tp"]}, {})
    together = Layout.of({(1, 0): ["dp_shard", "tp"]}, {})

    assert [("dp_shard",), ("tp",)] == [step.axes for step in plan_steps(apart, together)]
    assert [("tp",), ("dp_shard",)] == [step.axes for step in plan_steps(together, apart)]
    kinds = {step.kind for step in (*plan_steps(apart, together), *plan_steps(together, apart))}
    assert {StepKind.ALL_TO_ALL} == kinds
