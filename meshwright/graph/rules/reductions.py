"""Reductions: a summed dim becomes a factor that leaves partial results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshwright.graph.opgraph import Op, TensorSpec
from meshwright.graph.rules.base import (
    OpFactor,
    OpRule,
    RuleFunction,
    Variant,
)

__all__ = ["REDUCTION_RULES"]

_FIRST = (frozenset({0}),)


def _reduced_dims(op: Op, rank: int) -> frozenset[int]:
    named = op.args[1] if len(op.args) > 1 else None
    if isinstance(named, bool) or named is None or named == ():
        return frozenset(range(rank))
    dims = named if isinstance(named, tuple) else (named,)
    return frozenset(dim % rank for dim in dims if isinstance(dim, int))


def _reduction(
    op: Op,
    operands: Sequence[TensorSpec],
    results: Sequence[TensorSpec | None],
    *,
    reduction: str,
    averaged: bool = False,
    fixed: bool = False,
) -> OpRule:
    shape, rank = operands[0].shape, len(operands[0].shape)
    reduced = _reduced_dims(op, rank)
    factors: list[OpFactor] = []
    operand: list[tuple[int, ...]] = []
    everywhere = frozenset(position for position, spec in enumerate(results) if spec is not None)
    for dim, size in enumerate(shape):
        if size == 1:
            operand.append(())
            continue
        operand.append((len(factors),))
        factors.append(
            OpFactor(
                size=size,
                fixed=fixed and dim in reduced,
                partial_results=everywhere if dim in reduced else frozenset(),
                reduction=reduction,
                averaged=averaged and dim in reduced,
            )
        )
    kept = [operand[dim] for dim in range(rank) if dim not in reduced]
    spread = [() if dim in reduced else operand[dim] for dim in range(rank)]
    result_dims = tuple(
        () if spec is None else tuple(spread if len(spec.shape) == rank else kept)
        for spec in results
    )
    return OpRule(
        factors=tuple(factors),
        operands=(tuple(operand),),
        results=result_dims,
        linear=_FIRST if reduction == "sum" and not fixed else (),
    )


def _sum(op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]) -> OpRule:
    return _reduction(op, operands, results, reduction="sum")


def _mean(op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]) -> OpRule:
    return _reduction(op, operands, results, reduction="sum", averaged=True)


def _maximum(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    return _reduction(op, operands, results, reduction="max")


def _whole(op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]) -> OpRule:
    """A reduction that needs every element at once (variance, product, argmax)."""
    return _reduction(op, operands, results, reduction="sum", fixed=True)


def _along_dim(
    op: Op,
    operands: Sequence[TensorSpec],
    results: Sequence[TensorSpec | None],
    *,
    dim: int,
    variant: Variant = Variant.NONE,
    linear: tuple[frozenset[int], ...] = (),
) -> OpRule:
    """Every operand and result has the same dims; one of them the operator needs whole.

    With ``variant`` that dim may be sharded all the same, at the price the variant says.
    """
    rank = len(operands[0].shape)
    dim %= max(rank, 1)
    factors: list[OpFactor] = []
    dims: list[tuple[int, ...]] = []
    own_sizes: dict[int, int] = {}
    specs = [spec for spec in (*operands, *results) if spec is not None]
    for position, size in enumerate(operands[0].shape):
        if size == 1:
            dims.append(())
            continue
        # Where sizes differ (a short index) blocks of one do not match blocks of the other.
        needs_whole = position == dim
        differs = any(spec.shape[position] != size for spec in specs)
        dims.append((len(factors),))
        factors.append(
            OpFactor(
                size=size,
                fixed=differs or (needs_whole and variant == Variant.NONE),
                variant=variant if needs_whole else Variant.NONE,
            )
        )
        own_sizes[position] = size

    def of(spec: TensorSpec | None) -> tuple[tuple[int, ...], ...]:
        if spec is None:
            return ()
        named: list[tuple[int, ...]] = []
        for position, size in enumerate(spec.shape):
            if size == 1:
                named.append(())
            elif size == own_sizes.get(position):
                named.append(dims[position])
            else:
                named.append((len(factors),))
                factors.append(OpFactor(size=size, fixed=True))
        return tuple(named)

    return OpRule(
        operands=tuple(of(spec) for spec in operands),
        results=tuple(of(spec) for spec in results),
        factors=tuple(factors),
        linear=linear,
    )


def _dim_argument(op: Op, position: int, default: int = -1) -> int:
    arg = op.args[position] if len(op.args) > position else default
    return arg if isinstance(arg, int) else default


def _softmax(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    inside = op.target == "aten._log_softmax.default"
    return _along_dim(
        op,
        operands,
        results,
        dim=_dim_argument(op, 1),
        variant=Variant.REDUCE_INSIDE if inside else Variant.NONE,
    )


def _softmax_backward(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    inside = op.target == "aten._log_softmax_backward_data.default"
    return _along_dim(
        op,
        operands,
        results,
        dim=_dim_argument(op, 2),
        variant=Variant.REDUCE_INSIDE if inside else Variant.NONE,
        linear=_FIRST,
    )


def _needs_dim(position: int | None, default: int = -1) -> RuleFunction:
    """``position`` of the dim among the arguments; ``None`` where it is given by name alone."""

    def rule(
        op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
    ) -> OpRule:
        named = dict(op.kwargs).get("dim")
        if isinstance(named, int):
            dim = named
        else:
            dim = default if position is None else _dim_argument(op, position, default)
        return _along_dim(op, operands, results, dim=dim)

    return rule


def _moved(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule | None:
    """``flip`` and ``roll``: the moved dim stays whole; several at once have no rule."""
    position = 2 if op.target == "aten.roll.default" else 1
    dims = op.args[position] if len(op.args) > position else None
    if not isinstance(dims, tuple) or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    return _along_dim(op, operands, results, dim=dims[0], linear=_FIRST)


def _norm(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule | None:
    """A norm over everything; one over some dims has no rule."""
    if len(op.args) > 2 and op.args[2] is not None:
        return None
    return _reduction(replace(op, args=op.args[:1]), operands, results, reduction="sum", fixed=True)


REDUCTION_RULES: dict[str, RuleFunction] = {
    "aten.sum.default": _sum,
    "aten.sum.dim_IntList": _sum,
    "aten.mean.default": _mean,
    "aten.mean.dim": _mean,
    "aten.amax.default": _maximum,
    "aten.max.default": _maximum,
    "aten.amin.default": _whole,
    "aten.max.dim": _whole,
    "aten.min.dim": _whole,
    "aten.argmax.default": _whole,
    "aten.argmin.default": _whole,
    "aten.any.dim": _whole,
    "aten.any.default": _whole,
    "aten.all.dim": _whole,
    "aten.all.default": _whole,
    "aten.prod.default": _whole,
    "aten.prod.dim_int": _whole,
    "aten.var.correction": _whole,
    "aten.std.correction": _whole,
    "aten.var_mean.correction": _whole,
    "aten.linalg_vector_norm.default": _norm,
    "aten.logsumexp.default": _whole,
    "aten._softmax.default": _softmax,
    "aten._safe_softmax.default": _softmax,
    "aten._log_softmax.default": _softmax,
    "aten._softmax_backward_data.default": _softmax_backward,
    "aten._log_softmax_backward_data.default": _softmax_backward,
    "aten.cumsum.default": _needs_dim(1),
    "aten.cumprod.default": _needs_dim(1),
    "aten.sort.default": _needs_dim(1),
    "aten.sort.stable": _needs_dim(None),
    "aten.argsort.default": _needs_dim(1),
    "aten.topk.default": _needs_dim(2),
    "aten.flip.default": _moved,
    "aten.roll.default": _moved,
    "aten.gather.default": _needs_dim(1, 0),
    "aten.scatter.src": _needs_dim(1, 0),
    "aten.scatter.value": _needs_dim(1, 0),
    "aten.scatter_add.default": _needs_dim(1, 0),
}
