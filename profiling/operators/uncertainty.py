"""What to measure next: where what is measured already says least.

A caller may inject any ``Uncertainty``; a cost model's spread over its ensemble, for one. Without
one, a candidate is the less certain the farther it lies from what is measured of its group (same
operator, direction, dtype), and the more its neighbors there disagree:

    distance to the nearest * (agreement + spread of log(time / roofline time) of the 3 nearest)

with distances in doublings of each size (so the next one is farthest from its nearest: max-min),
and a roofline of nominal rates, for only differences count. A group without any measurement is
infinitely uncertain.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from meshwright.profiling.operators.candidate import Candidate
from meshwright.profiling.operators.catalog import FAMILIES
from meshwright.records import Record

__all__ = ["NeighborUncertainty", "Uncertainty"]

Uncertainty = Callable[[Candidate], float]
"""Larger for what the cost model is less sure of; only the order matters."""

_AGREEMENT = 0.1
"""Spread that neighbors who agree stand for, so that distance counts then too."""
_NUM_NEIGHBORS = 3
_NOMINAL_FLOP_PER_BYTE = 10.0


class NeighborUncertainty:
    """An ``Uncertainty`` that learns from what it is told was measured."""

    def __init__(self) -> None:
        self._places: dict[tuple[object, ...], list[NDArray[np.float64]]] = defaultdict(list)
        self._logs: dict[tuple[object, ...], list[float]] = defaultdict(list)

    def observe(self, candidate: Candidate, record: Record) -> None:
        """Take account of one measurement."""
        work = FAMILIES[candidate.op].work_of(candidate)
        nominal = max(work.flop / _NOMINAL_FLOP_PER_BYTE, work.bytes, 1)
        self._places[candidate.group].append(_place(candidate))
        self._logs[candidate.group].append(math.log(max(record.median, 1e-12) / nominal))

    def __call__(self, candidate: Candidate) -> float:
        """How uncertain the time of ``candidate`` is; infinite where its group is unknown."""
        places = self._places.get(candidate.group)
        if not places:
            return math.inf
        distances = np.linalg.norm(np.stack(places) - _place(candidate), axis=1)
        nearest = np.argsort(distances, kind="stable")[:_NUM_NEIGHBORS]
        spread = float(np.std(np.array(self._logs[candidate.group])[nearest]))
        return float(distances[nearest[0]]) * (_AGREEMENT + spread)


def _place(candidate: Candidate) -> NDArray[np.float64]:
    """Logarithms of the sizes, to base 2; words and truths are part of the group."""
    return np.array(
        [math.log2(max(value, 1)) for _, value in candidate.dims if type(value) is int],
        dtype=np.float64,
    )
