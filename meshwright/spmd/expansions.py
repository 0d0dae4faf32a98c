"""Operators with a reduction inside, written out for a sharded dim.

Each expansion computes on local tensors what the whole operator computes on whole ones, with
all-reduces where a statistic covers dims that other ranks hold.

    log_softmax           x - max - log(sum(exp(x - max)))            2 all-reduces
    its backward          g - exp(y) sum(g)                           1
    batch norm            mean, then variance about it                2
    its backward          sums of g and of g x_hat                    2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from meshwright.graph.opgraph import Op, Ref
from meshwright.spmd.body import Body

__all__ = ["EXPANSIONS", "REDUCTIONS_INSIDE", "Expansion", "InsideReduction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InsideReduction:
    """Where the statistics of an expansion are reduced."""

    axes: tuple[str, ...]
    ways: int
    cause: str


Expansion = Callable[[Body, Op, tuple[int, ...], InsideReduction], tuple[int | None, ...]]
"""From the body, the operator, its local operand values and the reduction to its results."""


def _log_softmax(
    body: Body, op: Op, operands: tuple[int, ...], inside: InsideReduction
) -> tuple[int | None, ...]:
    (x,) = operands
    spec = body.spec(x)
    dim = _int(op.args[1]) % len(spec.shape)
    kept = tuple(1 if d == dim else size for d, size in enumerate(spec.shape))
    top = body.one("aten.amax.default", (Ref(x), (dim,), True), kept, spec.dtype)
    top = _reduced(body, top, inside, "max")
    shifted = body.one("aten.sub.Tensor", (Ref(x), Ref(top)), spec.shape, spec.dtype)
    powers = body.one("aten.exp.default", (Ref(shifted),), spec.shape, spec.dtype)
    total = body.one("aten.sum.dim_IntList", (Ref(powers), (dim,), True), kept, spec.dtype)
    total = _reduced(body, total, inside)
    logs = body.one("aten.log.default", (Ref(total),), kept, spec.dtype)
    return (body.one("aten.sub.Tensor", (Ref(shifted), Ref(logs)), spec.shape, spec.dtype),)


def _log_softmax_backward(
    body: Body, op: Op, operands: tuple[int, ...], inside: InsideReduction
) -> tuple[int | None, ...]:
    grad, output = operands
    spec = body.spec(grad)
    dim = _int(op.args[2]) % len(spec.shape)
    kept = tuple(1 if d == dim else size for d, size in enumerate(spec.shape))
    total = body.one("aten.sum.dim_IntList", (Ref(grad), (dim,), True), kept, spec.dtype)
    total = _reduced(body, total, inside)
    shares = body.one("aten.exp.default", (Ref(output),), spec.shape, spec.dtype)
    taken = body.one("aten.mul.Tensor", (Ref(shares), Ref(total)), spec.shape, spec.dtype)
    return (body.one("aten.sub.Tensor", (Ref(grad), Ref(taken)), spec.shape, spec.dtype),)


def _batch_norm(
    body: Body, op: Op, operands: tuple[int, ...], inside: InsideReduction
) -> tuple[int | None, ...]:
    x = operands[0]
    spec = body.spec(x)
    given = iter(operands[1:])
    weight, bias, mean_before, variance_before = (
        next(given) if isinstance(arg, Ref) else None for arg in op.args[1:5]
    )
    momentum, epsilon = _float(op.args[6]), _float(op.args[7])
    channel = _ChannelStatistics(body, x, inside)
    mean = channel.mean(x)
    centered = channel.minus(x, mean)
    square = body.one("aten.mul.Tensor", (Ref(centered), Ref(centered)), spec.shape, spec.dtype)
    variance = channel.mean(square)
    shape, dtype = body.spec(mean).shape, spec.dtype
    padded = body.one("aten.add.Scalar", (Ref(variance), epsilon), shape, dtype)
    inverse = body.one("aten.rsqrt.default", (Ref(padded),), shape, dtype)
    out = channel.times(centered, inverse)
    if weight is not None:
        out = channel.times(out, weight)
    if bias is not None:
        wide = body.reshape(bias, channel.wide)
        out = body.one("aten.add.Tensor", (Ref(out), Ref(wide)), spec.shape, dtype)
    unbiased = body.scaled(variance, channel.count / (channel.count - 1))

    def moved(before: int | None, now: int) -> int | None:
        if before is None:
            return None
        return body.add(body.scaled(before, 1 - momentum), body.scaled(now, momentum))

    return (out, mean, inverse, moved(mean_before, mean), moved(variance_before, unbiased))


def _batch_norm_backward(
    body: Body, op: Op, operands: tuple[int, ...], inside: InsideReduction
) -> tuple[int | None, ...]:
    grad, x = operands[:2]
    spec = body.spec(x)
    given = iter(operands[2:])
    weight, _, _, mean, inverse = (
        next(given) if isinstance(arg, Ref) else None for arg in op.args[2:7]
    )
    assert mean is not None
    assert inverse is not None
    channel = _ChannelStatistics(body, x, inside)
    normal = channel.times(channel.minus(x, mean), inverse)
    grad_bias = channel.total(grad)
    product = body.one("aten.mul.Tensor", (Ref(grad), Ref(normal)), spec.shape, spec.dtype)
    grad_weight = channel.total(product)
    centered = channel.minus(grad, body.scaled(grad_bias, 1 / channel.count))
    along = channel.times(normal, body.scaled(grad_weight, 1 / channel.count))
    grad_x = body.one("aten.sub.Tensor", (Ref(centered), Ref(along)), spec.shape, spec.dtype)
    grad_x = channel.times(grad_x, inverse)
    if weight is not None:
        grad_x = channel.times(grad_x, weight)
    return (grad_x, grad_weight, grad_bias)


class _ChannelStatistics:
    """Sums over everything but dim 1, over all ranks of the batch."""

    def __init__(self, body: Body, like: int, inside: InsideReduction) -> None:
        shape = body.spec(like).shape
        self.body = body
        self.inside = inside
        self.dims = tuple(dim for dim in range(len(shape)) if dim != 1)
        self.wide = tuple(size if dim == 1 else 1 for dim, size in enumerate(shape))
        self.channels = (shape[1],)
        self.count = inside.ways * math.prod(shape[dim] for dim in self.dims)

    def total(self, value: int) -> int:
        dtype = self.body.spec(value).dtype
        local = self.body.one("aten.sum.dim_IntList", (Ref(value), self.dims), self.channels, dtype)
        return _reduced(self.body, local, self.inside)

    def mean(self, value: int) -> int:
        return self.body.scaled(self.total(value), 1 / self.count)

    def minus(self, value: int, statistic: int) -> int:
        return self._with("aten.sub.Tensor", value, statistic)

    def times(self, value: int, statistic: int) -> int:
        return self._with("aten.mul.Tensor", value, statistic)

    def _with(self, target: str, value: int, statistic: int) -> int:
        spec = self.body.spec(value)
        wide = self.body.reshape(statistic, self.wide)
        return self.body.one(target, (Ref(value), Ref(wide)), spec.shape, spec.dtype)


def _reduced(body: Body, value: int, inside: InsideReduction, reduction: str = "sum") -> int:
    return body.all_reduce(
        value, axes=inside.axes, ways=inside.ways, cause=inside.cause, reduction=reduction
    )


def _int(arg: object) -> int:
    assert isinstance(arg, int)
    return arg


def _float(arg: object) -> float:
    assert isinstance(arg, int | float)
    return float(arg)


EXPANSIONS: dict[str, Expansion] = {
    "aten._log_softmax.default": _log_softmax,
    "aten._log_softmax_backward_data.default": _log_softmax_backward,
    "aten._native_batch_norm_legit_functional.default": _batch_norm,
    "aten.native_batch_norm_backward.default": _batch_norm_backward,
}

REDUCTIONS_INSIDE = {
    "aten._log_softmax.default": 2,
    "aten._log_softmax_backward_data.default": 1,
    "aten._native_batch_norm_legit_functional.default": 2,
    "aten.native_batch_norm_backward.default": 2,
}
"""How many all-reduces each expansion has, for the cost model."""
