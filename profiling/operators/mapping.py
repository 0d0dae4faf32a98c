"""From an ATen operator with its local operands to a family and its sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

from meshwright.graph.opgraph import Arg, Op, OpGraph, Phase, TensorSpec
from meshwright.profiling.operators.candidate import Dims
from meshwright.profiling.operators.images import padding_of

__all__ = ["COVERED", "LocalOp", "Mapped", "Pairs", "dims_of"]


class Mapped(NamedTuple):
    """A family and sizes."""

    name: str
    dims: Dims


COVERED = Mapped("", {})
"""Part of what another operator's family measures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOp:
    """An operator with what it reads and writes on one device."""

    op: Op
    operands: tuple[TensorSpec, ...]
    """In the order of ``Op.inputs``."""
    results: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Operators that one family stands for together."""

    gates: frozenset[int]
    """``silu`` whose result a product reads."""
    products: frozenset[int]
    """Those products."""

    @classmethod
    def of(cls, graph: OpGraph) -> Self:
        """The pairs among the forward operators of a graph."""
        made = {
            value: op.index
            for op in graph.ops
            if op.target == "aten.silu.default" and op.phase is Phase.FORWARD
            for value in op.results
        }
        gates: set[int] = set()
        products: set[int] = set()
        for op in graph.ops:
            if op.target != "aten.mul.Tensor" or op.phase is not Phase.FORWARD:
                continue
            read = [made[value] for value in op.inputs if value in made]
            if read and not gates.intersection(read) and len(op.inputs) == 2:
                gates.update(read)
                products.add(op.index)
        return cls(gates=frozenset(gates), products=frozenset(products))


def dims_of(local: LocalOp, pairs: Pairs) -> Mapped | None:
    """Family and sizes; ``COVERED``; or None where no family stands for the operator."""
    op = local.op
    if op.index in pairs.products or op.target.startswith("aten.nll_loss"):
        return COVERED
    if op.index in pairs.gates:
        return Mapped("silu_mul", _rows(local.results[0]))
    name = op.target.split(".")[1]
    if name.startswith("_scaled_dot_product"):
        return _attention(local)
    special = _SPECIAL.get(name)
    if special is not None:
        return special(local)
    if name in _BY_RESULT and local.results:
        return Mapped(_BY_RESULT[name], _rows(local.results[0]))
    return None


def _rows(spec: TensorSpec) -> Dims:
    """All but the last dim as rows."""
    last = spec.shape[-1] if spec.shape else 1
    return {"m": spec.num_elements // max(last, 1), "n": last}


def _product(local: LocalOp) -> Mapped | None:
    """``mm`` and ``addmm``: the matrices are the last two operands."""
    left, right = local.operands[-2:]
    return Mapped("linear", {"m": left.shape[0], "n": right.shape[1], "k": left.shape[1]})


def _batched_product(local: LocalOp) -> Mapped | None:
    left, right = local.operands[-2:]
    b, m, k = left.shape
    return Mapped("bmm", {"b": b, "m": m, "n": right.shape[2], "k": k})


def _grouped_product(local: LocalOp) -> Mapped | None:
    left, right = local.operands[:2]
    if len(left.shape) != 2 or len(right.shape) != 3:
        return None
    experts, k, n = right.shape
    return Mapped("grouped_mm", {"m": left.shape[0], "n": n, "k": k, "experts": experts})


def _attention(local: LocalOp) -> Mapped | None:
    """Fused attention; where ``is_causal`` stands depends on the kernel's signature."""
    position = 6 if "efficient" in local.op.target else 4
    if "cudnn" in local.op.target or "backward" in local.op.target:
        return None
    query, key = local.operands[:2]
    b, heads, seq_q, head_dim = query.shape
    dims: Dims = {
        "b": b,
        "seq_q": seq_q,
        "seq_k": key.shape[2],
        "heads": heads,
        "kv_heads": key.shape[1],
        "head_dim": head_dim,
        "causal": _argument(local.op, position) is True,
    }
    return Mapped("sdpa", dims)


def _argument(op: Op, position: int) -> Arg:
    return op.args[position] if position < len(op.args) else None


def _binary(name: str) -> Callable[[LocalOp], Mapped | None]:
    """Two tensors of one size, or one that is repeated; with a number where there is a family."""

    def mapped(local: LocalOp) -> Mapped | None:
        if len(local.operands) == 2:
            return Mapped(name, _rows(local.results[0]))
        family = {"add": "add_scalar", "mul": "mul_scalar", "div": "mul_scalar"}[name]
        return Mapped(family, _rows(local.results[0]))

    return mapped


def _copy(local: LocalOp) -> Mapped | None:
    source, result = local.operands[0], local.results[0]
    if source.dtype != result.dtype:
        return None
    in_order = source.stride == result.stride
    return Mapped("copy", {**_rows(result), "variant": "contiguous" if in_order else "strided"})


def _joined(local: LocalOp) -> Mapped | None:
    return Mapped("copy", {**_rows(local.results[0]), "variant": "contiguous"})


