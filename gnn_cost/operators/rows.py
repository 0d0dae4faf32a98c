"""From the sizes of measured operators to rows of work: what the device does for each of them.

An operator as tables and sweeps name it may be several rows: the backward pass of a product is two
products, a mixture-of-experts layer is two grouped products and what stands between them. Flop and
bytes are counted from the sizes, by one convention whatever the table printed: a multiply-add is
two, every operand is read once and every result written once, causal attention counts attended
pairs, its backward pass twice the forward's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.work import EdgeKind, Family

__all__ = ["ROW_MAKERS", "Rows", "Sizes", "needed_columns", "rows_of"]

FloatArray = NDArray[np.float64]

_INDEX_BYTES = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """S operators of one name as R rows each."""

    family: tuple[Family, ...]
    """(R,)"""
    dims: FloatArray
    """(S, R, 4)"""
    flop: FloatArray
    """(S, R)"""
    num_bytes: FloatArray
    """(S, R)"""
    edges: tuple[tuple[int, int, EdgeKind], ...] = ()
    """Between rows of one operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """S operators of one name and direction, by column."""

    columns: Mapping[str, FloatArray]
    """(S,) each, finite where the maker needs them."""
    element_bytes: FloatArray
    """(S,)"""
    is_one_product: bool = False
    """The backward pass was measured as one product instead of two."""

    def __getitem__(self, name: str) -> FloatArray:
        return self.columns[name]

    @property
    def result_bytes(self) -> FloatArray:
        """Of one element of a product's result: 2 where operands have less."""
        return np.maximum(self.element_bytes, 2.0)


_Row = tuple[Family, tuple[FloatArray | float, ...], FloatArray, FloatArray]


def _rows(*rows: _Row, edges: tuple[tuple[int, int, EdgeKind], ...] = ()) -> Rows:
    sizes = [np.broadcast_arrays(*dims, flop, num_bytes) for _, dims, flop, num_bytes in rows]
    table = np.maximum(np.array(sizes, np.float64), 0.0)  # (R, 6, S)
    return Rows(
        family=tuple(row[0] for row in rows),
        dims=np.maximum(table[:, :4].transpose(2, 0, 1), 1.0),
        flop=table[:, 4].T,
        num_bytes=np.maximum(table[:, 5].T, 1.0),
        edges=edges,
    )


def _product(
    family: Family,
    of: Sizes,
    b: FloatArray | float,
    m: FloatArray,
    n: FloatArray,
    k: FloatArray,
) -> _Row:
    num_bytes = b * (of.element_bytes * (m * k + k * n) + of.result_bytes * m * n)
    return family, (b, m, n, k), 2.0 * b * m * n * k, num_bytes


def _products(family: Family, of: Sizes, b: FloatArray | float, *, is_backward: bool) -> Rows:
    m, n, k = of["m"], of["n"], of["k"]
    if not is_backward:
        return _rows(_product(family, of, b, m, n, k))
    to_input = _product(family, of, b, m, k, n)
    if of.is_one_product:
        return _rows(to_input)
    return _rows(to_input, _product(family, of, b, k, n, m), edges=((0, 1, EdgeKind.ORDER),))


def _linear(of: Sizes, *, is_backward: bool) -> Rows:
    return _products(Family.MATMUL, of, 1.0, is_backward=is_backward)


def _bmm(of: Sizes, *, is_backward: bool) -> Rows:
    return _products(Family.BATCHED_MATMUL, of, of["b"], is_backward=is_backward)


def _grouped(of: Sizes, *, is_backward: bool) -> Rows:
    """``m`` rows shared evenly by ``experts``."""
    each = Sizes(
        columns={**of.columns, "m": of["m"] / of["experts"]},
        element_bytes=of.element_bytes,
        is_one_product=of.is_one_product,
    )
    return _products(Family.GROUPED_MATMUL, each, of["experts"], is_backward=is_backward)


