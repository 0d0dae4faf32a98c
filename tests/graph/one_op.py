"""One operator as a graph of its own, run whole and as shards on virtual ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.capture.execute import execute, resolve_target
from meshwright.graph.factors import FactorAnalysis, Place, analyze_factors
from meshwright.graph.opgraph import (
    Arg,
    GraphInput,
    GraphOutput,
    InputRole,
    Literal,
    Op,
    OpGraph,
    OutputRole,
    Phase,
    Ref,
    TensorSpec,
)
from meshwright.graph.segments import Segmentation
from meshwright.runtime import kernels
from meshwright.runtime.compile import concrete, returns_one_tensor
from meshwright.runtime.mesh import Coordinate, Layout
from meshwright.runtime.state import assemble, slice_tensor
from meshwright.spmd.body import Body, ValueTable
from meshwright.spmd.emit import Emitter
from meshwright.spmd.layout import ALL_AXES
from meshwright.spmd.layout import Layout as Spread
from meshwright.spmd.nodes import ConvertNode, OpNode, ShardedGraph, ShardedPhase
from meshwright.spmd.program import Collective, CollectiveKind, Instruction
from meshwright.spmd.specs import LocalSpecs

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Instance:
    """An operator with the tensors it is called with."""

    graph: OpGraph
    tensors: Mapping[int, Tensor]
    """By value: operands and, from running it whole, results."""

    @property
    def op(self) -> Op:
        return self.graph.ops[0]


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        stride=tuple(tensor.stride()),
    )


def instance(target: str, *args: Any, **kwargs: Any) -> Instance:
    """An operator called with real arguments."""
    tensors: list[Tensor] = []

    def arg_of(item: Any) -> Arg:
        if isinstance(item, Tensor):
            tensors.append(item)
            return Ref(len(tensors) - 1)
        if isinstance(item, torch.dtype):
            return Literal("dtype", str(item).removeprefix("torch."))
        if isinstance(item, list | tuple):
            return tuple(arg_of(part) for part in item)
        return item

    named = tuple(arg_of(arg) for arg in args)
    by_name = tuple((key, arg_of(value)) for key, value in kwargs.items())
    results = resolve_target(target)(*args, **kwargs)
    results = list(results) if isinstance(results, list | tuple) else [results]
    first = len(tensors)
    made = [item if isinstance(item, Tensor) else None for item in results]
    outputs: list[int | None] = []
    for item in made:
        outputs.append(None if item is None else len(tensors))
        if item is not None:
            tensors.append(item)
    op = Op(
        index=0,
        target=target,
        args=named,
        kwargs=by_name,
        outputs=tuple(outputs),
        phase=Phase.FORWARD,
    )
    return _instance(op, [spec_of(tensor) for tensor in tensors], tensors, num_inputs=first)


def instance_in(graph: OpGraph, op: Op, values: Mapping[int, Tensor]) -> Instance:
    """An operator of a graph with the tensors it met there."""
    number: dict[int, int] = {}
    for value in (*op.inputs, *op.results):
        number.setdefault(value, len(number))

    def renumbered(arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            return Ref(number[arg.value])
        return tuple(renumbered(part) for part in arg) if isinstance(arg, tuple) else arg

    alone = Op(
        index=0,
        target=op.target,
        args=tuple(renumbered(arg) for arg in op.args),
        kwargs=tuple((key, renumbered(arg)) for key, arg in op.kwargs),
        outputs=tuple(None if value is None else number[value] for value in op.outputs),
        phase=Phase.FORWARD,
    )
    tensors = [values[value] for value in number]
    specs = [graph.values[value] for value in number]
    return _instance(alone, specs, tensors, num_inputs=len(set(op.inputs)))


def _instance(
    op: Op, specs: Sequence[TensorSpec], tensors: Sequence[Tensor], *, num_inputs: int
) -> Instance:
    graph = OpGraph(
        name=op.target,
        values=tuple(specs),
        inputs=tuple(
            GraphInput(value=value, name=f"args.{value}", role=InputRole.DATA)
            for value in range(num_inputs)
        ),
        ops=(op,),
        outputs=tuple(
            GraphOutput(value=value, name=str(value), role=OutputRole.OUTPUT)
            for value in op.results
        ),
    )
    return Instance(graph=graph, tensors=dict(enumerate(tensors)))


def run_whole(case: Instance, replaced: Mapping[int, Tensor] | None = None) -> list[Tensor | None]:
    """Results of the whole operator, some operands replaced."""
    graph = case.graph
    held = {item.value: case.tensors[item.value] for item in graph.inputs}
    held.update(replaced or {})
    with_loss = OpGraph(
        name=graph.name,
        values=graph.values,
        inputs=graph.inputs,
        ops=graph.ops,
        outputs=(
            *graph.outputs,
            GraphOutput(value=graph.outputs[0].value, name="loss", role=OutputRole.LOSS),
        ),
    )
    found = execute(with_loss, held).outputs
    return [None if value is None else found[str(value)] for value in case.op.outputs]


def analysis_of(case: Instance) -> FactorAnalysis:
    return analyze_factors(case.graph)


def sharded_results(
    case: Instance, analysis: FactorAnalysis, index: int, ways: int
) -> list[Tensor | None]:
    """Results put together from ``ways`` ranks that shard one leaf factor."""
    sharded = _sharded_by(case, analysis, index, ways)
    node = sharded.nodes[0]
    assert isinstance(node, OpNode)
    specs = LocalSpecs(sharded)
    body = Body(ValueTable())
    local = tuple(body.values.new(specs.spec(value)) for value in node.operands)
    outputs = Emitter(sharded, specs).op(body, node, local)
    coordinates = Layout(stage_shape=(1, 1, 1, 1, ways), first_devices=(0,)).coordinates
    given = {}
    for number, value in zip(local, node.operands, strict=True):
        full, layout = case.tensors[sharded.graph_value[value]], sharded.layouts[value]
        given[number] = distribute(full, specs, value, layout, coordinates)
    held = run_instructions(body.instructions, given, coordinates)
    whole: list[Tensor | None] = []
    for result, output in zip(node.results, outputs, strict=True):
        if result is None:
            whole.append(None)
            continue
        assert output is not None
        for tensor in held[output]:
            assert specs.shape(result) == tuple(tensor.shape), f"{case.op.target} local shape"
            assert specs.full(result).dtype == str(tensor.dtype).removeprefix("torch.")
        whole.append(collect(held[output], specs, result, sharded.layouts[result], coordinates))
    return whole


def _sharded_by(case: Instance, analysis: FactorAnalysis, index: int, ways: int) -> ShardedGraph:
    """The operator with one leaf factor sharded along ``tp``."""
    factor = analysis.leaf_factors[0][index]
    additive = analysis.rules[0].additive if factor.partial_results else ()
    graph_value: list[int] = []
    layouts: list[Spread] = []

    def new(value: int, place: Place | None, reduction: str | None) -> int:
        partial = {} if place is not None or reduction is None else {"tp": reduction}
        graph_value.append(value)
        layouts.append(Spread.of({} if place is None else {place: ["tp"]}, partial))
        return len(layouts) - 1

    operands = [
        new(value, factor.operands[position], "sum" if position in additive else None)
        for position, value in enumerate(case.op.inputs)
    ]
    results = [
        None
        if value is None
        else new(
            value,
            factor.results[number],
            factor.reduction if number in factor.partial_results else None,
        )
        for number, value in enumerate(case.op.outputs)
    ]
    node = OpNode(
        op=0,
        choice=(("tp", index),),
        operands=tuple(operands),
        results=tuple(results),
        segment=0,
        phase=ShardedPhase.FORWARD,
    )
    return lone_sharded(
        analysis,
        nodes=(node,),
        graph_value=graph_value,
        layouts=layouts,
        axis_sizes={"tp": ways},
    )


def lone_sharded(
    analysis: FactorAnalysis,
    *,
    nodes: tuple[OpNode | ConvertNode, ...],
    graph_value: Sequence[int],
    layouts: Sequence[Spread],
    axis_sizes: Mapping[str, int],
) -> ShardedGraph:
    """A sharded graph of hand-made nodes."""
    return ShardedGraph(
        analysis=analysis,
        segmentation=Segmentation(segments=(), segment_of_op=(0,)),
        axis_sizes={axis: axis_sizes.get(axis, 1) for axis in ALL_AXES},
        graph_value=tuple(graph_value),
        layouts=tuple(layouts),
        nodes=nodes,
        producer=tuple(-1 for _ in layouts),
        inputs={},
        prologue_inputs={},
        outputs=(),
    )


def distribute(
    full: Tensor,
    specs: LocalSpecs,
    value: int,
    layout: Spread,
    coordinates: Sequence[Coordinate],
) -> list[Tensor]:
    """Each rank's tensor; a partial sum is the value on the first rank and random zeros after."""
    shard = specs.shard_spec(value)
    pieces = [slice_tensor(full, shard, coordinate).clone() for coordinate in coordinates]
    axes = tuple(axis for axis, _ in layout.partial)
    if not axes:
        return pieces
    generator = torch.Generator().manual_seed(7)
    parts: list[Tensor] = [torch.empty(0)] * len(pieces)
    for rank, coordinate in enumerate(coordinates):
        group = [peer.flat for peer in coordinate.peers(axes)]
        if group[0] != rank:
            continue
        rest = pieces[rank]
        for member in group[1:]:
            part = torch.randn(rest.shape, generator=generator, dtype=rest.dtype)
            parts[member] = part
            rest = rest - part
        parts[rank] = rest
    return parts


