"""From an operator of a captured graph to its family and the sizes that describe its work.

A size is a product of dims of one operand or result. Which dims these are depends on the operator
alone; how large they are on one rank depends on how that tensor is sharded, which
``write_columns`` knows. So what is found here serves every way of sharding a graph.

``tensors``, the last size of most families, counts the distinct operands and the results that have
at least half the elements of the largest: a bias, a norm's statistics or a mask of bools move next
to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from meshwright.cost.work import DTYPES, Family
from meshwright.graph.opgraph import Arg, Op, OpGraph, TensorSpec
from meshwright.graph.rules.pointwise import POINTWISE, RANDOM_POINTWISE

__all__ = ["COUNTED", "OpWork", "OpWorks", "Size", "dtype_index", "family_of"]


class Size(NamedTuple):
    """One of the four sizes."""

    whole: float
    """In the graph: of all ranks together."""
    tensor: int = 0
    """An operand; -1 is the first result, -2 the second."""
    dims: tuple[int, ...] = ()
    """Its dims whose sharding divides ``whole``."""


ONE = Size(1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpWork:
    """What is known of an operator before it is sharded."""

    family: Family
    dtype: int
    """Place in ``DTYPES``."""
    sizes: tuple[Size, Size, Size, Size]
    """b, m, n, k as ``cost.work`` has them."""
    flop_factor: float
    """Of ``COUNTED`` families the share of ``Op.flop`` that is done: causal attention skips keys
    behind a query, and the backward computes scores again. Of all others, which ``Op.flop`` leaves
    out, operations for each element of m rows of n."""


class OpWorks:
    """The work of every operator of one graph, found when it is first asked for."""

    def __init__(self, graph: OpGraph) -> None:
        """Of a captured graph."""
        self._graph = graph
        self._found: dict[int, OpWork] = {}

    def of(self, op: Op) -> OpWork:
        """Work of one of the graph's operators that is no view."""
        if op.index not in self._found:
            self._found[op.index] = _work_of(_Tensors(op, self._graph))
        return self._found[op.index]