def _attention(of: Sizes, *, is_backward: bool) -> Rows:
    """Queries are the last of the keys, as where keys of earlier tokens are kept."""
    b, heads, head_dim = of["b"], of["heads"], of["head_dim"]
    queries, keys = of["seq_q"], of["seq_k"]
    pairs = np.where(of["causal"] > 0, _causal_pairs(queries, keys), queries * keys)
    window = of.columns.get("window")
    if window is not None:
        limit = np.where(np.nan_to_num(window) > 0, queries * np.maximum(window, 1.0), pairs)
        pairs = np.minimum(pairs, np.nan_to_num(limit, nan=np.inf))
    traffic = 2.0 * b * head_dim * (queries * heads + keys * of["kv_heads"])
    ways = 2.0 if is_backward else 1.0
    return _rows(
        (
            Family.ATTENTION_BACKWARD if is_backward else Family.ATTENTION,
            (b * heads, queries, keys, head_dim),
            ways * 4.0 * b * heads * head_dim * pairs,
            ways * traffic * of.element_bytes,
        )
    )


def _causal_pairs(queries: FloatArray, keys: FloatArray) -> FloatArray:
    """The last query sees all keys; with fewer keys than queries the first sees one."""
    full = queries * keys - queries * (queries - 1) / 2
    short = keys * (keys + 1) / 2 + (queries - keys) * keys
    return np.where(keys >= queries, full, short)


def _moe(of: Sizes, *, is_backward: bool) -> Rows:
    """Gate and up in one grouped product, their product, down, and the weighted sum of experts.

    Routing is balanced: every token goes to ``top_k`` of ``experts``, ``ep`` ranks hold equal
    shares of both. ``n`` is an expert's inner size before tensor parallelism.
    """
    assert not is_backward, "the caller asks can_make first"
    hidden, inner = of["k"], of["n"] / of["tp"]
    ep = of["ep"]
    pairs = np.maximum(of["m"] * of["top_k"] / ep, 1.0)
    experts = np.minimum(np.maximum(of["experts"] / ep, 1.0), pairs)
    rows = np.maximum(pairs / experts, 1.0)
    wide = of.result_bytes
    return _rows(
        _product(Family.GROUPED_MATMUL, of, experts, rows, 2.0 * inner, hidden),
        (
            Family.ELEMENTWISE,
            (1.0, pairs, inner, 2.0),
            6.0 * pairs * inner,
            3.0 * pairs * inner * wide,
        ),
        _product(Family.GROUPED_MATMUL, of, experts, rows, hidden, inner),
        (
            Family.REDUCTION,
            (1.0, pairs, hidden, 2.0),
            2.0 * pairs * hidden,
            (pairs + of["m"]) * hidden * wide,
        ),
        edges=(
            (0, 1, EdgeKind.DATA),
            (0, 1, EdgeKind.FUSION),
            (1, 2, EdgeKind.DATA),
            (2, 3, EdgeKind.DATA),
        ),
    )


def _embedding(of: Sizes, *, is_backward: bool) -> Rows:
    m, n = of["m"], of["n"]
    vocab = np.where(np.isfinite(of["k"]), of["k"], m)
    if is_backward:
        moved = (m * n + vocab * n) * of.element_bytes
        return _rows(
            (Family.EMBEDDING_BACKWARD, (1.0, m, n, vocab), m * n, moved + _INDEX_BYTES * m)
        )
    moved = 2.0 * m * n * of.element_bytes
    return _rows((Family.EMBEDDING, (1.0, m, n, vocab), 0.0 * m, moved + _INDEX_BYTES * m))


def _cross_entropy(of: Sizes, *, is_backward: bool) -> Rows:
    m, numel = of["m"], of["m"] * of["n"]
    ways = 2.0 if is_backward else 1.0
    family = Family.SOFTMAX_BACKWARD if is_backward else Family.SOFTMAX
    moved = ways * numel * of.element_bytes + _INDEX_BYTES * m
    return _rows((family, (1.0, m, of["n"], ways), ways * 5.0 * numel, moved))


def _sum(of: Sizes, *, is_backward: bool) -> Rows:
    del is_backward  # there is only one
    numel = of["m"] * of["n"]
    return _rows((Family.REDUCTION, (1.0, of["m"], of["n"], 1.0), numel, numel * of.element_bytes))


