"""Layout: how one value is spread over the mesh, in terms of its leaves.

A value's dims are products of leaves; an axis either shards one leaf, or holds partial results, or
holds equal copies. Several axes may shard one leaf, outermost first in mesh order, ``micro`` before
all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshwright.graph.factors import Place
from meshwright.plans.plan import AXIS_NAMES

__all__ = ["ALL_AXES", "BATCH_AXES", "MICRO", "REPLICATED", "Layout", "local_shape", "order_axes"]

MICRO = "micro"
"""Micro-batches, treated as an axis in time: a rank meets its positions one after another.
Partial results over it are accumulated. It shards the batch outermost: which rows of the batch make
up a micro-batch is free, and so a redistribution inside one micro-batch leaves the others alone."""

BATCH_AXES = ("dp_replicate", "dp_shard", "ep")
"""Mesh axes that cut the batch outside expert segments."""

ALL_AXES = (*AXIS_NAMES, MICRO)
_RANK_OF_AXIS = {axis: number for number, axis in enumerate((MICRO, *AXIS_NAMES))}


def order_axes(axes: Iterable[str]) -> tuple[str, ...]:
    """``axes`` in mesh order, outermost first."""
    return tuple(sorted(axes, key=_RANK_OF_AXIS.__getitem__))


@dataclass(frozen=True, slots=True)
class Layout:
    """Spread of one value; hashable."""

    shards: tuple[tuple[Place, tuple[str, ...]], ...] = ()
    """``((dim, position), axes)``, sorted."""
    partial: tuple[tuple[str, str], ...] = ()
    """``(axis, reduction)``, in mesh order."""

    @staticmethod
    def of(shards: Mapping[Place, Iterable[str]], partial: Mapping[str, str]) -> Layout:
        """Layout from mappings in any order."""
        return Layout(
            shards=tuple(
                sorted((place, order_axes(axes)) for place, axes in shards.items() if axes)
            ),
            partial=tuple((axis, partial[axis]) for axis in order_axes(partial)),
        )

    def axes_at(self, place: Place) -> tuple[str, ...]:
        """Axes that shard the leaf at ``place``."""
        return next((axes for where, axes in self.shards if where == place), ())

    def place_of(self, axis: str) -> Place | None:
        """The leaf that ``axis`` shards."""
        return next((place for place, axes in self.shards if axis in axes), None)

    @property
    def sharding_axes(self) -> tuple[str, ...]:
        """Every axis that shards something."""
        return order_axes({axis for _, axes in self.shards for axis in axes})

    def without(self, axis: str) -> Layout:
        """The same with ``axis`` replicated."""
        return Layout(
            shards=tuple(
                (place, rest)
                for place, axes in self.shards
                if (rest := tuple(item for item in axes if item != axis))
            ),
            partial=tuple(item for item in self.partial if item[0] != axis),
        )


REPLICATED = Layout()


def local_shape(
    leaf_sizes: tuple[tuple[int, ...], ...],
    layout: Layout,
    axis_sizes: Mapping[str, int],
) -> tuple[tuple[int, ...], ...]:
    """Local size of every leaf of a value, dim by dim.

    Args:
        leaf_sizes: full size of every leaf.
        layout: the value's layout.
        axis_sizes: devices along each axis.
    """
    if not layout.shards:
        return leaf_sizes
    sizes = [list(dim) for dim in leaf_sizes]
    for (dim, position), axes in layout.shards:
        for axis in axes:
            full, ways = sizes[dim][position], axis_sizes[axis]
            assert full % ways == 0, f"leaf of {full} over {axis}={ways}"
            sizes[dim][position] = full // ways
    return tuple(tuple(dim) for dim in sizes)