def _reduction(local: LocalOp) -> Mapped | None:
    """Sums over the last dim, over leading dims, or over whole images."""
    source = local.operands[0]
    dims = _argument(local.op, 1)
    rank = len(source.shape)
    if not isinstance(dims, tuple) or rank == 0:
        return None
    where = sorted(int(dim) % rank for dim in dims if isinstance(dim, int))
    if where == [2, 3] and rank == 4 and source.shape[2] == source.shape[3]:
        b, channels, length, _ = source.shape
        return Mapped("pool", _image(b, channels, length, length, length, length, "avg"))
    if where == [rank - 1]:
        return Mapped("sum", {**_rows(source), "variant": "over_columns"})
    if where == list(range(len(where))):
        kept = 1
        for size in source.shape[len(where) :]:
            kept *= size
        dims_mn: Dims = {"m": source.num_elements // max(kept, 1), "n": kept}
        return Mapped("sum", {**dims_mn, "variant": "over_rows"})
    return None


def _image(
    b: int, channels: int, height: int, width: int, kernel: int, stride: int, variant: str
) -> Dims:
    return {
        "b": b,
        "channels_in": channels,
        "height": height,
        "width": width,
        "kernel": kernel,
        "stride": stride,
        "variant": variant,
    }


def _max_pool(local: LocalOp) -> Mapped | None:
    source = local.operands[0]
    kernel, stride = _square(local.op, 1), _square(local.op, 2)
    if len(source.shape) != 4 or kernel is None or stride is None:
        return None
    if _square(local.op, 3) != padding_of(kernel, stride):
        return None
    b, channels, height, width = source.shape
    return Mapped("pool", _image(b, channels, height, width, kernel, stride, "max"))


def _square(op: Op, position: int) -> int | None:
    """An argument that is the same for height and width."""
    given = _argument(op, position)
    if isinstance(given, tuple) and len({repr(item) for item in given}) == 1:
        return given[0] if isinstance(given[0], int) else None
    return None


def _convolution(local: LocalOp) -> Mapped | None:
    source, weight = local.operands[:2]
    stride, padding = _square(local.op, 3), _square(local.op, 4)
    groups = _argument(local.op, 8)
    if len(source.shape) != 4 or stride is None or not isinstance(groups, int):
        return None
    channels_out, _, kernel, kernel_width = weight.shape
    plain = _square(local.op, 5) == 1 and _argument(local.op, 6) is False
    if kernel != kernel_width or padding != padding_of(kernel, stride) or not plain:
        return None
    b, channels_in, height, width = source.shape
    dims: Dims = {
        "b": b,
        "channels_in": channels_in,
        "channels_out": channels_out,
        "kernel": kernel,
        "stride": stride,
        "height": height,
        "width": width,
        "groups": groups,
    }
    return Mapped("conv2d", dims)


def _batch_norm(local: LocalOp) -> Mapped | None:
    if len(local.operands[0].shape) != 4:
        return None
    b, channels, height, width = local.operands[0].shape
    return Mapped("batch_norm", {"b": b, "channels_in": channels, "height": height, "width": width})


def _embedding(local: LocalOp) -> Mapped | None:
    table, ids = local.operands[:2]
    return Mapped("embedding", {"m": ids.num_elements, "n": table.shape[1], "k": table.shape[0]})


def _gelu(local: LocalOp) -> Mapped | None:
    kind = dict(local.op.kwargs).get("approximate")
    name = "gelu_tanh" if kind == "tanh" else "gelu"
    return Mapped(name, _rows(local.results[0]))


def _random(variant: str) -> Callable[[LocalOp], Mapped | None]:
    return lambda local: Mapped(
        "random", {"numel": local.results[0].num_elements, "variant": variant}
    )


_SPECIAL: dict[str, Callable[[LocalOp], Mapped | None]] = {
    "mm": _product,
    "addmm": _product,
    "bmm": _batched_product,
    "baddbmm": _batched_product,
    "_grouped_mm": _grouped_product,
    "add": _binary("add"),
    "sub": _binary("add"),
    "mul": _binary("mul"),
    "div": _binary("div"),
    "gelu": _gelu,
    "clone": _copy,
    "copy": _copy,
    "cat": _joined,
    "stack": _joined,
    "sum": _reduction,
    "mean": _reduction,
    "convolution": _convolution,
    "max_pool2d_with_indices": _max_pool,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_functional": _batch_norm,
    "embedding": _embedding,
    "randn": _random("normal"),
    "rand": _random("uniform"),
    "bernoulli": _random("bernoulli"),
}

_BY_RESULT = {
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "_log_softmax": "cross_entropy",
    "native_layer_norm": "layer_norm",
    "_fused_rms_norm": "rms_norm",
    "rms_norm": "rms_norm",
    "native_dropout": "dropout",
    "relu": "relu",
    "tanh": "tanh",
    "silu": "silu",
    "neg": "neg",
    "pow": "pow",
    "rsqrt": "rsqrt",
}
"""Families whose sizes are those of the first result, as rows."""