def _convolution(of: Sizes, *, is_backward: bool) -> Rows:
    area = _out(of, "height") * _out(of, "width")
    inner = of["channels_in"] / of["groups"] * of["kernel"] ** 2
    results = of["b"] * of["channels_out"] * area
    image = of["b"] * of["channels_in"] * of["height"] * of["width"]
    moved = (image + of["channels_out"] * inner + results) * of.element_bytes
    ways = 2.0 if is_backward else 1.0
    return _rows(
        (
            Family.CONVOLUTION_BACKWARD if is_backward else Family.CONVOLUTION,
            (of["groups"], of["b"] * area, of["channels_out"] / of["groups"], inner),
            ways * 2.0 * results * inner,
            ways * moved,
        )
    )


def _out(of: Sizes, side: str) -> FloatArray:
    """Length of a result; windows that overlap keep their centers inside the image."""
    kernel, stride = of["kernel"], of["stride"]
    padding = np.where(stride < kernel, (kernel - 1) // 2, 0.0)
    return (of[side] + 2 * padding - kernel) // stride + 1


def _batch_norm(of: Sizes, *, is_backward: bool) -> Rows:
    rows, length = of["b"] * of["channels_in"] * of["height"], of["width"]
    numel = rows * length
    family, moves, flop = (
        (Family.NORM_BACKWARD, 3.0, 16.0) if is_backward else (Family.NORM, 2.0, 8.0)
    )
    return _rows(
        (family, (1.0, rows, length, moves), flop * numel, moves * numel * of.element_bytes)
    )


def _pool(of: Sizes, *, is_backward: bool) -> Rows:
    results = of["b"] * of["channels_in"] * _out(of, "height") * _out(of, "width")
    rows = of["b"] * of["channels_in"] * of["height"]
    ways = 2.0 if is_backward else 1.0
    moved = (rows * of["width"] + results) * of.element_bytes
    return _rows(
        (Family.POOL, (1.0, rows, of["width"], 2.0), ways * results * of["kernel"] ** 2, moved)
    )


def _optimizer(flop: float, moves: float) -> Callable[..., Rows]:
    """Sweeps count elements and tensors of all parameters; gradients and state of their dtype."""

    def make(of: Sizes, *, is_backward: bool) -> Rows:
        del is_backward  # there is only one
        numel = of["numel"]
        dims = (1.0, numel, 1.0, of["num_tensors"])
        return _rows((Family.OPTIMIZER, dims, flop * numel, moves * numel * of.element_bytes))

    return make


def _each(
    flop: float,
    moves: tuple[float, float],
    *,
    forward: Family = Family.ELEMENTWISE,
    backward: Family = Family.ELEMENTWISE,
    weights: float = 0.0,
    mask_bytes: float = 0.0,
) -> Callable[..., Rows]:
    """Maker for m rows of n.

    Args:
        flop: forward, for each element; the backward pass does twice that.
        moves: tensors of (m, n) that the forward and the backward pass read and write.
        forward: family of the forward pass.
        backward: and of the backward pass.
        weights: vectors of (n,) read; the backward pass reads one and writes all gradients.
        mask_bytes: of each element, written and read back.
    """

    def make(of: Sizes, *, is_backward: bool) -> Rows:
        m, n = of["m"], of["n"]
        moved = moves[1] if is_backward else moves[0]
        vectors = weights + min(weights, 1.0) if is_backward else weights
        num_bytes = m * n * (moved * of.element_bytes + mask_bytes) + vectors * n * of.element_bytes
        family = backward if is_backward else forward
        ways = 2.0 if is_backward else 1.0
        return _rows((family, (1.0, m, n, moved), ways * flop * m * n, num_bytes))

    return make


_NORM = {"forward": Family.NORM, "backward": Family.NORM_BACKWARD}
_SOFTMAX = {"forward": Family.SOFTMAX, "backward": Family.SOFTMAX_BACKWARD}
_RANDOM = {"forward": Family.RANDOM, "backward": Family.ELEMENTWISE}

ROW_MAKERS: dict[str, tuple[Callable[..., Rows], tuple[str, ...]]] = {
    "linear": (_linear, ("m", "n", "k")),
    "lm_head": (_linear, ("m", "n", "k")),
    "bmm": (_bmm, ("b", "m", "n", "k")),
    "grouped_mm": (_grouped, ("experts", "m", "n", "k")),
    "sdpa": (_attention, ("b", "seq_q", "seq_k", "heads", "kv_heads", "head_dim")),
    "moe_ffn": (_moe, ("m", "n", "k", "experts", "top_k")),
    "embedding": (_embedding, ("m", "n")),
    "cross_entropy": (_cross_entropy, ("m", "n")),
    "sum": (_sum, ("m", "n")),
    "conv2d": (
        _convolution,
        ("b", "channels_in", "channels_out", "groups", "height", "width", "kernel", "stride"),
    ),
    "batch_norm": (_batch_norm, ("b", "channels_in", "height", "width")),
    "pool": (_pool, ("b", "channels_in", "height", "width", "kernel", "stride")),
    "adam": (_optimizer(13.0, 7.0), ("numel", "num_tensors")),
    "adamw": (_optimizer(14.0, 7.0), ("numel", "num_tensors")),
    "sgd": (_optimizer(4.0, 5.0), ("numel", "num_tensors")),
    "add": (_each(1.0, (3.0, 0.0)), ("m", "n")),
    "mul": (_each(1.0, (3.0, 5.0)), ("m", "n")),
    "div": (_each(1.0, (3.0, 5.0)), ("m", "n")),
    "add_scalar": (_each(1.0, (2.0, 2.0)), ("m", "n")),
    "mul_scalar": (_each(1.0, (2.0, 2.0)), ("m", "n")),
    "neg": (_each(1.0, (2.0, 2.0)), ("m", "n")),
    "pow": (_each(1.0, (2.0, 3.0)), ("m", "n")),
    "rsqrt": (_each(2.0, (2.0, 3.0)), ("m", "n")),
    "relu": (_each(1.0, (2.0, 3.0)), ("m", "n")),
    "tanh": (_each(5.0, (2.0, 3.0)), ("m", "n")),
    "gelu": (_each(8.0, (2.0, 3.0)), ("m", "n")),
    "gelu_tanh": (_each(8.0, (2.0, 3.0)), ("m", "n")),
    "silu": (_each(5.0, (2.0, 3.0)), ("m", "n")),
    "silu_mul": (_each(6.0, (3.0, 5.0)), ("m", "n")),
    "rope": (_each(6.0, (2.0, 2.0)), ("m", "n")),
    "copy": (_each(0.0, (2.0, 2.0), forward=Family.COPY), ("m", "n")),
    "random": (_each(2.0, (1.0, 1.0), forward=Family.RANDOM), ("m", "n")),
    "dropout": (_each(2.0, (2.0, 2.0), mask_bytes=1.0, **_RANDOM), ("m", "n")),
    "softmax": (_each(5.0, (2.0, 3.0), **_SOFTMAX), ("m", "n")),
    "layer_norm": (_each(8.0, (2.0, 3.0), weights=2.0, **_NORM), ("m", "n")),
    "rms_norm": (_each(6.0, (2.0, 3.0), weights=1.0, **_NORM), ("m", "n")),
}
"""By operator: who makes its rows, and the columns without which that cannot be."""

_FORWARD_ONLY = frozenset(("moe_ffn", "add", "add_scalar", "sum", "copy", "random"))


def needed_columns(op: str, direction: str) -> tuple[str, ...] | None:
    """Columns without which rows cannot be made; ``None`` where no columns would do."""
    if op not in ROW_MAKERS or (direction == "bwd" and op in _FORWARD_ONLY):
        return None
    if (direction == "update") != (op in ("adam", "adamw", "sgd")):
        return None
    return ROW_MAKERS[op][1]


def rows_of(op: str, direction: str, of: Sizes) -> Rows:
    """Rows of operators whose ``needed_columns`` are there."""
    return ROW_MAKERS[op][0](of, is_backward=direction == "bwd")
