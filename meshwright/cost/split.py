"""How a batch is split over a mesh."""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshwright.plans.plan import Compression

__all__ = ["DATA_AXES", "Split"]

DATA_AXES = ("dp_replicate", "dp_shard")
"""Mesh axes of data parallelism."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a batch is split, and where its mesh lies."""

    axis_sizes: tuple[tuple[str, int], ...]
    """Every mesh axis."""
    num_microbatches: int
    num_stages: int
    first_device: int = 0
    """Of the ``num_stages`` stages, which lie side by side."""
    batch_scale: float = 1.0
    """Samples of a rank over those of an even share."""
    compression: Compression = Compression.NONE
    """Of what collectives inside segments carry along ``tp``, where that is faster."""

    @property
    def num_devices(self) -> int:
        """Devices of one stage."""
        return math.prod(size for _, size in self.axis_sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """``axis_sizes`` as a mapping."""
        return dict(self.axis_sizes)

    @property
    def data_parallel(self) -> int:
        """Devices the batch is split over."""
        sizes = self.sizes
        return sizes["dp_replicate"] * sizes["dp_shard"]