_FAMILIES: dict[Family, tuple[str, ...]] = {
    Family.MATMUL: ("mm", "addmm", "mv", "dot"),
    Family.BATCHED_MATMUL: ("bmm", "baddbmm"),
    Family.GROUPED_MATMUL: ("_grouped_mm",),
    Family.CONVOLUTION: ("convolution",),
    Family.CONVOLUTION_BACKWARD: ("convolution_backward",),
    Family.NORM: (
        "_fused_rms_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_functional",
        "native_batch_norm",
        "native_group_norm",
        "native_layer_norm",
        "rms_norm",
    ),
    Family.NORM_BACKWARD: (
        "_fused_rms_norm_backward",
        "native_batch_norm_backward",
        "native_group_norm_backward",
        "native_layer_norm_backward",
    ),
    Family.SOFTMAX: ("_log_softmax", "_safe_softmax", "_softmax"),
    Family.SOFTMAX_BACKWARD: ("_log_softmax_backward_data", "_softmax_backward_data"),
    Family.REDUCTION: (
        *("all", "amax", "amin", "any", "argmax", "argmin", "cumprod", "cumsum", "logsumexp"),
        *("linalg_vector_norm", "max", "mean", "min", "prod", "std", "sum", "var", "var_mean"),
        *("binary_cross_entropy_with_logits", "huber_loss", "mse_loss", "smooth_l1_loss"),
    ),
    Family.EMBEDDING: ("embedding",),
    Family.EMBEDDING_BACKWARD: ("embedding_dense_backward",),
    Family.COPY: (
        *("_to_copy", "clone", "contiguous", "copy", "fill", "lift_fresh", "lift_fresh_copy", "to"),
        *("arange", "empty", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros"),
        *("empty_like", "full_like", "ones_like", "zeros_like"),
        *("new_empty", "new_full", "new_ones", "new_zeros"),
        *("cat", "constant_pad_nd", "flip", "roll", "select_backward", "slice_backward", "stack"),
        *("as_strided", "repeat", "slice_scatter", "select_scatter", "unfold_backward"),
    ),
    Family.INDEX: (
        *("argsort", "gather", "index", "index_add", "index_put", "index_select", "masked_select"),
        *("nll_loss_backward", "nll_loss_forward", "nonzero", "scatter", "scatter_add", "sort"),
        *("topk", "bincount", "histc", "searchsorted", "unique_consecutive"),
    ),
    Family.RANDOM: (*RANDOM_POINTWISE, "rand", "randint", "randn", "randperm"),
    Family.POOL: (
        *("_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "avg_pool2d"),
        *("avg_pool2d_backward", "max_pool2d_with_indices", "max_pool2d_with_indices_backward"),
        *("upsample_bilinear2d", "upsample_bilinear2d_backward", "upsample_nearest2d"),
        "upsample_nearest2d_backward",
    ),
    Family.ELEMENTWISE: (
        *("huber_loss_backward", "mse_loss_backward", "smooth_l1_loss_backward", "tril", "triu"),
    ),
}
_FAMILY_OF_NAME: dict[str, Family] = {
    **dict.fromkeys(POINTWISE, Family.ELEMENTWISE),
    **{name: family for family, names in _FAMILIES.items() for name in names},
}

COUNTED = (
    Family.MATMUL,
    Family.BATCHED_MATMUL,
    Family.GROUPED_MATMUL,
    Family.ATTENTION,
    Family.ATTENTION_BACKWARD,
    Family.CONVOLUTION,
    Family.CONVOLUTION_BACKWARD,
)
"""Families whose operations ``Op.flop`` counts."""

_ELEMENT_FLOP = {
    **{Family.NORM: 8.0, Family.NORM_BACKWARD: 16.0},
    **{Family.SOFTMAX: 5.0, Family.SOFTMAX_BACKWARD: 10.0},
    **dict.fromkeys((Family.COPY, Family.INDEX, Family.EMBEDDING), 0.0),
    Family.RANDOM: 2.0,
}
_ELEMENT_FLOP_OF_NAME = {
    **dict.fromkeys(("gelu", "erf", "mish"), 8.0),
    **dict.fromkeys(("exp", "log", "sigmoid", "silu", "softplus", "tanh"), 5.0),
    **dict.fromkeys(("_fused_rms_norm", "rms_norm"), 6.0),
    "_fused_rms_norm_backward": 12.0,
    **dict.fromkeys(("rsqrt", "sqrt"), 2.0),
}
"""Operations for each element where they are not 1. They are orders of magnitude: what works
element by element is bound by its traffic on every device of the catalog."""

_RECOMPUTED_SCORES = 5 / 4
"""The backward of fused attention has a fifth product beside the four that ``Op.flop`` counts: it
makes the scores again."""

_ATTENTION = "_scaled_dot_product"
_CAUSAL_ARGUMENT = {
    "_scaled_dot_product_flash_attention": 4,
    "_scaled_dot_product_flash_attention_backward": 11,
    "_scaled_dot_product_flash_attention_for_cpu": 4,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 7,
    "_scaled_dot_product_efficient_attention": 6,
    "_scaled_dot_product_efficient_attention_backward": 11,
    "_scaled_dot_product_cudnn_attention": 6,
}
"""Where each kernel's signature has ``is_causal``."""


def family_of(target: str) -> Family:
    """The family of an ATen overload; ``OTHER`` where none is known."""
    name = target.split(".")[1]
    if name.startswith(_ATTENTION):
        backward = name.endswith("_backward")
        return Family.ATTENTION_BACKWARD if backward else Family.ATTENTION
    return _FAMILY_OF_NAME.get(name, Family.OTHER)


def dtype_index(dtype: str) -> int:
    """Place in ``DTYPES`` of what arithmetic on a torch dtype counts as."""
    if dtype.startswith("float8"):
        return DTYPES.index("float8_e4m3fn")
    known = dtype in {"float64", "bfloat16", "float16"}
    return DTYPES.index(dtype if known else "float32")


class _Tensors:
    """An operator with the tensors it reads and writes."""

    def __init__(self, op: Op, graph: OpGraph) -> None:
        self.op = op
        self.name = op.target.split(".")[1]
        self.operands = [graph.values[value] for value in op.inputs]
        self.results = [None if v is None else graph.values[v] for v in op.outputs]
        distinct = {value: number for number, value in reversed(list(enumerate(op.inputs)))}
        self.numbers = sorted(distinct.values())
        self.numbers += [-1 - i for i, value in enumerate(op.outputs) if value is not None]
        """Each distinct operand once, then the results that there are."""

    def spec(self, tensor: int) -> TensorSpec:
        found = self.operands[tensor] if tensor >= 0 else self.results[-1 - tensor]
        assert found is not None, f"{self.name} has no result {-1 - tensor}"
        return found

    def size(self, tensor: int, *dims: int) -> Size:
        """Product of dims of a tensor."""
        shape = self.spec(tensor).shape
        return Size(float(max(math.prod(shape[dim] for dim in dims), 1)), tensor, dims)

    def all_but(self, tensor: int, *dims: int) -> Size:
        """Product of the other dims of a tensor."""
        rank = len(self.spec(tensor).shape)
        return self.size(tensor, *(dim for dim in range(rank) if dim not in dims))

    @property
    def large(self) -> list[int]:
        """The tensors of at least half the elements of the largest, that one first."""
        if not self.numbers:
            return []
        count = {number: self.spec(number).num_elements for number in self.numbers}
        masks = [number for number in self.numbers if self.spec(number).dtype == "bool"]
        if len(masks) < len(self.numbers):
            count.update(dict.fromkeys(masks, -1))
        largest = max(self.numbers, key=count.__getitem__)
        rest = [n for n in self.numbers if n != largest and 2 * count[n] >= count[largest]]
        return [largest, *rest]


def _work_of(tensors: _Tensors) -> OpWork:
    family = family_of(tensors.op.target)
    sizes = _SIZES[family](tensors) if family in _SIZES else None
    if sizes is None:
        sizes = _rows(tensors)
    read = tensors.numbers if family in _SIZES else tensors.large
    return OpWork(
        family=family,
        dtype=_dtype([tensors.spec(number).dtype for number in read]),
        sizes=sizes,
        flop_factor=_flop_factor(tensors, family, sizes),
    )


def factor_of_all_pairs(family: Family) -> float:
    """``OpWork.flop_factor`` of attention without a mask."""
    return _RECOMPUTED_SCORES if family is Family.ATTENTION_BACKWARD else 1.0


def _flop_factor(tensors: _Tensors, family: Family, sizes: _Sizes) -> float:
    if family in COUNTED:
        share = _attended(tensors, sizes) if tensors.name in _CAUSAL_ARGUMENT else 1.0
        return share * factor_of_all_pairs(family)
    if tensors.name in _ELEMENT_FLOP_OF_NAME:
        return _ELEMENT_FLOP_OF_NAME[tensors.name]
    forward = tensors.name.removesuffix("_backward")
    if family is Family.ELEMENTWISE and forward != tensors.name:
        return 2 * _ELEMENT_FLOP_OF_NAME.get(forward, 1.0)
    return _ELEMENT_FLOP.get(family, 1.0)


_Sizes = tuple[Size, Size, Size, Size]


def _rows(tensors: _Tensors) -> _Sizes:
    """The largest tensor as rows, and how many are about as large."""
    large = tensors.large
    rank = len(tensors.spec(large[0]).shape) if large else 0
    count = Size(float(max(len(large), 1)))
    if rank == 0:
        return ONE, ONE, ONE, count
    return ONE, tensors.all_but(large[0], rank - 1), tensors.size(large[0], rank - 1), count


def _product(tensors: _Tensors) -> _Sizes | None:
    """``mm``, ``mv`` and ``dot``; of ``addmm`` the last two operands."""
    left, right = len(tensors.operands) - 2, len(tensors.operands) - 1
    if left < 0:
        return None
    ranks = tuple(len(tensors.spec(number).shape) for number in (left, right))
    if ranks == (2, 2):
        return ONE, tensors.size(left, 0), tensors.size(right, 1), tensors.size(left, 1)
    rows = tensors.size(left, 0) if ranks[0] == 2 else ONE
    return ONE, rows, ONE, tensors.size(left, ranks[0] - 1)


def _batched_product(tensors: _Tensors) -> _Sizes | None:
    left, right = len(tensors.operands) - 2, len(tensors.operands) - 1
    if left < 0:
        return None
    return (
        tensors.size(left, 0),
        tensors.size(left, 1),
        tensors.size(right, 2),
        tensors.size(left, 2),
    )


def _grouped_product(tensors: _Tensors) -> _Sizes | None:
    """Rows, or what is contracted, are told apart by expert; each has an even share."""
    if len(tensors.operands) < 2:
        return None
    ranks = tuple(len(spec.shape) for spec in tensors.operands[:2])
    if ranks == (2, 3):
        experts = tensors.size(1, 0)
        rows = tensors.size(0, 0)
        return experts, _shared(rows, experts), tensors.size(1, 2), tensors.size(0, 1)
    if ranks == (2, 2) and tensors.results and tensors.results[0] is not None:
        experts = tensors.size(-1, 0)
        inner = tensors.size(0, 1)
        return experts, tensors.size(0, 0), tensors.size(1, 1), _shared(inner, experts)
    return None


def _shared(size: Size, ways: Size) -> Size:
    return size._replace(whole=max(size.whole / ways.whole, 1.0))


def _attention(tensors: _Tensors) -> _Sizes | None:
    """Query and key; the backward reads the gradient of its result before them."""
    query = 1 if tensors.name.endswith("_backward") else 0
    if len(tensors.operands) < query + 2 or len(tensors.spec(query).shape) != 4:
        return None
    return (
        tensors.size(query, 0, 1),
        tensors.size(query, 2),
        tensors.size(query + 1, 2),
        tensors.size(query, 3),
    )


def _convolution(tensors: _Tensors) -> _Sizes | None:
    backward = tensors.name == "convolution_backward"
    image = 0 if backward else -1
    """What has the area and the channels of the forward's result."""
    weight = 2 if backward else 1
    groups = _argument(tensors.op, 9 if backward else 8)
    is_transposed = _argument(tensors.op, 7 if backward else 6) is True
    if not isinstance(groups, int) or len(tensors.spec(image).shape) < 3:
        return None
    channels = tensors.size(image, 1)
    inner = tensors.all_but(weight, 1 if is_transposed else 0)
    of_group = inner.whole / groups if is_transposed else inner.whole
    return (
        Size(float(groups)),
        tensors.all_but(image, 1),
        channels._replace(whole=channels.whole / groups),
        inner._replace(whole=of_group),
    )


def _embedding(tensors: _Tensors) -> _Sizes | None:
    """``embedding(table, ids)``: the result has the rows."""
    rank = len(tensors.spec(-1).shape)
    return ONE, tensors.all_but(-1, rank - 1), tensors.size(-1, rank - 1), tensors.size(0, 0)


def _embedding_backward(tensors: _Tensors) -> _Sizes | None:
    """``embedding_dense_backward(gradient, ids, ...)``: the result is the table's gradient."""
    rank = len(tensors.spec(0).shape)
    return ONE, tensors.all_but(0, rank - 1), tensors.size(0, rank - 1), tensors.size(-1, 0)


_SIZES: dict[Family, Callable[[_Tensors], _Sizes | None]] = {
    Family.MATMUL: _product,
    Family.BATCHED_MATMUL: _batched_product,
    Family.GROUPED_MATMUL: _grouped_product,
    Family.ATTENTION: _attention,
    Family.ATTENTION_BACKWARD: _attention,
    Family.CONVOLUTION: _convolution,
    Family.CONVOLUTION_BACKWARD: _convolution,
    Family.EMBEDDING: _embedding,
    Family.EMBEDDING_BACKWARD: _embedding_backward,
}


def _argument(op: Op, position: int) -> Arg:
    return op.args[position] if position < len(op.args) else None


def _attended(tensors: _Tensors, sizes: _Sizes) -> float:
    """Share of all pairs of a query and a key in which the key is not behind the query."""
    op = tensors.op
    position = _CAUSAL_ARGUMENT[tensors.name]
    if dict(op.kwargs).get("is_causal", _argument(op, position)) is not True:
        return 1.0
    queries, keys = sizes[1].whole, sizes[2].whole
    beyond = max(queries - keys, 0.0)
    inside = queries - beyond
    return (inside * (inside + 1) / 2 + beyond * keys) / (queries * keys)


def _dtype(dtypes: Sequence[str]) -> int:
    """Of the first operand that has a fraction."""
    floating = [dtype for dtype in dtypes if dtype.startswith(("float", "bfloat"))]
    return dtype_index(floating[0] if floating else "float32")
