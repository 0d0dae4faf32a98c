"""Mean losses rewritten as sums over counts, so that parts of a batch add up exactly.

``nll_loss`` with reduction ``mean`` divides by the number of targets that count (or the sum
of their class weights), which differs between parts of a batch: neither sums nor means of
part losses give the loss. Rewritten,

    loss = nll_loss(log_probabilities, target, reduction=sum) / count(target)

both terms are plain sums over the batch and the count depends on data alone, so it can be summed
over all parts before the first forward pass. The backward operator gets ``gradient / count``.
Losses whose mean divides by a fixed number of elements become ``sum / number`` likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from meshwright.capture.execute import resolve_target
from meshwright.capture.opcost import bytes_moved
from meshwright.graph.opgraph import Arg, Literal, Op, OpGraph, Ref, TensorSpec, contiguous_stride

__all__ = ["canonical"]

_MEAN, _SUM = 1, 2
"""ATen's reduction codes; 0 is none."""

_NLL = {
    "aten.nll_loss_forward.default": "aten.nll_loss_backward.default",
    "aten.nll_loss2d_forward.default": "aten.nll_loss2d_backward.default",
}
_NLL_BACKWARD = frozenset(_NLL.values())

_FIXED_COUNT = {
    "aten.mse_loss.default": 2,
    "aten.smooth_l1_loss.default": 2,
    "aten.huber_loss.default": 2,
    "aten.binary_cross_entropy.default": 3,
    "aten.soft_margin_loss.default": 2,
}
"""Position of the reduction argument; the count is the number of elements of the operand."""
_FIXED_COUNT_BACKWARD = {
    "aten.mse_loss_backward.default": 3,
    "aten.smooth_l1_loss_backward.default": 3,
    "aten.huber_loss_backward.default": 3,
    "aten.binary_cross_entropy_backward.default": 4,
    "aten.soft_margin_loss_backward.default": 3,
}


@dataclass
class _Rewriter:
    """The graph being written: values may still be numbered out of order."""

    values: list[TensorSpec]
    ops: list[Op] = field(default_factory=list)
    new_index: dict[int, int] = field(default_factory=dict)
    """From an operator of the old graph to the one that differentiates as it did."""
    count_of: dict[int, int] = field(default_factory=dict)
    """From the total weight an ``nll_loss`` returns to the value of its count."""
    divided_at: dict[int, int] = field(default_factory=dict)
    """From an operator of the old graph to the division that now follows it."""

    def emit(
        self, like: Op, target: str, args: Sequence[Arg], spec: TensorSpec, **kwargs: Arg
    ) -> int:
        """Appends an operator with one new result; phase and path are those of ``like``."""
        self.values.append(spec)
        value = len(self.values) - 1
        self.append(
            replace(
                like,
                target=target,
                args=tuple(args),
                kwargs=tuple(kwargs.items()),
                outputs=(value,),
            )
        )
        return value

    def append(self, op: Op) -> None:
        """Appends ``op`` with its bytes; a rewritten loss performs no counted operations."""
        operands = [self.values[value] for value in dict.fromkeys(op.inputs)]
        results = [self.values[value] for value in op.results]
        read, written = bytes_moved(resolve_target(op.target), operands, results)
        self.ops.append(
            replace(op, index=len(self.ops), bytes_read=read, bytes_written=written, flop=0)
        )


def canonical(graph: OpGraph) -> OpGraph:
    """An equal graph whose mean losses are sums divided by counts."""
    writer = _Rewriter(values=list(graph.values))
    for op in graph.ops:
        forward_op = writer.new_index.get(op.forward_op) if op.forward_op is not None else None
        moved = replace(op, index=len(writer.ops), forward_op=forward_op)
        if op.target in _NLL and op.args[3] == _MEAN:
            _rewrite_nll(writer, moved, op.index)
        elif op.target in _NLL_BACKWARD and op.args[4] == _MEAN:
            _rewrite_nll_backward(writer, moved, op.forward_op)
        elif _reduction(op, _FIXED_COUNT) == _MEAN:
            _rewrite_fixed(writer, moved, op.index)
        elif _reduction(op, _FIXED_COUNT_BACKWARD) == _MEAN:
            _rewrite_fixed_backward(writer, moved, op.forward_op)
        else:
            writer.ops.append(moved)
            writer.new_index[op.index] = moved.index
    if len(writer.ops) == len(graph.ops):
        return graph
    return _renumbered(replace(graph, values=tuple(writer.values), ops=tuple(writer.ops)))


def _rewrite_nll(writer: _Rewriter, op: Op, old_index: int) -> None:
    log_probabilities, target, weight, _, ignore_index = op.args
    loss, total_weight = op.outputs
    assert loss is not None
    assert total_weight is not None
    dtype = writer.values[loss].dtype
    counted = _count_targets(writer, op, target, weight, ignore_index, dtype)
    summed = replace(op, args=(log_probabilities, target, weight, _SUM, ignore_index))
    _append_divided(writer, summed, old_index, "aten.div.Tensor", Ref(counted))
    writer.count_of[total_weight] = counted


