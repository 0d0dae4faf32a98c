"""From small instances to large ones, by progress."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meshwright.env.instance import ROW_DECISIONS, Instance, IntArray

__all__ = ["Curriculum", "size_of"]

_DEVICE_DECISIONS = ("tp", "cp", "ep", "pp", "dp")


def size_of(instance: Instance) -> float:
    """How large an instance is: log2 of its rows plus log2 of the most devices a plan uses."""
    columns = [ROW_DECISIONS.index(name) for name in _DEVICE_DECISIONS]
    devices = int(instance.rows[:, columns].prod(axis=1).max())
    return float(np.log2(len(instance.rows)) + np.log2(devices))


class Curriculum:
    """Which of some instances are open at which progress."""

    def __init__(
        self, instances: Sequence[Instance], *, first_share: float = 0.25, open_at: float = 0.5
    ) -> None:
        """Sort the instances by size; equal ones stay in order.

        Args:
            instances: all of them, one at least.
            first_share: of the instances, the smallest ones, that are open from the start.
            open_at: progress from which all are open; in between their number grows evenly.
        """
        assert instances, "at least one instance"
        assert 0 < first_share <= 1, "a share of the instances"
        sizes = np.array([size_of(instance) for instance in instances])
        self._order: IntArray = np.argsort(sizes, kind="stable")
        self._first_share, self._open_at = first_share, open_at

    def active(self, progress: float) -> IntArray:
        """Numbers of the open instances, small ones first; ``progress`` goes from 0 to 1."""
        grown = 1.0 if self._open_at <= 0 else min(1.0, max(0.0, progress) / self._open_at)
        share = self._first_share + (1 - self._first_share) * grown
        return self._order[: max(1, round(share * len(self._order)))]
