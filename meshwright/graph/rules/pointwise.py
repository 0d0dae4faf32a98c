"""Element-wise operators: every result dim is a parallel factor; broadcast operands lack it."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.graph.opgraph import Op, Ref, TensorSpec
from meshwright.graph.rules.base import DimFactors, OpFactor, OpRule

__all__ = ["POINTWISE", "RANDOM_POINTWISE", "broadcast_rule", "pointwise_rule"]

_LINEAR_UNARY = frozenset(
    [
        "neg",
        "clone",
        "contiguous",
        "_to_copy",
        "to",
        "detach",
        "alias",
        "lift_fresh",
        "lift_fresh_copy",
        "positive",
        "real",
    ]
)
_LINEAR_JOINT = frozenset({"add.Tensor", "sub.Tensor", "rsub.Tensor"})
_LINEAR_EACH = frozenset({"mul.Tensor"})
_LINEAR_FIRST = frozenset(
    {
        "div.Tensor",
        "mul.Scalar",
        "div.Scalar",
        "threshold_backward.default",
        "gelu_backward.default",
        "silu_backward.default",
        "tanh_backward.default",
        "sigmoid_backward.default",
        "leaky_relu_backward.default",
        "elu_backward.default",
        "hardtanh_backward.default",
        "native_dropout_backward.default",
        "masked_fill.Scalar",
    }
)
"""``masked_fill`` is linear only where the fill is 0; see ``_linear``."""

_FLOATING = frozenset({"float64", "float32", "bfloat16", "float16", "complex64", "complex128"})

POINTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "addcdiv",
        "addcmul",
        "alias",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "bitwise_and",
        "bitwise_not",
        "bitwise_or",
        "bitwise_xor",
        "ceil",
        "celu",
        "clamp",
        "clamp_max",
        "clamp_min",
        "clone",
        "contiguous",
        "copy",
        "copysign",
        "cos",
        "cosh",
        "detach",
        "digamma",
        "div",
        "elu",
        "elu_backward",
        "empty_like",
        "eq",
        "erf",
        "erfc",
        "erfinv",
        "exp",
        "exp2",
        "expm1",
        "fill",
        "floor",
        "floor_divide",
        "fmax",
        "fmin",
        "fmod",
        "full_like",
        "ge",
        "gelu",
        "gelu_backward",
        "gt",
        "hardshrink",
        "hardsigmoid",
        "hardsigmoid_backward",
        "hardswish",
        "hardswish_backward",
        "hardtanh",
        "hardtanh_backward",
        "isinf",
        "isnan",
        "leaky_relu",
        "leaky_relu_backward",
        "le",
        "lerp",
        "lgamma",
        "lift_fresh",
        "lift_fresh_copy",
        "log",
        "log10",
        "log1p",
        "log2",
        "log_sigmoid_forward",
        "log_sigmoid_backward",
        "logaddexp",
        "logical_and",
        "logical_not",
        "logical_or",
        "logical_xor",
        "logit",
        "lt",
        "masked_fill",
        "maximum",
        "minimum",
        "mish",
        "mish_backward",
        "mul",
        "ne",
        "neg",
        "nan_to_num",
        "ones_like",
        "native_dropout_backward",
        "positive",
        "pow",
        "real",
        "reciprocal",
        "relu",
        "remainder",
        "round",
        "rsqrt",
        "rsub",
        "selu",
        "sgn",
        "sigmoid",
        "sigmoid_backward",
        "sign",
        "silu",
        "silu_backward",
        "sin",
        "sinh",
        "softplus",
        "softplus_backward",
        "softshrink",
        "sqrt",
        "square",
        "sub",
        "tan",
        "tanh",
        "tanh_backward",
        "threshold",
        "threshold_backward",
        "to",
        "trunc",
        "where",
        "xlogy",
        "zeros_like",
        "_to_copy",
    ]
)

RANDOM_POINTWISE = frozenset(
    ["bernoulli", "native_dropout", "rand_like", "randn_like", "randint_like"]
)


def pointwise_rule(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule | None:
    """Rule of an element-wise operator named in ``POINTWISE`` or ``RANDOM_POINTWISE``."""
    name = op.target.split(".")[1]
    return broadcast_rule(
        operands, results, linear=_linear(op, results), random=name in RANDOM_POINTWISE
    )


def broadcast_rule(
    operands: Sequence[TensorSpec],
    results: Sequence[TensorSpec | None],
    *,
    linear: tuple[frozenset[int], ...] = (),
    random: bool = False,
) -> OpRule | None:
    """One parallel factor for each dim of the broadcast result; ``None`` where shapes disagree."""
    shape = next((spec.shape for spec in results if spec is not None), ())
    index_of_dim: dict[int, int] = {}
    factors: list[OpFactor] = []
    for dim, size in enumerate(shape):
        if size > 1:
            index_of_dim[dim] = len(factors)
            factors.append(OpFactor(size=size))

    def dims(spec: TensorSpec | None) -> DimFactors | None:
        if spec is None:
            return ()
        shift = len(shape) - len(spec.shape)
        if shift < 0:
            return None
        names: list[tuple[int, ...]] = []
        for dim, size in enumerate(spec.shape):
            if size > 1 and size != shape[dim + shift]:
                return None
            names.append((index_of_dim[dim + shift],) if size > 1 else ())
        return tuple(names)

    operand_dims = [dims(spec) for spec in operands]
    result_dims = [dims(spec) for spec in results]
    if any(item is None for item in (*operand_dims, *result_dims)):
        return None
    return OpRule(
        factors=tuple(factors),
        operands=tuple(item for item in operand_dims if item is not None),
        results=tuple(item for item in result_dims if item is not None),
        linear=linear,
        random=random,
    )


def _linear(op: Op, results: Sequence[TensorSpec | None]) -> tuple[frozenset[int], ...]:
    if any(spec is not None and spec.dtype not in _FLOATING for spec in results):
        # Whole numbers overflow, truth values saturate.
        return ()
    num_operands = len(op.inputs)
    overload = op.target.removeprefix("aten.")
    name = overload.split(".")[0]
    if name in _LINEAR_UNARY:
        return (frozenset({0}),)
    if overload in _LINEAR_JOINT:
        # With one tensor operand the other is a constant, and x + c is not linear.
        return (frozenset({0, 1}),) if num_operands == 2 else ()
    if overload in _LINEAR_EACH:
        return tuple(frozenset({position}) for position in range(num_operands))
    if overload == "masked_fill.Scalar" and op.args[2] != 0:
        return ()
    if overload == "where.self" and num_operands == 3:
        return (frozenset({1, 2}),)
    if overload in _LINEAR_FIRST and op.args and isinstance(op.args[0], Ref):
        return (frozenset({0}),)
    return ()
