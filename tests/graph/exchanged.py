"""Operators cut with rows of other ranks: halos of spatial dims, rings of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meshwright.capture.execute import resolve_target
from meshwright.graph.factors import LeafFactor
from meshwright.graph.opgraph import Ref
from meshwright.graph.rules.base import Variant
from tests.graph.one_op import Instance

PADDING_ARGUMENT = {
    "convolution": 4,
    "convolution_backward": 5,
    "max_pool2d_with_indices": 3,
    "max_pool2d_with_indices_backward": 4,
    "avg_pool2d": 3,
    "avg_pool2d_backward": 4,
}


def exchanged_results(case: Instance, factor: LeafFactor, ways: int) -> list[Tensor | None]:
    """Results put together from ``ways`` ranks, each given what it gets from the others."""
    if factor.variant is Variant.RING:
        is_backward = "backward" in case.op.target
        return _ring_backward(case, ways) if is_backward else _ring(case, ways)
    return _halo(case, factor, ways)


def _arguments(case: Instance) -> list[Any]:
    def real(arg: Any) -> Any:
        if isinstance(arg, Ref):
            return case.tensors[arg.value].detach()
        return [real(part) for part in arg] if isinstance(arg, tuple) else arg

    return [real(arg) for arg in case.op.args]


# Halos --------------------------------------------------------------------------------------------


def _halo(case: Instance, factor: LeafFactor, ways: int) -> list[Tensor | None]:
    halo = factor.halo
    assert halo is not None
    name = case.op.target.split(".")[1]
    is_backward = name.endswith("backward")
    image_position = 1 if is_backward else 0
    place = factor.operands[image_position]
    assert place is not None
    dim = place[0]
    args = _arguments(case)
    image = args[image_position]
    rows = image.shape[dim] // ways
    padded = _with_rows(image, dim, halo.before, max(halo.after, 0), "max_pool" in name)
    parts: list[list[Tensor | None]] = []
    for rank in range(ways):
        local = list(args)
        length = rows + halo.before + halo.after
        local[image_position] = padded.narrow(dim, rank * rows, length)
        plane = tuple(local[image_position].shape[-2:])
        start = rank * rows - halo.before
        if is_backward:
            local[0] = args[0].chunk(ways, dim)[rank]
        if name == "max_pool2d_with_indices_backward":
            mine = args[7].chunk(ways, dim)[rank]
            local[7] = _moved(mine, tuple(image.shape[-2:]), plane, dim, -start)
        _without_padding(local, PADDING_ARGUMENT[name], dim - image.dim(), image.dim() - 2)
        results = resolve_target(case.op.target)(*local)
        found = list(results) if isinstance(results, list | tuple) else [results]
        if name == "max_pool2d_with_indices":
            found[1] = _moved(found[1], plane, tuple(image.shape[-2:]), dim, start)
        parts.append(found)
    if not is_backward:
        return [_joined(list(blocks), dim) for blocks in zip(*parts, strict=True)]
    whole = [_total(list(blocks)) for blocks in list(zip(*parts, strict=True))[1:]]
    return [_overlapped([found[0] for found in parts], padded, dim, rows, halo.before), *whole]


def _with_rows(image: Tensor, dim: int, before: int, after: int, is_maximum: bool) -> Tensor:
    def rows(count: int) -> Tensor:
        shape = [*image.shape[:dim], count, *image.shape[dim + 1 :]]
        return torch.full(shape, -torch.inf if is_maximum else 0.0, dtype=image.dtype)

    return torch.cat([rows(before), image, rows(after)], dim)


def _without_padding(args: list[Any], position: int, dim: int, num_dims: int) -> None:
    given = args[position] if len(args) > position else 0
    padding = list(given) if isinstance(given, list) else [given]
    padding = padding * num_dims if len(padding) == 1 else padding
    padding[dim] = 0
    if len(args) > position:
        args[position] = padding


def _moved(
    indices: Tensor, source: tuple[int, ...], target: tuple[int, ...], dim: int, by: int
) -> Tensor:
    """Positions in a ``source`` plane as positions in a ``target`` plane."""
    rows, columns = indices // source[1], indices % source[1]
    rows, columns = (rows + by, columns) if dim == indices.dim() - 2 else (rows, columns + by)
    return rows * target[1] + columns


def _joined(blocks: list[Tensor | None], dim: int) -> Tensor | None:
    held = [block for block in blocks if block is not None]
    return torch.cat(held, dim) if held else None


def _total(blocks: list[Tensor | None]) -> Tensor | None:
    held = [block for block in blocks if block is not None]
    return torch.stack(held).sum(0) if held else None


def _overlapped(
    blocks: list[Tensor | None], padded: Tensor, dim: int, rows: int, before: int
) -> Tensor | None:
    """Gradients of each rank's rows and of those it got, added up; padding's dropped."""
    if any(block is None for block in blocks):
        return None
    total = torch.zeros_like(padded)
    for rank, block in enumerate(blocks):
        assert block is not None
        total.narrow(dim, rank * rows, block.shape[dim]).add_(block)
    return total.narrow(dim, before, rows * len(blocks))


# Rings --------------------------------------------------------------------------------------------


def _causal(args: list[Any], position: int) -> bool:
    return len(args) > position and args[position] is True


def _ring(case: Instance, ways: int) -> list[Tensor | None]:
    args = _arguments(case)
    keywords = dict(case.op.kwargs)
    query, key, value = (tensor.chunk(ways, 2) for tensor in args[:3])
    causal = _causal(args, 4)
    attend = resolve_target(case.op.target)
    outputs, sums = [], []
    for rank in range(ways):
        met = range(rank + 1) if causal else range(ways)
        blocks = [
            attend(query[rank], key[j], value[j], 0.0, causal and j == rank, **keywords)
            for j in met
        ]
        sizes = torch.stack([found[1] for found in blocks])
        total = torch.logsumexp(sizes, 0)
        shares = torch.exp(sizes - total).unsqueeze(-1)
        outputs.append(sum(s * b[0] for s, b in zip(shares, blocks, strict=True)))
        sums.append(total)
    return [torch.cat(outputs, 2), torch.cat(sums, 2)]


def _ring_backward(case: Instance, ways: int) -> list[Tensor | None]:
    args = _arguments(case)
    keywords = dict(case.op.kwargs)
    gradient, query, key, value, output, total = (tensor.chunk(ways, 2) for tensor in args[:6])
    causal = _causal(args, 7)
    differentiate = resolve_target(case.op.target)
    sums = [[torch.zeros_like(block) for block in blocks] for blocks in (query, key, value)]
    for rank in range(ways):
        for j in range(rank + 1) if causal else range(ways):
            own = (gradient[rank], query[rank], key[j], value[j], output[rank], total[rank])
            found = differentiate(*own, 0.0, causal and j == rank, **keywords)
            for blocks, place, part in zip(sums, (rank, j, j), found, strict=True):
                blocks[place].add_(part)
    return [torch.cat(blocks, 2) for blocks in sums]