def collect(
    ranks: Sequence[Tensor],
    specs: LocalSpecs,
    value: int,
    layout: Spread,
    coordinates: Sequence[Coordinate],
) -> Tensor:
    """The whole behind every rank's tensor; copies must agree."""
    shard = specs.shard_spec(value)
    reduction = {how for _, how in layout.partial}
    axes = tuple(axis for axis, _ in layout.partial)
    blocks = []
    for rank, coordinate in enumerate(coordinates):
        members = [peer.flat for peer in coordinate.peers(axes)] if axes else [rank]
        stacked = torch.stack([ranks[member] for member in members])
        block = stacked.amax(0) if reduction == {"max"} else stacked.sum(0) if axes else stacked[0]
        blocks.append((coordinate, block.to(ranks[rank].dtype)))
    full = assemble(specs.full(value).shape, shard, blocks)
    for coordinate, block in blocks:
        torch.testing.assert_close(
            slice_tensor(full, shard, coordinate), block, rtol=1e-12, atol=1e-12, equal_nan=True
        )
    return full


def run_instructions(
    instructions: Sequence[Instruction],
    given: Mapping[int, list[Tensor]],
    coordinates: Sequence[Coordinate],
) -> dict[int, list[Tensor]]:
    """Every value on every rank, in lockstep."""
    held = dict(given)
    for item in instructions:
        if isinstance(item, Collective):
            held[item.output] = _collective(item, held[item.input], coordinates)
            continue
        op = kernels.resolve_target(item.target)
        single = returns_one_tensor(item.target, op)
        per_rank = []
        for rank, coordinate in enumerate(coordinates):

            def read(arg: Any, rank: int = rank, coordinate: Coordinate = coordinate) -> Any:
                if isinstance(arg, Ref):
                    return held[arg.value][rank]
                if isinstance(arg, tuple):
                    return tuple(read(part) for part in arg)
                return concrete(arg, coordinate, CPU)

            result = op(
                *(read(arg) for arg in item.args), **{key: read(arg) for key, arg in item.kwargs}
            )
            per_rank.append((result,) if single else tuple(result))
        for position, value in enumerate(item.outputs):
            if value is not None:
                held[value] = [results[position] for results in per_rank]
    return held


def _collective(
    item: Collective, operand: list[Tensor], coordinates: Sequence[Coordinate]
) -> list[Tensor]:
    results: list[Tensor] = [torch.empty(0)] * len(operand)
    for rank, coordinate in enumerate(coordinates):
        members = [peer.flat for peer in coordinate.peers(item.axes)]
        parts = [operand[member] for member in members]
        own = members.index(rank)
        if item.kind is CollectiveKind.ALL_GATHER:
            results[rank] = torch.cat(parts)
        elif item.kind is CollectiveKind.ALL_TO_ALL:
            results[rank] = torch.cat([part.chunk(len(parts))[own] for part in parts])
        else:
            stacked = torch.stack(parts)
            total = stacked.amax(0) if item.reduction == "max" else stacked.sum(0)
            is_scatter = item.kind is CollectiveKind.REDUCE_SCATTER
            results[rank] = total.chunk(len(parts))[own] if is_scatter else total
    return results