def _count_targets(
    writer: _Rewriter, op: Op, target: Arg, weight: Arg, ignore_index: Arg, dtype: str
) -> int:
    """Value of the number of targets that count, or of the sum of their class weights."""
    assert isinstance(target, Ref)
    shape = writer.values[target.value].shape

    def spec(shape: tuple[int, ...], dtype: str) -> TensorSpec:
        return TensorSpec(shape=shape, dtype=dtype, stride=contiguous_stride(shape))

    counts = writer.emit(op, "aten.ne.Scalar", (target, ignore_index), spec(shape, "bool"))
    if not isinstance(weight, Ref):
        total = writer.emit(op, "aten.sum.default", (Ref(counts),), spec((), "int64"))
        return writer.emit(
            op,
            "aten._to_copy.default",
            (Ref(total),),
            spec((), dtype),
            dtype=Literal("dtype", dtype),
        )
    # An ignored target may be no class at all (-100): look class 0 up instead, then drop it.
    target_dtype = writer.values[target.value].dtype
    safe = writer.emit(op, "aten.mul.Tensor", (target, Ref(counts)), spec(shape, target_dtype))
    looked_up = writer.emit(op, "aten.index.Tensor", (weight, (Ref(safe),)), spec(shape, dtype))
    kept = writer.emit(op, "aten.mul.Tensor", (Ref(looked_up), Ref(counts)), spec(shape, dtype))
    return writer.emit(op, "aten.sum.default", (Ref(kept),), spec((), dtype))


def _rewrite_nll_backward(writer: _Rewriter, op: Op, old_forward: int | None) -> None:
    gradient, *middle, _, ignore_index, total_weight = op.args
    assert isinstance(total_weight, Ref)
    count = Ref(writer.count_of[total_weight.value])
    divided = _divide_gradient(writer, op, old_forward, gradient, "aten.div.Tensor", count)
    writer.append(replace(op, args=(divided, *middle, _SUM, ignore_index, total_weight)))


def _rewrite_fixed(writer: _Rewriter, op: Op, old_index: int) -> None:
    place = _FIXED_COUNT[op.target]
    summed = replace(op, args=_with_sum(op.args, place))
    count = _num_loss_elements(writer, op.args[0], op.args[1])
    _append_divided(writer, summed, old_index, "aten.div.Scalar", count)


def _rewrite_fixed_backward(writer: _Rewriter, op: Op, old_forward: int | None) -> None:
    place = _FIXED_COUNT_BACKWARD[op.target]
    count = _num_loss_elements(writer, op.args[1], op.args[2])
    divided = _divide_gradient(writer, op, old_forward, op.args[0], "aten.div.Scalar", count)
    writer.append(replace(op, args=(divided, *_with_sum(op.args, place)[1:])))


def _with_sum(args: tuple[Arg, ...], place: int) -> tuple[Arg, ...]:
    """Arguments with the reduction at ``place``; a weight left out before it is ``None``."""
    padded = args + (None,) * (place - len(args))
    return (*padded[:place], _SUM, *padded[place + 1 :])


def _append_divided(
    writer: _Rewriter, summed: Op, old_index: int, division: str, count: Arg
) -> None:
    """The summed loss under a new value, then the division that gives the old one."""
    loss, *others = summed.outputs
    assert loss is not None
    writer.values.append(writer.values[loss])
    total = len(writer.values) - 1
    writer.new_index[old_index] = len(writer.ops)
    writer.append(replace(summed, outputs=(total, *others)))
    writer.divided_at[old_index] = len(writer.ops)
    writer.append(replace(summed, target=division, args=(Ref(total), count), outputs=(loss,)))


def _divide_gradient(
    writer: _Rewriter,
    op: Op,
    old_forward: int | None,
    gradient: Arg,
    division: str,
    count: Arg,
) -> Ref:
    """The gradient of the summed loss."""
    assert isinstance(gradient, Ref)
    division_index = writer.divided_at.get(old_forward) if old_forward is not None else None
    like = replace(op, forward_op=division_index)
    spec = writer.values[gradient.value]
    return Ref(writer.emit(like, division, (gradient, count), spec))


def _num_loss_elements(writer: _Rewriter, first: Arg, second: Arg) -> float:
    """Elements of the loss before it is reduced: the operands broadcast against each other."""
    assert isinstance(first, Ref)
    assert isinstance(second, Ref)
    shapes = [writer.values[ref.value].shape for ref in (first, second)]
    num_dims = max(map(len, shapes))
    padded = [(1,) * (num_dims - len(shape)) + shape for shape in shapes]
    num_elements = 1
    for left, right in zip(*padded, strict=True):
        num_elements *= left if right == 1 else right
    return float(num_elements)


def _reduction(op: Op, place_of: dict[str, int]) -> Arg:
    """The reduction code of a loss; its default, the mean, may be left out."""
    if op.target not in place_of:
        return None
    place = place_of[op.target]
    return op.args[place] if place < len(op.args) else _MEAN


def _renumbered(graph: OpGraph) -> OpGraph:
    """Values numbered as they come: inputs first, then results."""
    order = [item.value for item in graph.inputs]
    order += [value for op in graph.ops for value in op.results]
    new_of_old = {old: new for new, old in enumerate(order)}

    def arg(item: Arg) -> Arg:
        if isinstance(item, Ref):
            return Ref(new_of_old[item.value])
        return tuple(arg(part) for part in item) if isinstance(item, tuple) else item

    return replace(
        graph,
        values=tuple(graph.values[old] for old in order),
        inputs=tuple(replace(item, value=new_of_old[item.value]) for item in graph.inputs),
        ops=tuple(
            replace(
                op,
                args=tuple(arg(item) for item in op.args),
                kwargs=tuple((key, arg(item)) for key, item in op.kwargs),
                outputs=tuple(None if v is None else new_of_old[v] for v in op.outputs),
            )
            for op in graph.ops
        ),
        outputs=tuple(replace(item, value=new_of_old[item.value]) for item in graph.outputs),
    )
