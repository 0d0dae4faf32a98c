"""What an operator of a trace is in the words of our Records: its family and its sizes.

A trace holds the dimensions of tensors, not the values of scalars: the stride of a convolution or
whether attention is causal is not there, and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from meshwright.profiling.traces.words import dtype_of
from meshwright.records.record import Scalar

__all__ = ["operator_identity", "parse_dims"]

_MAX_SHAPE_CHARACTERS = 1000

Dims = list[list[int]]
"""By input; the empty list for a scalar, a list of tensors or what is no tensor."""


def parse_dims(dims: bytes, types: bytes) -> tuple[Dims, str | None] | None:
    """The dimensions of each input, and the type of the first that has one.

    None where the trace does not hold them.
    """
    try:
        sizes = msgspec.json.decode(dims or b"null")
        words = msgspec.json.decode(types or b"null")
    except (msgspec.MsgspecError, RecursionError):
        return None
    if not isinstance(sizes, list):
        return None
    plain = [one if _is_size(one) else [] for one in sizes]
    known = (dtype_of(word) for word in words) if isinstance(words, list) else ()
    return plain, next((word for word in known if word is not None), None)


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(size, int) and 0 <= size < 2**48 for size in value
    )


def _linear(dims: Dims, first: int) -> dict[str, Scalar] | None:
    left, right = dims[first], dims[first + 1]
    if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
        return None
    return {"m": left[0], "n": right[1], "k": left[1]}


def _addmm(dims: Dims) -> dict[str, Scalar] | None:
    return _linear(dims, 1)


def _mm(dims: Dims) -> dict[str, Scalar] | None:
    return _linear(dims, 0)


def _bmm(dims: Dims) -> dict[str, Scalar] | None:
    left, right = dims[0], dims[1]
    if len(left) != 3 or len(right) != 3 or left[0] != right[0] or left[2] != right[1]:
        return None
    return {"b": left[0], "m": left[1], "n": right[2], "k": left[2]}


def _baddbmm(dims: Dims) -> dict[str, Scalar] | None:
    return _bmm(dims[1:])


def _convolution(dims: Dims) -> dict[str, Scalar] | None:
    image, weight = dims[0], dims[1]
    if len(image) != 4 or len(weight) != 4 or weight[2] != weight[3]:
        return None
    if not weight[1] or image[1] % weight[1]:
        return None
    return {
        "b": image[0],
        "channels_in": image[1],
        "channels_out": weight[0],
        "kernel": weight[2],
        "height": image[2],
        "width": image[3],
        "groups": image[1] // weight[1],
    }


def _normalized(dims: Dims) -> dict[str, Scalar] | None:
    rows, weight = dims[0], dims[2]
    columns = math.prod(weight)
    if not weight or not columns or rows[-len(weight) :] != weight:
        return None
    return {"m": math.prod(rows) // columns, "n": columns}


def _attention(dims: Dims) -> dict[str, Scalar] | None:
    """Query, key, value as batch, heads, sequence, head."""
    query, key = dims[0], dims[1]
    if len(query) != 4 or len(key) != 4 or query[0] != key[0] or query[3] != key[3]:
        return None
    return {
        "b": query[0],
        "heads": query[1],
        "kv_heads": key[1],
        "seq_q": query[2],
        "seq_k": key[2],
        "head_dim": query[3],
    }


def _flash_attention(dims: Dims) -> dict[str, Scalar] | None:
    """The same as batch, sequence, heads, head."""
    turned = [[one[0], one[2], one[1], one[3]] if len(one) == 4 else one for one in dims[:2]]
    return _attention(turned)


_FAMILIES: dict[str, tuple[str, int, Callable[[Dims], dict[str, Scalar] | None]]] = {
    "aten::addmm": ("linear", 3, _addmm),
    "aten::mm": ("linear", 2, _mm),
    "aten::bmm": ("bmm", 2, _bmm),
    "aten::baddbmm": ("bmm", 3, _baddbmm),
    "aten::cudnn_convolution": ("conv2d", 2, _convolution),
    "aten::mkldnn_convolution": ("conv2d", 2, _convolution),
    "aten::miopen_convolution": ("conv2d", 2, _convolution),
    "aten::_convolution": ("conv2d", 2, _convolution),
    "aten::native_layer_norm": ("layer_norm", 3, _normalized),
    "aten::_scaled_dot_product_flash_attention": ("sdpa", 3, _attention),
    "aten::_scaled_dot_product_efficient_attention": ("sdpa", 3, _attention),
    "aten::_scaled_dot_product_cudnn_attention": ("sdpa", 3, _attention),
    "aten::_scaled_dot_product_flash_attention_for_cpu": ("sdpa", 3, _attention),
    "aten::_flash_attention_forward": ("sdpa", 3, _flash_attention),
    "aten::_efficient_attention_forward": ("sdpa", 3, _flash_attention),
}
"""Family, least number of inputs, and its sizes of them, by operator; forward only: what these do
in a backward pass is one product of several, and keeps its own name."""


def operator_identity(
    name: str, dims: Sequence[Sequence[int]], *, direction: str
) -> tuple[str, dict[str, Scalar]]:
    """Family and sizes where we know the operator, else its own name with the shapes as text."""
    sizes = [list(one) for one in dims]
    family = _FAMILIES.get(name)
    if family is not None and direction == "fwd" and len(sizes) >= family[1]:
        found = family[2](sizes)
        if found is not None and all(isinstance(n, int) and n < 2**63 for n in found.values()):
            return family[0], found
    extra: dict[str, Scalar] = {}
    text = msgspec.json.encode(sizes).decode()
    if len(text) <= _MAX_SHAPE_CHARACTERS:
        extra["shape"] = text
    first = next((one for one in sizes if one), None)
    if first is not None and math.prod(first) < 2**63:
        extra["numel"] = math.prod(first)
    return name, extra
