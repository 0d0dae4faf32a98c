"""Views, splits, concatenations and slices: operators that only rename or pick indices.

``view`` is where factors come from: a reshape of ``(B, T, 3 D)`` to ``(B, T, 3, H, E)`` says that
the last dim is a product of three factors. Two shapes are matched by walking both from the left and
taking common divisors; what cannot be matched is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from meshwright.graph.opgraph import Op, TensorSpec
from meshwright.graph.rules.base import (
    DimFactors,
    LocalArgKind,
    LocalArgument,
    OpFactor,
    OpRule,
    RuleFunction,
)

__all__ = ["VIEW_RULES", "match_shapes"]

_LINEAR = (frozenset({0}),)


def match_shapes(
    source: tuple[int, ...], target: tuple[int, ...]
) -> tuple[tuple[OpFactor, ...], DimFactors, DimFactors]:
    """Common factors of two shapes of equal product, row-major.

    Returns the factors and the dims of both shapes over them.
    """
    factors: list[OpFactor] = []
    sides: tuple[list[list[int]], list[list[int]]] = ([[] for _ in source], [[] for _ in target])
    rest = [list(source), list(target)]
    dims = [0, 0]
    while True:
        for side in (0, 1):
            while dims[side] < len(rest[side]) and rest[side][dims[side]] == 1:
                dims[side] += 1
        if dims[0] == len(source) or dims[1] == len(target):
            break
        common = math.gcd(rest[0][dims[0]], rest[1][dims[1]])
        if common == 1:
            break
        for side in (0, 1):
            sides[side][dims[side]].append(len(factors))
            rest[side][dims[side]] //= common
        factors.append(OpFactor(size=common))
    for side in (0, 1):
        for dim, size in enumerate(rest[side]):
            if size > 1:
                sides[side][dim].append(len(factors))
                factors.append(OpFactor(size=size, fixed=True))
    return tuple(factors), _frozen(sides[0]), _frozen(sides[1])


def _frozen(dims: list[list[int]]) -> DimFactors:
    return tuple(tuple(dim) for dim in dims)


def _view(op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]) -> OpRule:
    assert results[0] is not None
    factors, operand, result = match_shapes(operands[0].shape, results[0].shape)
    return OpRule(
        factors=factors,
        operands=(operand,),
        results=(result,),
        linear=_LINEAR,
        local_arguments=(LocalArgument(1, LocalArgKind.SHAPE),),
        is_view=op.target not in {"aten.reshape.default", "aten._reshape_copy.default"},
    )


def _identity_factors(
    shape: tuple[int, ...], fixed: frozenset[int]
) -> tuple[list[OpFactor], DimFactors]:
    """One factor for each dim larger than 1."""
    factors: list[OpFactor] = []
    dims: list[tuple[int, ...]] = []
    for dim, size in enumerate(shape):
        if size > 1:
            dims.append((len(factors),))
            factors.append(OpFactor(size=size, fixed=dim in fixed))
        else:
            dims.append(())
    return factors, tuple(dims)


def _renamed(
    operands: Sequence[TensorSpec],
    order: Sequence[int | None],
    *,
    local_arguments: tuple[LocalArgument, ...] = (),
) -> OpRule:
    """A view whose result dim i is operand dim ``order[i]`` (``None``: a new dim of size 1)."""
    factors, dims = _identity_factors(operands[0].shape, frozenset())
    return OpRule(
        factors=tuple(factors),
        operands=(dims,),
        results=(tuple(() if dim is None else dims[dim] for dim in order),),
        linear=_LINEAR,
        local_arguments=local_arguments,
        is_view=True,
    )


def _permute(op: Op, operands: Sequence[TensorSpec], _: Sequence[TensorSpec | None]) -> OpRule:
    rank = len(operands[0].shape)
    order = op.args[1]
    assert isinstance(order, tuple)
    return _renamed(operands, [_int(dim) % rank for dim in order])


def _transpose(op: Op, operands: Sequence[TensorSpec], _: Sequence[TensorSpec | None]) -> OpRule:
    rank = len(operands[0].shape)
    order = list(range(rank))
    if op.target == "aten.t.default":
        order.reverse()
    else:
        first, second = _int(op.args[1]) % rank, _int(op.args[2]) % rank
        order[first], order[second] = order[second], order[first]
    return _renamed(operands, order)


def _unsqueeze(op: Op, operands: Sequence[TensorSpec], _: Sequence[TensorSpec | None]) -> OpRule:
    rank = len(operands[0].shape)
    order: list[int | None] = list(range(rank))
    order.insert(_int(op.args[1]) % (rank + 1), None)
    return _renamed(operands, order)


def _squeeze(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    shape = operands[0].shape
    if len(op.args) > 1:
        named = op.args[1] if isinstance(op.args[1], tuple) else (op.args[1],)
        dropped = {_int(dim) % len(shape) for dim in named}
    else:
        dropped = set(range(len(shape)))
    return _renamed(operands, [d for d, size in enumerate(shape) if size != 1 or d not in dropped])


def _expand(op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]) -> OpRule:
    """New extent is a parallel factor that only the result has."""
    assert results[0] is not None
    shape = results[0].shape
    factors, result = _identity_factors(shape, frozenset())
    shift = len(shape) - len(operands[0].shape)
    operand = tuple(
        result[dim + shift] if size > 1 else () for dim, size in enumerate(operands[0].shape)
    )
    return OpRule(
        factors=tuple(factors),
        operands=(operand,),
        results=(result,),
        linear=_LINEAR,
        local_arguments=(LocalArgument(1, LocalArgKind.SHAPE),),
        is_view=True,
    )


def _slice_like(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    """Picks along one dim: that dim is fixed unless all of it is taken."""
    assert results[0] is not None
    shape, rank = operands[0].shape, len(operands[0].shape)
    dim = _int(op.args[1]) % rank if len(op.args) > 1 else 0
    drops = len(results[0].shape) < rank
    whole = not drops and results[0].shape[dim] == shape[dim]
    factors, dims = _identity_factors(shape, frozenset() if whole else frozenset({dim}))
    result = list(dims)
    if drops:
        del result[dim]
    elif not whole:
        result[dim] = ()
        if results[0].shape[dim] > 1:
            result[dim] = (len(factors),)
            factors.append(OpFactor(size=results[0].shape[dim], fixed=True))
    return OpRule(
        factors=tuple(factors),
        operands=(dims,),
        results=(tuple(result),),
        linear=_LINEAR,
        is_view=True,
    )


def _slice_backward(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    """``slice_backward`` and ``select_backward``: the dim they fill is fixed."""
    assert results[0] is not None
    shape = results[0].shape
    dim = _int(op.args[2]) % len(shape)
    drops = len(operands[0].shape) < len(shape)
    whole = not drops and operands[0].shape[dim] == shape[dim]
    factors, result = _identity_factors(shape, frozenset() if whole else frozenset({dim}))
    operand = list(result)
    if drops:
        del operand[dim]
    elif not whole:
        operand[dim] = ()
        if operands[0].shape[dim] > 1:
            operand[dim] = (len(factors),)
            factors.append(OpFactor(size=operands[0].shape[dim], fixed=True))
    return OpRule(
        factors=tuple(factors),
        operands=(tuple(operand),),
        results=(result,),
        linear=_LINEAR,
        local_arguments=(LocalArgument(1, LocalArgKind.SHAPE),),
    )


def _split(op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]) -> OpRule:
    """Equal parts: the split dim is (part, rest), and the rest stays parallel in every part."""
    shape, rank = operands[0].shape, len(operands[0].shape)
    unbinds = op.target == "aten.unbind.int"
    position = 1 if unbinds else 2
    dim = _int(op.args[position]) % rank if len(op.args) > position else 0
    sizes = [1 if unbinds else spec.shape[dim] for spec in results if spec is not None]
    factors, dims = _identity_factors(shape, frozenset({dim}))
    operand, part = list(dims), list(dims)
    part[dim] = ()
    equal = len(set(sizes)) == 1
    if equal and len(sizes) > 1 and sizes[0] > 1:
        operand[dim] = (len(factors), len(factors) + 1)
        part[dim] = (len(factors) + 1,)
        factors += [OpFactor(size=len(sizes), fixed=True), OpFactor(size=sizes[0])]
    elif len(sizes) == 1:
        factors = [OpFactor(size=factor.size) for factor in factors]
        part = list(dims)
    if unbinds:
        del part[dim]
    result_dims: list[DimFactors] = []
    for spec in results:
        own = list(part)
        if spec is not None and not equal and spec.shape[dim] > 1:
            own[dim] = (len(factors),)
            factors.append(OpFactor(size=spec.shape[dim], fixed=True))
        result_dims.append(tuple(own) if spec is not None else ())
    kind = LocalArgKind.SIZE if op.target == "aten.split.Tensor" else LocalArgKind.SPLIT_SIZES
    return OpRule(
        factors=tuple(factors),
        operands=(tuple(operand),),
        results=tuple(result_dims),
        linear=_LINEAR,
        local_arguments=() if unbinds or not equal else (LocalArgument(1, kind, dim=dim),),
        is_view=True,
    )


def _cat(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule | None:
    """Equal parts: the joined dim is (part, rest); otherwise it is fixed."""
    assert results[0] is not None
    shape = results[0].shape
    if any(len(spec.shape) != len(shape) for spec in operands):
        return None
    dim = _int(op.args[1]) % len(shape) if len(op.args) > 1 else 0
    factors, dims = _identity_factors(shape, frozenset({dim}))
    sizes = {spec.shape[dim] for spec in operands}
    result = list(dims)
    if len(operands) == 1:
        factors = [OpFactor(size=factor.size) for factor in factors]
        operand_dims = [dims]
    elif len(sizes) == 1:
        part = next(iter(sizes))
        own: tuple[int, ...] = (len(factors) + 1,) if part > 1 else ()
        result[dim] = (len(factors), *own)
        factors.append(OpFactor(size=len(operands), fixed=True))
        if part > 1:
            factors.append(OpFactor(size=part))
        operand_dims = [(*dims[:dim], own, *dims[dim + 1 :]) for _ in operands]
    else:
        operand_dims = []
        for spec in operands:
            fixed: tuple[int, ...] = (len(factors),) if spec.shape[dim] > 1 else ()
            if fixed:
                factors.append(OpFactor(size=spec.shape[dim], fixed=True))
            operand_dims.append((*dims[:dim], fixed, *dims[dim + 1 :]))
    return OpRule(
        factors=tuple(factors),
        operands=tuple(operand_dims),
        results=(tuple(result),),
        linear=(frozenset(range(len(operands))),),
    )


def _stack(op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]) -> OpRule:
    """The new dim is fixed, all others stay."""
    assert results[0] is not None
    shape = results[0].shape
    dim = _int(op.args[1]) % len(shape) if len(op.args) > 1 else 0
    factors, dims = _identity_factors(shape, frozenset({dim}))
    return OpRule(
        factors=tuple(factors),
        operands=tuple((*dims[:dim], *dims[dim + 1 :]) for _ in operands),
        results=(dims,),
        linear=(frozenset(range(len(operands))),),
    )


def _int(arg: object) -> int:
    assert isinstance(arg, int), f"a dim must be an int, not {arg!r}"
    return arg


VIEW_RULES: dict[str, RuleFunction] = {
    "aten.view.default": _view,
    "aten._unsafe_view.default": _view,
    "aten.reshape.default": _view,
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
    "aten.t.default": _transpose,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.squeeze.default": _squeeze,
    "aten.squeeze.dim": _squeeze,
    "aten.squeeze.dims": _squeeze,
    "aten.expand.default": _expand,
    "aten.select.int": _slice_like,
    "aten.slice.Tensor": _slice_like,
    "aten.select_backward.default": _slice_backward,
    "aten.slice_backward.default": _slice_backward,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.unbind.int": _split,
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
}
