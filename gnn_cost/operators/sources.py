"""What published tables of operators hold beside the operator they name, by source.

Found by comparing rows that should be equal: other roles, other kernels, other degrees of tensor
parallelism. Such rows would teach times of what the runtime of that source does, not of operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["reasons_of_sources"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_MASKED_SOFTMAX_SOURCES = ("aceso", "sailor_ops")
"""Their softmax applies a causal mask: in fp16 a kernel that skips what the mask hides and so is
faster than memory allows for the whole, in fp32 a chain of operators."""

_EXCHANGED_SOURCE, _EXCHANGED_OPS = "sailor_ops", ("linear", "embedding")
"""With tensor parallelism its times hold what ranks exchange: 100 times the work over PCIe."""

_STAGE_SOURCES = ("aceso", "sailor_ops")
"""Both used the same profiler of the operators of a pipeline's stage."""

_SUMMED_ROLES = {
    "fwd": ("enc-attention-dense", "enc-MLP-GEMM-2"),
    "bwd": ("enc-attention-qkv", "enc-MLP-GEMM-1"),
}
"""By direction: products whose results that profiler sums over the ranks of tensor parallelism.
They take up to 14 times what the same products take without."""

_LAST_NORM = "final-layernorm"
"""That profiler's turns its result round too (twice the time of the others), and its backward, the
first of all operators', takes 0.4 to 0.9 ms at whatever size."""

_QUANTIZING_KERNEL = "torch_flow"
"""Brings operands of linear layers to fp8 within the time: small ones take 13 us, those of other
kernels on the same GPU 6."""


def reasons_of_sources(
    columns: Mapping[str, NDArray[Any]],
    sizes: Mapping[str, FloatArray],
    extra: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[BoolArray, str]]:
    """Masks of rows that hold more than their operator, (R,), and what to say of them.

    Args:
        columns: of ``samples.operator_columns``.
        sizes: numbers by column.
        extra: what stands in the column of that name.
    """
    source, op, direction = columns["source"], columns["op"], columns["direction"]
    is_split = sizes["tp"] > 1
    masked = np.isin(source, _MASKED_SOFTMAX_SOURCES) & (op == "softmax")
    yield masked, "softmax with a mask of its own"
    exchanged = (source == _EXCHANGED_SOURCE) & is_split & np.isin(op, _EXCHANGED_OPS)
    role = np.array([str(one.get("role", "")) for one in extra], np.str_)
    is_staged = np.isin(source, _STAGE_SOURCES)
    for way, roles in _SUMMED_ROLES.items():
        exchanged |= is_staged & is_split & (direction == way) & np.isin(role, roles)
    yield exchanged, "ranks exchange data in it"
    yield is_staged & (role == _LAST_NORM), "layer norm with other work in it"
    kernel = np.array([str(one.get("kernel", "")) for one in extra], np.str_)
    quantizes = (kernel == _QUANTIZING_KERNEL) & (columns["dtype"] == "fp8") & (op == "linear")
    yield quantizes, "operands are quantized in it"
