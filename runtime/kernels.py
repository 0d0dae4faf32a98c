"""The kernels that lowered programs call by name, in terms of ATen.

``meshwright.NAME`` targets are glue between operators and collectives: packing tensors into one
buffer, cutting a rank's chunk, and lookups that keep only this rank's rows. They are plain
functions on tensors; they never touch autograd, and copy only where the layout demands it.

A *shard triple* ``(chunk_shape, dim, size)`` describes one tensor that ranks hold in equal chunks
along ``dim``, the last ones padded with zeros so that all have ``chunk_shape``; ``size`` is the
unpadded size of ``dim``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from meshwright.errors import PlanRefused

__all__ = ["KERNELS", "resolve_target"]

Shape = tuple[int, ...]
Shard = tuple[Shape, int, int]


def pack(tensors: Sequence[Tensor], chunk_elements: Sequence[int]) -> Tensor:
    """One flat tensor: each tensor flattened, zero-padded to its ``chunk_elements``; (sum,)."""
    flats = [tensor.reshape(-1) for tensor in tensors]
    if all(flat.numel() == size for flat, size in zip(flats, chunk_elements, strict=True)):
        return flats[0] if len(flats) == 1 else torch.cat(flats)
    packed = flats[0].new_zeros(sum(chunk_elements))
    start = 0
    for flat, size in zip(flats, chunk_elements, strict=True):
        packed[start : start + flat.numel()].copy_(flat)
        start += size
    return packed


def unpack_gathered(flat: Tensor, num_ranks: int, shards: Sequence[Shard]) -> list[Tensor]:
    """The full tensors held in an all-gathered ``pack``; ``flat`` is (num_ranks * total,)."""
    by_rank = flat.view(num_ranks, -1)
    full: list[Tensor] = []
    start = 0
    for chunk_shape, dim, size in shards:
        num_elements = math.prod(chunk_shape)
        pieces = by_rank[:, start : start + num_elements].view(num_ranks, *chunk_shape)
        start += num_elements
        full.append(_join(pieces, dim, size))
    return full


def _join(pieces: Tensor, dim: int, size: int) -> Tensor:
    """Chunks ``(ranks, *chunk_shape)`` side by side along ``dim``, cut to ``size``; contiguous."""
    num_ranks, chunk_shape = pieces.shape[0], pieces.shape[1:]
    chunk = chunk_shape[dim]
    if dim == 0:
        joined = pieces.reshape(num_ranks * chunk, *chunk_shape[1:])
        return joined if size == num_ranks * chunk else joined[:size]
    shape = (*chunk_shape[:dim], size, *chunk_shape[dim + 1 :])
    if size == num_ranks * chunk:
        return pieces.movedim(0, dim).reshape(shape).contiguous()
    joined = pieces.new_empty(shape)
    for rank in range(num_ranks):
        length = _chunk_length(size, chunk, rank)
        joined.narrow(dim, min(rank * chunk, size), length).copy_(
            pieces[rank].narrow(dim, 0, length)
        )
    return joined


def _chunk_length(size: int, chunk: int, rank: int) -> int:
    """Rows of the unpadded tensor in the chunk of ``rank``."""
    return max(0, min(chunk, size - rank * chunk))


def pack_scatter(tensors: Sequence[Tensor], num_ranks: int, shards: Sequence[Shard]) -> Tensor:
    """Full tensors laid out by rank, ready to reduce-scatter; (num_ranks * total,)."""
    if len(tensors) == 1 and shards[0][1] == 0 and shards[0][2] == num_ranks * shards[0][0][0]:
        return tensors[0].reshape(-1)
    total = sum(math.prod(chunk_shape) for chunk_shape, _, _ in shards)
    is_padded = any(size != num_ranks * shape[dim] for shape, dim, size in shards)
    make = tensors[0].new_zeros if is_padded else tensors[0].new_empty
    by_rank = make((num_ranks, total))
    start = 0
    for tensor, (chunk_shape, dim, size) in zip(tensors, shards, strict=True):
        num_elements = math.prod(chunk_shape)
        pieces = by_rank[:, start : start + num_elements].view(num_ranks, *chunk_shape)
        start += num_elements
        chunk = chunk_shape[dim]
        if size == num_ranks * chunk:
            pieces.copy_(
                tensor.reshape(
                    (*tensor.shape[:dim], num_ranks, chunk, *tensor.shape[dim + 1 :])
                ).movedim(dim, 0)
            )
            continue
        for rank in range(num_ranks):
            length = _chunk_length(size, chunk, rank)
            pieces[rank].narrow(dim, 0, length).copy_(
                tensor.narrow(dim, min(rank * chunk, size), length)
            )
    return by_rank.view(-1)


def unpack(flat: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Views of a flat buffer, one behind the other."""
    views: list[Tensor] = []
    start = 0
    for shape in shapes:
        num_elements = math.prod(shape)
        views.append(flat[start : start + num_elements].view(shape))
        start += num_elements
    return views


def zero_shard(tensor: Tensor, dim: int, chunk: int, index: int) -> Tensor:
    """Chunk ``index`` of ``tensor`` along ``dim``, padded with zeros to ``chunk`` rows."""
    size = tensor.shape[dim]
    length = _chunk_length(size, chunk, index)
    piece = tensor.narrow(dim, min(index * chunk, size), length)
    if length == chunk:
        return piece
    padded = tensor.new_zeros((*tensor.shape[:dim], chunk, *tensor.shape[dim + 1 :]))
    padded.narrow(dim, 0, length).copy_(piece)
    return padded


