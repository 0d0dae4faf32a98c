"""Measurements as graphs: what the learned cost model is trained on, and judged with.

One schema for all: a measured operator is a graph of one row (a linear layer's backward of two), a
measured layer or step is a graph of many. What a graph took is modeled as::

    time_s = sum over its rows of weight * t(row) + rest_s

with ``t(row)`` on the device alone and ``rest_s`` what is not operators' (collectives, launches,
bubbles), as the core prices it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.model import Device
from meshwright.cost.work import OperatorWork

__all__ = ["MeasuredGraphs"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGraphs:
    """G measurements over N rows of operators."""

    work: OperatorWork
    """N rows; edges join rows of one graph only."""
    graph: IntArray
    """(N,) graph of each row, ascending."""
    weight: FloatArray
    """(N,) how many times a row's time counts."""
    devices: tuple[Device, ...]
    device: IntArray
    """(G,) place in ``devices``."""
    time_s: FloatArray
    """(G,) measured."""
    rest_s: FloatArray
    """(G,)"""
    labels: Mapping[str, NDArray[np.str_]]
    """Name to (G,) text, for splits and reports: ``source``, ``op``, ``direction``, ``dtype``..."""

    @property
    def count(self) -> int:
        """G."""
        return len(self.time_s)
