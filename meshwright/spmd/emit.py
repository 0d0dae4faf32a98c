"""From nodes of the sharded graph to local instructions."""

from __future__ import annotations

import math
from collections.abc import Iterator

from meshwright.errors import PlanRefused
from meshwright.graph.opgraph import Arg, Op, Ref, refs_in
from meshwright.graph.rules.base import LocalArgKind, Variant
from meshwright.spmd.body import Body
from meshwright.spmd.expansions import EXPANSIONS, InsideReduction
from meshwright.spmd.layout import Layout, order_axes
from meshwright.spmd.program import CollectiveKind, CoordinateInt, LocalArg
from meshwright.spmd.redistribute import Step, StepKind
from meshwright.spmd.sharded import ConvertNode, OpNode, ShardedGraph
from meshwright.spmd.specs import LocalSpecs

__all__ = ["Emitter"]


class Emitter:
    """Writes nodes of one sharded graph into bodies."""

    def __init__(self, sharded: ShardedGraph, specs: LocalSpecs) -> None:
        self._sharded = sharded
        self._specs = specs
        self._graph = sharded.analysis.graph

    # Operators ---------------------------------------------------------------------------------

    def op(self, body: Body, node: OpNode, operands: tuple[int, ...]) -> tuple[int | None, ...]:
        """Append an operator on local operands; returns its result values."""
        op = self._graph.ops[node.op]
        factors = self._sharded.analysis.leaf_factors[node.op]
        body.segment = node.segment
        axes_of: dict[int, tuple[str, ...]] = {}
        for axis, index in node.choice:
            axes_of[index] = (*axes_of.get(index, ()), axis)
        exchanged = [i for i in axes_of if factors[i].variant in {Variant.HALO, Variant.RING}]
        if exchanged:
            raise PlanRefused(
                f"operator {op.target} in {op.module_path or 'the model'} is cut along "
                f"{'+'.join(axes_of[exchanged[0]])} with a {factors[exchanged[0]].variant}, which "
                "the runtime does not exchange; cut another dimension"
            )
        inside = [i for i in axes_of if factors[i].variant == Variant.REDUCE_INSIDE]
        offset = [i for i in axes_of if factors[i].variant == Variant.OFFSET]
        if inside:
            axes = order_axes(axis for index in inside for axis in axes_of[index])
            reduction = InsideReduction(axes=axes, ways=self._specs.ways(axes), cause="inside")
            return EXPANSIONS[op.target](body, op, operands, reduction)
        flop = op.flop // math.prod(self._specs.ways((axis,)) for axis, _ in node.choice)
        results = tuple(None if r is None else self._specs.spec(r) for r in node.results)
        target, args = op.target, self._local_args(op, node, operands)
        if offset:
            axes = axes_of[offset[0]]
            rows = self._row_count(op, node, offset[0]) // self._specs.ways(axes)
            target, args = _with_offset(op, args, CoordinateInt(axes, rows), rows)
        elif op.target == "aten.view.default":
            target = "aten.reshape.default"
        elif op.target.startswith("aten.squeeze."):
            # A block of one row must not lose its dim.
            (result,) = [r for r in node.results if r is not None]
            target, args = "aten.reshape.default", (args[0], self._specs.shape(result))
        kwargs = self._local_kwargs(op, operands)
        outputs = body.compute(
            target,
            args,
            results,
            kwargs=() if offset else kwargs,
            op_index=op.index,
            flop=flop,
        )
        averaged = math.prod(
            self._specs.ways(axes) for index, axes in axes_of.items() if factors[index].averaged
        )
        if averaged > 1:
            return tuple(None if v is None else body.scaled(v, 1 / averaged) for v in outputs)
        return outputs

    def _row_count(self, op: Op, node: OpNode, index: int) -> int:
        """Rows of the whole dim that a leaf with row numbers is the outermost part of."""
        factor = self._sharded.analysis.leaf_factors[node.op][index]
        for place, value in (
            *zip(factor.operands, op.inputs, strict=True),
            *zip(factor.results, op.outputs, strict=True),
        ):
            if place is not None and value is not None:
                return self._graph.values[value].shape[place[0]]
        raise AssertionError("a factor sits in some tensor")

    def _local_args(self, op: Op, node: OpNode, operands: tuple[int, ...]) -> tuple[LocalArg, ...]:
        values = iter(operands)
        args = [_renumbered(arg, values) for arg in op.args]
        for item in self._sharded.analysis.rules[node.op].local_arguments:
            if item.position >= len(args):
                continue
            if item.kind == LocalArgKind.SHAPE:
                (result,) = [r for r in node.results if r is not None]
                args[item.position] = self._specs.shape(result)
            elif item.kind == LocalArgKind.SPLIT_SIZES:
                args[item.position] = tuple(
                    self._specs.shape(r)[item.dim] for r in node.results if r is not None
                )
            elif item.tensor < 0:
                shape = self._specs.shape(node.operands[-1 - item.tensor])
                size = shape[item.dim]
                args[item.position] = (size,) if isinstance(args[item.position], tuple) else size
            else:
                result = next(r for r in node.results if r is not None)
                dim = item.dim % len(self._specs.shape(result))
                args[item.position] = self._specs.shape(result)[dim]
        return tuple(args)

    def _local_kwargs(self, op: Op, operands: tuple[int, ...]) -> tuple[tuple[str, LocalArg], ...]:
        positional = sum(1 for arg in op.args for _ in refs_in(arg))
        values = iter(operands[positional:])
        return tuple((name, _renumbered(arg, values)) for name, arg in op.kwargs)

    # Redistributions ---------------------------------------------------------------------------

    def convert(self, body: Body, node: ConvertNode, value: int) -> int:
        """Append a redistribution of local ``value``; returns the result."""
        body.segment = node.segment
        for step in node.steps:
            value = self._step(body, node.source, step, value)
        return body.reshape(value, self._specs.shape(node.result))

    def _step(self, body: Body, sharded_value: int, step: Step, value: int) -> int:
        ways = self._specs.ways(step.axes)
        cause = "+".join(step.axes)
        if step.kind == StepKind.ALL_REDUCE:
            return body.all_reduce(
                value, axes=step.axes, ways=ways, cause=cause, reduction=step.reduction
            )
        if step.kind == StepKind.MASK:
            spec = body.spec(value)
            position = CoordinateInt(step.axes, 1)
            return body.one(
                "meshwright.zero_unless", (Ref(value), position), spec.shape, spec.dtype
            )
        if step.kind == StepKind.ALL_TO_ALL:
            return self._all_to_all(body, sharded_value, step, value)
        assert step.place is not None
        before, leaf, after = self._around(sharded_value, step.before, step.place)
        result_shape = self._specs.shape(sharded_value, step.after)
        if step.kind == StepKind.SLICE:
            part = leaf // ways
            looked = body.reshape(value, (before, leaf, after))
            start = CoordinateInt(step.axes, part)
            dtype = body.spec(value).dtype
            args = (Ref(looked), 1, start, part)
            kept = body.one("meshwright.narrow", args, (before, part, after), dtype)
            return body.reshape(kept, result_shape)
        kind = (
            CollectiveKind.ALL_GATHER
            if step.kind == StepKind.ALL_GATHER
            else CollectiveKind.REDUCE_SCATTER
        )
        reduction = step.reduction if kind == CollectiveKind.REDUCE_SCATTER else ""
        looked = body.reshape(value, (before, leaf, after) if before > 1 else (leaf, after))
        if before > 1:
            looked = body.permute(looked, (1, 0, 2))
        done = body.collective(
            kind, looked, axes=step.axes, ways=ways, cause=cause, reduction=reduction
        )
        if before > 1:
            done = body.permute(done, (1, 0, 2))
        return body.reshape(done, result_shape)

    def _around(
        self, sharded_value: int, layout: Layout, place: tuple[int, int]
    ) -> tuple[int, int, int]:
        """Local elements before a leaf, of it, and after it, row-major."""
        dim, position = place
        leaves = self._specs.local_leaves(sharded_value, layout)
        flat = [size for sizes in leaves for size in sizes]
        index = sum(len(sizes) for sizes in leaves[:dim]) + position
        return math.prod(flat[:index]), flat[index], math.prod(flat[index + 1 :])

    def _all_to_all(self, body: Body, sharded_value: int, step: Step, value: int) -> int:
        """Leaf ``place`` becomes whole, leaf ``other_place`` is cut.

        The cut leaf is split into (rank, part) and the rank moved to the front; after the exchange
        the front counts the blocks of the gathered leaf.
        """
        assert step.place is not None
        assert step.other_place is not None
        ways = self._specs.ways(step.axes)
        leaves = self._specs.local_leaves(sharded_value, step.before)
        flat = [size for sizes in leaves for size in sizes]
        starts = [sum(len(sizes) for sizes in leaves[:dim]) for dim in range(len(leaves))]
        gathered = starts[step.place[0]] + step.place[1]
        cut = starts[step.other_place[0]] + step.other_place[1]
        split = [*flat[:cut], ways, flat[cut] // ways, *flat[cut + 1 :]]
        looked = body.reshape(value, tuple(split))
        rest = [dim for dim in range(len(split)) if dim != cut]
        looked = body.permute(looked, (cut, *rest))
        done = body.collective(
            CollectiveKind.ALL_TO_ALL, looked, axes=step.axes, ways=ways, cause="+".join(step.axes)
        )
        order = list(range(1, len(split)))
        order.insert(gathered, 0)
        done = body.permute(done, tuple(order))
        return body.reshape(done, self._specs.shape(sharded_value, step.after))


def _renumbered(arg: Arg, values: Iterator[int]) -> LocalArg:
    """``arg`` with its values replaced, in order."""
    if isinstance(arg, Ref):
        return Ref(next(values))
    if isinstance(arg, tuple):
        return tuple(_renumbered(item, values) for item in arg)
    return arg


def _with_offset(
    op: Op, args: tuple[LocalArg, ...], start: CoordinateInt, rows: int
) -> tuple[str, tuple[LocalArg, ...]]:
    """The kernel for an operator whose rows are sharded: it knows its first row."""
    name = op.target.split(".")[1]
    if name == "embedding":
        return "meshwright.embedding_shard", (args[0], args[1], start, rows)
    if name == "embedding_dense_backward":
        padding = args[3] if len(args) > 3 else -1
        scaled = args[4] if len(args) > 4 else False
        shard = (args[0], args[1], start, rows, padding, scaled)
        return "meshwright.embedding_backward_shard", shard
    if name == "nll_loss_forward":
        log_p, target, weight, _, ignored = args
        return "meshwright.nll_forward_shard", (log_p, target, start, rows, ignored, weight)
    assert name == "nll_loss_backward", f"{op.target} has no kernel with an offset"
    grad, log_p, target, weight, _, ignored, _ = args
    return "meshwright.nll_backward_shard", (grad, log_p, target, start, ignored, weight)
