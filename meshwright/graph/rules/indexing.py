"""Factories and index operators."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.graph.opgraph import Op, Ref, TensorSpec
from meshwright.graph.rules.base import (
    LocalArgKind,
    LocalArgument,
    OpFactor,
    OpRule,
    RuleFunction,
)

__all__ = ["INDEXING_RULES"]


def _filled(op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]) -> OpRule:
    """A constant tensor: every dim may be sharded; an operand gives no values."""
    assert results[0] is not None
    position = 1 if operands else 0
    return _factory(
        operands, results[0], fixed=False, shape_args=(LocalArgument(position, LocalArgKind.SHAPE),)
    )


def _counted(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    """A tensor whose values depend on the position (``arange``): every rank makes all of it."""
    assert results[0] is not None
    return _factory(operands, results[0], fixed=True, shape_args=())


def _factory(
    operands: Sequence[TensorSpec],
    result: TensorSpec,
    *,
    fixed: bool,
    shape_args: tuple[LocalArgument, ...],
) -> OpRule:
    factors: list[OpFactor] = []

    def dims(spec: TensorSpec, is_fixed: bool) -> tuple[tuple[int, ...], ...]:
        named: list[tuple[int, ...]] = []
        for size in spec.shape:
            named.append((len(factors),) if size > 1 else ())
            if size > 1:
                factors.append(OpFactor(size=size, fixed=is_fixed))
        return tuple(named)

    return OpRule(
        operands=tuple(dims(spec, True) for spec in operands),
        results=(dims(result, fixed),),
        factors=tuple(factors),
        ignored=frozenset(range(len(operands))),
        local_arguments=shape_args,
    )


def _index(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule | None:
    """``x[:, i, j, :]`` with neighboring integer index tensors.

    The indexed dims of ``x`` are fixed; the broadcast dims of the indices take their place.
    """
    assert results[0] is not None
    indices = op.args[1]
    assert isinstance(indices, tuple)
    places = [dim for dim, index in enumerate(indices) if isinstance(index, Ref)]
    if places != list(range(places[0], places[-1] + 1)) or any(
        spec.dtype in {"bool", "uint8"} for spec in operands[1:]
    ):
        return None
    source, shape = operands[0].shape, results[0].shape
    num_new = len(shape) - (len(source) - len(places))
    factors: list[OpFactor] = []
    result: list[tuple[int, ...]] = []
    for size in shape:
        result.append((len(factors),) if size > 1 else ())
        if size > 1:
            factors.append(OpFactor(size=size))
    operand: list[tuple[int, ...]] = []
    for dim, size in enumerate(source):
        if dim in places:
            operand.append((len(factors),) if size > 1 else ())
            if size > 1:
                factors.append(OpFactor(size=size, fixed=True))
        else:
            operand.append(result[dim if dim < places[0] else dim - len(places) + num_new])
    new = result[places[0] : places[0] + num_new]
    index_dims = [
        tuple(
            new[num_new - len(spec.shape) + dim] if size > 1 else ()
            for dim, size in enumerate(spec.shape)
        )
        for spec in operands[1:]
    ]
    return OpRule(
        factors=tuple(factors),
        operands=(tuple(operand), *index_dims),
        results=(tuple(result),),
        linear=(frozenset({0}),),
    )


def _index_along(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    """``index_select`` and ``index_add``: the indexed dim is fixed, all others stay."""
    assert results[0] is not None
    shape = results[0].shape
    dim = op.args[1] if isinstance(op.args[1], int) else 0
    dim %= len(shape)
    factors: list[OpFactor] = []
    common: list[tuple[int, ...]] = []
    for position, size in enumerate(shape):
        common.append((len(factors),) if size > 1 and position != dim else ())
        if common[-1]:
            factors.append(OpFactor(size=size))

    def dims(spec: TensorSpec) -> tuple[tuple[int, ...], ...]:
        own: list[tuple[int, ...]] = list(common) if len(spec.shape) == len(shape) else [()]
        at = dim if len(spec.shape) == len(shape) else 0
        if spec.shape[at] > 1:
            own[at] = (len(factors),)
            factors.append(OpFactor(size=spec.shape[at], fixed=True))
        return tuple(own)

    adds = op.target == "aten.index_add.default"
    return OpRule(
        operands=tuple(dims(spec) for spec in operands),
        results=(dims(results[0]),),
        factors=tuple(factors),
        linear=(frozenset({0, 2}),) if adds else (frozenset({0}),),
    )


INDEXING_RULES: dict[str, RuleFunction] = {
    "aten.full.default": _filled,
    "aten.zeros.default": _filled,
    "aten.ones.default": _filled,
    "aten.empty.memory_format": _filled,
    "aten.new_zeros.default": _filled,
    "aten.new_ones.default": _filled,
    "aten.new_full.default": _filled,
    "aten.new_empty.default": _filled,
    "aten.scalar_tensor.default": _counted,
    "aten.arange.default": _counted,
    "aten.arange.start": _counted,
    "aten.arange.start_step": _counted,
    "aten.eye.default": _counted,
    "aten.eye.m": _counted,
    "aten.linspace.default": _counted,
    "aten.index.Tensor": _index,
    "aten.index_select.default": _index_along,
    "aten.index_add.default": _index_along,
}
