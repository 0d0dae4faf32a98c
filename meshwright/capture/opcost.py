"""Floating-point operations and bytes of one traced operator.

Operations are counted by ``torch.utils.flop_counter``: 2 for each multiply-add of matrix products,
convolutions and attention, nothing for pointwise operators, the full square for causal attention.
torch does not count the CPU flash attention; here it counts as the matrix products it stands for,
two forward and four backward, which is what ``FlopCounterMode`` finds where attention
decomposes (on ``meta``). A kernel that computes the scores again does five backward.

Bytes are those the operator touches when it runs alone: every distinct element of its operands
once, every element of its results once. Views move nothing; a look-up reads the rows it returns,
not the whole table.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from meshwright.graph.opgraph import DTYPE_BYTES, TensorSpec

__all__ = ["bytes_moved", "flop_of", "is_view", "spec_of"]

aten = torch.ops.aten

_ALIASES_WITHOUT_ANNOTATION = {
    "aten._unsafe_view.default",
    "aten._reshape_alias.default",
    "aten.detach.default",
}
_WRITES_NOTHING = {"aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_strided"}
_LOOK_UPS = {"aten.embedding", "aten.gather", "aten.index", "aten.index_select"}


def flop_of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Operations of one call; ``args`` and ``result`` hold (fake) tensors."""
    if target is aten._scaled_dot_product_flash_attention_for_cpu.default:
        query, key, value = args[:3]
        return sdpa_flop_count(query.shape, key.shape, value.shape)
    if target is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        _, query, key, value = args[:4]
        return 2 * sdpa_flop_count(query.shape, key.shape, value.shape)
    count = flop_registry.get(target.overloadpacket)
    return int(count(*args, **kwargs, out_val=result)) if count is not None else 0


def is_view(target: Any) -> bool:
    """Whether the operator returns its operand's memory under another shape."""
    if str(target) in _ALIASES_WITHOUT_ANNOTATION:
        return True
    returns = target._schema.returns
    return bool(returns) and all(
        item.alias_info is not None and not item.alias_info.is_write for item in returns
    )


def bytes_moved(
    target: Any, operands: Sequence[TensorSpec], results: Sequence[TensorSpec]
) -> tuple[int, int]:
    """Bytes read and bytes written; ``operands`` are the distinct tensors read."""
    if is_view(target):
        return 0, 0
    packet = str(target.overloadpacket)
    written = 0 if packet in _WRITES_NOTHING else sum(_touched_bytes(spec) for spec in results)
    if packet in _WRITES_NOTHING:
        return 0, 0
    if packet in _LOOK_UPS:
        return written + sum(_touched_bytes(spec) for spec in operands[1:]), written
    if packet.endswith("_like") or packet.startswith("aten.new_"):
        return 0, written
    return sum(_touched_bytes(spec) for spec in operands), written


def _touched_bytes(spec: TensorSpec) -> int:
    """Bytes of the distinct elements: an expanded dim (stride 0) is stored once."""
    num_elements = 1
    for size, stride in zip(spec.shape, spec.stride, strict=True):
        if stride != 0 or size == 0:
            num_elements *= size
    return num_elements * DTYPE_BYTES[spec.dtype]


def spec_of(tensor: Tensor) -> TensorSpec:
    """The description of a (fake) tensor."""
    return _spec(tensor.shape, tensor.dtype, tensor.stride())


@lru_cache(maxsize=4096)
def _spec(shape: torch.Size, dtype: torch.dtype, stride: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(
        shape=tuple(int(size) for size in shape),
        dtype=str(dtype).removeprefix("torch."),
        stride=tuple(int(step) for step in stride),
    )
