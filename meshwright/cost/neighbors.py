"""What an operator exchanges with other ranks while it runs: halos, and rings of attention.

Halo (domain parallelism, arXiv 1712.04432, section 2.4). A rank sends its first rows to the rank
before it and its last ones to the rank behind it, one message each way, before the operator runs;
backward, gradients of the rows it got go back, and a convolution gets its input's rows again::

    bytes = (before + after) rows of the input             one message of latency a

Ring attention (arXiv 2310.01889). Each of ``n`` ranks holds a block of queries, keys and values;
blocks of keys and values go around in ``n - 1`` steps beside the attention to the block at hand::

    time beyond the compute = max(0, (n - 1) a + (n - 1) / n B / w - compute)

with ``B`` bytes of all keys and values; backward, their gradients go around too, which doubles
``B``. With a causal mask the last rank attends to ``n - 1`` whole blocks and half of its own, and
the others wait for it: consecutive tokens thus gain next to nothing from the mask. Ranks that hold
one block from the front and one from the back each (zig-zag, Megatron-Core) all do half of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.columns import FloatArray, IntArray
from meshwright.cost.op_work import factor_of_all_pairs
from meshwright.cost.work import Family
from meshwright.graph.factors import LeafFactor, Place
from meshwright.graph.rules.base import Variant
from meshwright.spmd.nodes import OpNode, ShardedGraph
from meshwright.spmd.program import CollectiveKind

__all__ = ["Exchange", "exchanges_of", "exposed_ring_s", "of_every_rank", "of_last_rank"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One exchange of an operator along ``axes``."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    value: int
    """Sharded value whose rows travel."""
    share: float
    """Of the bytes of the value's rows that axes outside ``undivided`` leave to a rank."""
    undivided: tuple[str, ...]
    """Axes that shard the value but not what travels."""


def exchanges_of(sharded: ShardedGraph, node: OpNode) -> Iterator[Exchange]:
    """What a node exchanges inside itself, apart from reductions."""
    factors = sharded.analysis.leaf_factors[node.op]
    axes_of: dict[int, tuple[str, ...]] = {}
    for axis, index in node.choice:
        if factors[index].variant in {Variant.HALO, Variant.RING}:
            axes_of[index] = (*axes_of.get(index, ()), axis)
    target = sharded.analysis.graph.ops[node.op].target if axes_of else ""
    for index, axes in axes_of.items():
        factor = factors[index]
        is_ring = factor.variant is Variant.RING
        kind = CollectiveKind.RING if is_ring else CollectiveKind.HALO
        for value, place in _travelling(node, factor, target):
            yield Exchange(
                kind=kind,
                axes=axes,
                value=value,
                share=1.0 if is_ring else _halo_share(factor),
                undivided=axes if is_ring else sharded.layouts[value].axes_at(place),
            )


def _travelling(node: OpNode, factor: LeafFactor, target: str) -> Iterator[tuple[int, Place]]:
    """Sharded values whose rows travel, and where the factor sits in them."""
    backward = "backward" in target
    operands: tuple[int, ...]
    results: tuple[int, ...]
    if factor.variant is Variant.RING:
        operands, results = ((2, 3), (1, 2)) if backward else ((1, 2), ())
    elif backward:
        operands, results = ((1,) if "convolution" in target else ()), (0,)
    else:
        operands, results = (0,), ()
    for position in operands:
        place = factor.operands[position]
        if place is not None:
            yield node.operands[position], place
    for position in results:
        value, place = node.results[position], factor.results[position]
        if value is not None and place is not None:
            yield value, place


def _halo_share(factor: LeafFactor) -> float:
    """Rows of both halos over all input rows."""
    halo = factor.halo
    assert halo is not None
    return (halo.before + max(halo.after, 0)) / (halo.stride * factor.size)


def of_last_rank(flop_factor: float, family: Family, ways: int) -> float:
    """The factor on arithmetic of the last of ``ways`` ranks in a ring of consecutive tokens.

    ``flop_factor`` is that of all of them together.
    """
    full = factor_of_all_pairs(family)
    return full - (full - flop_factor) / ways


def of_every_rank(last: FloatArray, family: IntArray, ways: int) -> FloatArray:
    """The reverse of ``of_last_rank``, elementwise: of ranks that share the pairs evenly."""
    is_backward = family == Family.ATTENTION_BACKWARD
    full = np.where(is_backward, factor_of_all_pairs(Family.ATTENTION_BACKWARD), 1.0)
    return np.asarray(full - (full - last) * ways)


def exposed_ring_s(
    ring_s: NDArray[np.float64], compute_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What rings add to the compute they run beside; seconds, elementwise."""
    return np.maximum(ring_s - compute_s, 0.0)