def narrow(tensor: Tensor, dim: int, start: int, length: int) -> Tensor:
    """The rows ``[start, start + length)`` of ``dim``; a view."""
    return tensor.narrow(dim, start, length)


def zero_unless(tensor: Tensor, index: int) -> Tensor:
    """``tensor`` where ``index`` is 0, else zeros: equal copies become partial sums."""
    return tensor if index == 0 else torch.zeros_like(tensor)


def embedding_shard(weight: Tensor, indices: Tensor, start: int, rows: int) -> Tensor:
    """Lookup in rows ``[start, start + rows)`` of a table; other indices give zeros."""
    local = indices - start
    is_elsewhere = (local < 0) | (local >= rows)
    found: Tensor = torch.ops.aten.embedding.default(weight, local.masked_fill_(is_elsewhere, 0))
    return found.masked_fill_(is_elsewhere.unsqueeze(-1), 0)


def embedding_backward_shard(
    grad: Tensor, indices: Tensor, start: int, rows: int, padding_idx: int, scale_by_freq: bool
) -> Tensor:
    """Gradient of rows ``[start, start + rows)`` of an embedding table; (rows, D).

    Indices held elsewhere, and ``padding_idx``, go to a row behind the last that ATen skips as
    padding. Counting frequencies reads that row's counter, so it must then exist.
    """
    local = indices - start
    is_skipped = (local < 0) | (local >= rows)
    if padding_idx >= 0:
        is_skipped |= indices == padding_idx
    local.masked_fill_(is_skipped, rows)
    num_rows = rows + 1 if scale_by_freq else rows
    table: Tensor = torch.ops.aten.embedding_dense_backward.default(
        grad, local, num_rows, rows, scale_by_freq
    )
    return table[:rows] if scale_by_freq else table


def _class_dim(logp: Tensor) -> int:
    """Dim of the classes: 1 of a batch, 0 of one sample."""
    return 1 if logp.ndim > 1 else 0


def _locate(target: Tensor, start: int, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Each target's row among ``classes`` classes from ``start`` on, and which lie elsewhere."""
    local = target - start
    is_elsewhere = (local < 0) | (local >= classes) | (target == ignore_index)
    return local.masked_fill_(is_elsewhere, 0), is_elsewhere


def nll_forward_shard(
    logp: Tensor,
    target: Tensor,
    start: int,
    classes: int,
    ignore_index: int,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of ``-logp[target]`` over local classes, and the number of targets that count.

    The first is a partial sum over the ranks that split the classes: only targets in
    ``[start, start + classes)`` add to it; ``logp`` is (N, classes, ...). The second is whole on
    every rank.

    Raises:
        PlanRefused: for weighted classes, whose total no rank can know alone.
    """
    if weight is not None:
        raise PlanRefused(
            "a loss with class weights cannot be sharded by class; leave the classes out of the "
            "shard of its segment"
        )
    local, is_elsewhere = _locate(target, start, classes, ignore_index)
    dim = _class_dim(logp)
    picked = logp.gather(dim, local.unsqueeze(dim)).squeeze(dim)
    num_counted = (target != ignore_index).sum().to(logp.dtype)
    return -picked.masked_fill(is_elsewhere, 0).sum(), num_counted


def nll_backward_shard(
    grad_out: Tensor,
    logp: Tensor,
    target: Tensor,
    start: int,
    ignore_index: int,
    weight: Tensor | None = None,
) -> Tensor:
    """Gradient of ``nll_forward_shard``'s first result with respect to ``logp``.

    ``grad_out`` is a scalar, or has the shape of ``target``.
    """
    dim = _class_dim(logp)
    local, is_elsewhere = _locate(target, start, logp.shape[dim], ignore_index)
    minus_grad = (-grad_out).expand(target.shape)
    if weight is not None:
        minus_grad = minus_grad * weight[local]
    values = minus_grad.masked_fill(is_elsewhere, 0).to(logp.dtype)
    return torch.zeros_like(logp).scatter_(dim, local.unsqueeze(dim), values.unsqueeze(dim))


KERNELS: dict[str, Callable[..., Any]] = {
    f"meshwright.{kernel.__name__}": kernel
    for kernel in (
        pack,
        unpack_gathered,
        pack_scatter,
        unpack,
        zero_shard,
        narrow,
        zero_unless,
        embedding_shard,
        embedding_backward_shard,
        nll_forward_shard,
        nll_backward_shard,
    )
}
"""Every ``meshwright.NAME`` a program may call."""

_RESHAPING = frozenset({"aten.view.default", "aten._unsafe_view.default"})
"""A local tensor may be laid out otherwise than the captured one, where ``view`` would fail and
``reshape`` copies."""


def resolve_target(target: str) -> Callable[..., Any]:
    """The callable behind ``"aten.mm.default"`` or ``"meshwright.pack"``.

    Raises:
        PlanRefused: if there is none.
    """
    if target in KERNELS:
        return KERNELS[target]
    if target in _RESHAPING:
        return torch.ops.aten.reshape.default
    parts = target.split(".")
    found: Any = torch.ops
    try:
        for part in parts:
            found = getattr(found, part)
    except (AttributeError, RuntimeError):
        found = None
    if len(parts) != 3 or not isinstance(found, torch._ops.OpOverload):
        raise PlanRefused(
            f"operator {target}: neither an operator of torch {torch.__version__} nor a kernel of "
            "the runtime; capture the model with this version of torch"
        )
    return found
