"""Local shapes of sharded values, and how full tensors are cut into them."""

from __future__ import annotations

import math

from meshwright.graph.opgraph import TensorSpec
from meshwright.spmd.layout import MICRO, Layout, local_shape
from meshwright.spmd.program import ShardSpec
from meshwright.spmd.sharded import ShardedGraph

__all__ = ["LocalSpecs"]


class LocalSpecs:
    """Answers about the sharded values of one sharded graph."""

    def __init__(self, sharded: ShardedGraph) -> None:
        self._sharded = sharded
        self._analysis = sharded.analysis
        self._specs: dict[int, TensorSpec] = {}

    def ways(self, axes: tuple[str, ...]) -> int:
        """Devices (or micro-batches) along ``axes`` together."""
        return math.prod(self._sharded.axis_sizes[axis] for axis in axes)

    def full(self, value: int) -> TensorSpec:
        """Spec of the whole tensor behind a sharded value."""
        return self._analysis.graph.values[self._sharded.graph_value[value]]

    def leaf_sizes(self, value: int) -> tuple[tuple[int, ...], ...]:
        """Full leaf sizes, dim by dim."""
        dims = self._analysis.value_dims[self._sharded.graph_value[value]]
        return tuple(tuple(self._analysis.class_size[leaf] for leaf in dim) for dim in dims)

    def local_leaves(self, value: int, layout: Layout | None = None) -> tuple[tuple[int, ...], ...]:
        """Local leaf sizes in the value's own layout, or in ``layout``."""
        own = self._sharded.layouts[value] if layout is None else layout
        return local_shape(self.leaf_sizes(value), own, self._sharded.axis_sizes)

    def shape(self, value: int, layout: Layout | None = None) -> tuple[int, ...]:
        """Local shape."""
        # A dim without leaves has size 1, or 0.
        return tuple(
            math.prod(leaves) if leaves else size
            for leaves, size in zip(
                self.local_leaves(value, layout), self.full(value).shape, strict=True
            )
        )

    def spec(self, value: int) -> TensorSpec:
        """Local spec; strides keep the order of the whole tensor's."""
        if value not in self._specs:
            full = self.full(value)
            shape = self.shape(value)
            self._specs[value] = (
                full
                if shape == full.shape
                else TensorSpec(shape=shape, dtype=full.dtype, stride=_like(full.stride, shape))
            )
        return self._specs[value]

    def shard_spec(self, value: int) -> ShardSpec:
        """How the rank's part is cut from the whole, micro-batches left together."""
        layout = self._sharded.layouts[value].without(MICRO)
        return ShardSpec(
            tuple(
                tuple(
                    (size, layout.axes_at((dim, position))) for position, size in enumerate(sizes)
                )
                for dim, sizes in enumerate(self.leaf_sizes(value))
            )
        )

    def micro_dim(self, value: int) -> int | None:
        """The dim that micro-batches cut."""
        place = self._sharded.layouts[value].place_of(MICRO)
        assert place is None or place[1] == 0, "micro-batches must cut whole rows"
        return None if place is None else place[0]


def _like(stride: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Dense strides of ``shape`` in the dim order of ``stride``; expanded dims stay expanded."""
    result = [0] * len(shape)
    step = 1
    for dim in sorted(range(len(shape)), key=lambda dim: (stride[dim], -dim)):
        if stride[dim] == 0:
            continue
        result[dim] = step
        step *= max(shape[dim], 1)
    return tuple(result)
