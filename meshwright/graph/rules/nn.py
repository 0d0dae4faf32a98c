"""Normalization, embeddings and losses."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.graph.opgraph import Op, TensorSpec
from meshwright.graph.rules.base import (
    LocalArgKind,
    LocalArgument,
    OpFactor,
    OpRule,
    RuleFunction,
    Variant,
    einsum_rule,
)

__all__ = ["NN_RULES"]

_FIRST = (frozenset({0}),)
_LEADING = "abcdefgh"
_NORMALIZED = "uvwxyz"
_SPATIAL = "xyz"
_MEAN, _SUM = 1, 2
"""Reduction codes of ATen's losses."""


def _layer_norm(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    rank = len(operands[0].shape)
    normalized = _rank_of(op.args[1])
    lead = _LEADING[: rank - normalized]
    norm = _NORMALIZED[:normalized]
    stats = lead + "." * normalized
    equation = f"{lead}{norm}" + f",{norm}" * (len(operands) - 1)
    return einsum_rule(f"{equation}->{lead}{norm},{stats},{stats}", operands, results, fixed=norm)


def _layer_norm_backward(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    rank = len(operands[0].shape)
    normalized = _rank_of(op.args[2])
    lead = _LEADING[: rank - normalized]
    norm = _NORMALIZED[:normalized]
    stats = lead + "." * normalized
    left = f"{lead}{norm},{lead}{norm},{stats},{stats}" + f",{norm}" * (len(operands) - 4)
    return einsum_rule(
        f"{left}->{lead}{norm},{_if(results, 1, norm)},{_if(results, 2, norm)}",
        operands,
        results,
        fixed=norm,
    )


def _rms_norm(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    rank = len(operands[0].shape)
    normalized = _rank_of(op.args[1])
    lead, norm = _LEADING[: rank - normalized], _NORMALIZED[:normalized]
    left = f"{lead}{norm}" + f",{norm}" * (len(operands) - 1)
    stats = lead + "." * normalized
    return einsum_rule(f"{left}->{lead}{norm},{stats}", operands, results, fixed=norm)


def _rms_norm_backward(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    rank = len(operands[0].shape)
    normalized = _rank_of(op.args[2])
    lead, norm = _LEADING[: rank - normalized], _NORMALIZED[:normalized]
    stats = lead + "." * normalized
    left = f"{lead}{norm},{lead}{norm},{stats}" + f",{norm}" * (len(operands) - 3)
    return einsum_rule(
        f"{left}->{lead}{norm},{_if(results, 1, norm)}", operands, results, fixed=norm
    )


def _group_norm(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    """Only the batch is free; the operator is told its size in argument 3."""
    inner = _NORMALIZED[: len(operands[0].shape) - 2]
    left = f"nc{inner}" + ",c" * (len(operands) - 1)
    return einsum_rule(
        f"{left}->nc{inner},ng,ng",
        operands,
        results,
        fixed=f"cg{inner}",
        local_arguments=(LocalArgument(3, LocalArgKind.SIZE, tensor=-1, dim=0),),
    )


def _group_norm_backward(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    inner = _NORMALIZED[: len(operands[0].shape) - 2]
    left = f"nc{inner},nc{inner},ng,ng" + ",c" * (len(operands) - 4)
    return einsum_rule(
        f"{left}->nc{inner},{_if(results, 1, 'c')},{_if(results, 2, 'c')}",
        operands,
        results,
        fixed=f"cg{inner}",
        local_arguments=(LocalArgument(5, LocalArgKind.SIZE, tensor=-1, dim=0),),
    )


def _batch_norm(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    """Training statistics cover the whole batch, so sharding it needs collectives inside.

    With the running statistics (argument 5 is false) an image is normalized by itself.
    """
    inner = _SPATIAL[: len(operands[0].shape) - 2]
    left = f"nc{inner}" + ",c" * (len(operands) - 1)
    right = ",".join([f"nc{inner}"] + [_if(results, i, "c") for i in range(1, len(results))])
    return einsum_rule(
        f"{left}->{right}",
        operands,
        results,
        partial=dict.fromkeys(f"n{inner}", frozenset()),
        variants=dict.fromkeys(f"n{inner}", Variant.REDUCE_INSIDE) if op.args[5] else {},
    )


def _batch_norm_backward(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    inner = _SPATIAL[: len(operands[0].shape) - 2]
    left = f"nc{inner},nc{inner}" + ",c" * (len(operands) - 2)
    right = f"{_if(results, 0, f'nc{inner}')},{_if(results, 1, 'c')},{_if(results, 2, 'c')}"
    training = op.args[7]
    present = frozenset(i for i in (1, 2) if results[i] is not None)
    return einsum_rule(
        f"{left}->{right}",
        operands,
        results,
        partial=dict.fromkeys(f"n{inner}", frozenset() if training else present),
        variants=dict.fromkeys(f"n{inner}", Variant.REDUCE_INSIDE) if training else {},
    )


def _embedding(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    lead = _LEADING[: len(operands[1].shape)]
    return einsum_rule(
        f"vy,{lead}->{lead}y", operands, results, variants={"v": Variant.OFFSET}, linear=_FIRST
    )


def _embedding_backward(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    """Dividing by how often a row is used (argument 4) needs all indices at once."""
    lead = _LEADING[: len(operands[1].shape)]
    by_frequency = len(op.args) > 4 and op.args[4] is True
    return einsum_rule(
        f"{lead}y,{lead}->vy",
        operands,
        results,
        fixed=lead if by_frequency else "",
        variants={"v": Variant.OFFSET},
        linear=_FIRST,
    )


def _nll(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule | None:
    if len(operands[0].shape) != 2:
        return None
    reduction = op.args[3]
    weight = ",c" if len(operands) == 3 else ""
    loss = "n" if reduction == 0 else ""
    # Local classes give a sum, and know no total weight.
    return einsum_rule(
        f"nc,n{weight}->{loss},",
        operands,
        results,
        fixed="nc" if reduction == _MEAN else "" if reduction == _SUM and not weight else "c",
        partial={"n": frozenset({1}) if reduction == 0 else frozenset({0, 1}), "c": frozenset({0})},
        variants={"c": Variant.OFFSET},
    )


def _nll_backward(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule | None:
    if len(operands[1].shape) != 2:
        return None
    reduction = op.args[4]
    grad = "n" if operands[0].shape else ""
    weight = ",c" if len(operands) == 5 else ""
    return einsum_rule(
        f"{grad},nc,n{weight},->nc",
        operands,
        results,
        fixed="nc" if reduction == _MEAN else "",
        variants={"c": Variant.OFFSET},
        linear=_FIRST,
        ignored=frozenset({len(operands) - 1}) if reduction != _MEAN else frozenset(),
    )


def _elementwise_loss(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    """``mse_loss`` and its kin: all dims summed or averaged, or none."""
    names = _LEADING[: len(operands[0].shape)]
    reduction = _reduction_code(op, 2)
    return einsum_rule(
        f"{names},{names}->{names if reduction == 0 else ''}",
        operands,
        results,
        averaged=names if reduction == _MEAN else "",
    )


def _elementwise_loss_backward(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    names = _LEADING[: len(operands[1].shape)]
    reduction = _reduction_code(op, 3)
    grad = _broadcast(names, operands[0])
    return einsum_rule(
        f"{grad},{names},{names}->{names}",
        operands,
        results,
        averaged=names if reduction == _MEAN else "",
        linear=_FIRST,
    )


def _entropy_with_logits(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    """Like ``mse_loss``, with up to two weights that broadcast."""
    names = _LEADING[: len(operands[0].shape)]
    reduction = _reduction_code(op, 4)
    every = ",".join(_broadcast(names, spec) for spec in operands)
    return einsum_rule(
        f"{every}->{names if reduction == 0 else ''}",
        operands,
        results,
        averaged=names if reduction == _MEAN else "",
    )


def _reduction_code(op: Op, position: int) -> object:
    """Argument ``position`` of a loss: 0 none, 1 mean (the default), 2 sum."""
    return op.args[position] if len(op.args) > position else dict(op.kwargs).get("reduction", _MEAN)


def _broadcast(names: str, spec: TensorSpec) -> str:
    """Names of a tensor's dims that broadcasts to ``names``."""
    own = names[len(names) - len(spec.shape) :]
    return "".join(name if size > 1 else "." for name, size in zip(own, spec.shape, strict=True))


def _triangle(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    names = _LEADING[: len(operands[0].shape)]
    return einsum_rule(f"{names}->{names}", operands, results, fixed=names[-2:], linear=_FIRST)


def _pad(op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]) -> OpRule:
    """Padded dims are fixed."""
    assert results[0] is not None
    factors: list[OpFactor] = []
    operand: list[tuple[int, ...]] = []
    result: list[tuple[int, ...]] = []
    for before, after in zip(operands[0].shape, results[0].shape, strict=True):
        same = before == after
        for size, dims in ((before, operand), (after, result)):
            if same and dims is result:
                dims.append(operand[-1])
            elif size == 1:
                dims.append(())
            else:
                dims.append((len(factors),))
                factors.append(OpFactor(size=size, fixed=not same))
    return OpRule(factors=tuple(factors), operands=(tuple(operand),), results=(tuple(result),))


def _rank_of(shape: object) -> int:
    assert isinstance(shape, tuple)
    return len(shape)


def _if(results: Sequence[TensorSpec | None], position: int, names: str) -> str:
    """Dims of a result that may be absent."""
    return names if results[position] is not None else ""


NN_RULES: dict[str, RuleFunction] = {
    "aten.native_layer_norm.default": _layer_norm,
    "aten.native_layer_norm_backward.default": _layer_norm_backward,
    "aten._fused_rms_norm.default": _rms_norm,
    "aten._fused_rms_norm_backward.default": _rms_norm_backward,
    "aten.native_group_norm.default": _group_norm,
    "aten.native_group_norm_backward.default": _group_norm_backward,
    "aten._native_batch_norm_legit_functional.default": _batch_norm,
    "aten.native_batch_norm_backward.default": _batch_norm_backward,
    "aten.embedding.default": _embedding,
    "aten.embedding_dense_backward.default": _embedding_backward,
    "aten.nll_loss_forward.default": _nll,
    "aten.nll_loss_backward.default": _nll_backward,
    "aten.mse_loss.default": _elementwise_loss,
    "aten.mse_loss_backward.default": _elementwise_loss_backward,
    "aten.smooth_l1_loss.default": _elementwise_loss,
    "aten.huber_loss.default": _elementwise_loss,
    "aten.binary_cross_entropy_with_logits.default": _entropy_with_logits,
    "aten.tril.default": _triangle,
    "aten.triu.default": _triangle,
    "aten.constant_pad_nd.default": _pad,
}
