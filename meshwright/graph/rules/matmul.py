"""Matrix products and attention, as index equations."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.graph.opgraph import Op, TensorSpec
from meshwright.graph.rules.base import OpRule, RuleFunction, Variant, einsum_rule

__all__ = ["MATMUL_RULES"]

_RING = {"s": Variant.RING}
_EACH_OF_TWO = (frozenset({0}), frozenset({1}))


def _product(equation: str) -> RuleFunction:
    def rule(_: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]) -> OpRule:
        return einsum_rule(equation, operands, results, linear=_EACH_OF_TWO)

    return rule


def _addmm(op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]) -> OpRule:
    """The bias is added once: where ``k`` is sharded only one rank adds it."""
    product = "mk,kn->mn" if op.target == "aten.addmm.default" else "bmk,bkn->bmn"
    left, result = product.split("->")
    bias = result[len(result) - len(operands[0].shape) :]
    bias = "".join(
        name if size > 1 else "." for name, size in zip(bias, operands[0].shape, strict=True)
    )
    return einsum_rule(
        f"{bias},{left}->{result}", operands, results, additive=frozenset({0}), linear=()
    )


def _attention(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    """Scaled dot-product attention: batch and heads are free, the softmax needs the rest whole.

    With as many queries as keys and no mask, both may be cut alike where blocks of keys and values
    go around a ring. The CPU kernel returns the log-sum-exp as (batch, heads, queries).
    """
    if len(operands) == 3 and operands[0].shape[2] == operands[1].shape[2]:
        return einsum_rule(
            "bhsd,bhsd,bhse->bhse,bhs", operands, results, fixed="sde", variants=_RING
        )
    mask = ""
    if len(operands) == 4:
        names = "bhqk"[4 - len(operands[3].shape) :]
        mask = "," + "".join(
            name if size > 1 else "." for name, size in zip(names, operands[3].shape, strict=True)
        )
    return einsum_rule(f"bhqd,bhkd,bhke{mask}->bhqe,bhq", operands, results, fixed="qkde")


def _attention_backward(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    if len(operands) == 6 and operands[1].shape[2] == operands[2].shape[2]:
        return einsum_rule(
            "bhse,bhsd,bhsd,bhse,bhse,bhs->bhsd,bhsd,bhse",
            operands,
            results,
            fixed="sde",
            variants=_RING,
        )
    mask = ""
    if len(operands) == 7:
        names = "bhqk"[4 - len(operands[6].shape) :]
        mask = "," + "".join(
            name if size > 1 else "." for name, size in zip(names, operands[6].shape, strict=True)
        )
    return einsum_rule(
        f"bhqe,bhqd,bhkd,bhke,bhqe,bhq{mask}->bhqd,bhkd,bhke", operands, results, fixed="qkde"
    )


MATMUL_RULES: dict[str, RuleFunction] = {
    "aten.mm.default": _product("mk,kn->mn"),
    "aten.bmm.default": _product("bmk,bkn->bmn"),
    "aten.mv.default": _product("mk,k->m"),
    "aten.dot.default": _product("k,k->"),
    "aten.addmm.default": _addmm,
    "aten.baddbmm.default": _addmm,
    "aten._scaled_dot_product_flash_attention_for_cpu.default": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": _attention_backward,
}
