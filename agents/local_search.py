"""Local search among the plans of one instance.

A step changes the variant of one group, or the cut, for the best there is; where none helps, it
moves to a neighboring row and descends there. Neighbors differ in two kinds of parallelism at most,
what belongs to a kind going with it (``_KINDS``); those that look fast at a glance are looked up
with the variants as they are, and the best of them are gone into. Where that ends, it begins again
at the best start on a row it has not been to. What is counted are distinct plans looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.env.decode import Placed
from meshwright.env.instance import ROW_DECISIONS, ROW_FEATURES, Instance

__all__ = ["Improved", "improve"]

_GLANCE = ROW_FEATURES.index("log_step_s")
_KINDS = (
    ("tp",),
    ("cp",),
    ("ep",),
    ("pp", "num_microbatches", "schedule"),
    ("dp", "dp_shard", "zero_stage"),
)
_COLUMNS = tuple([ROW_DECISIONS.index(name) for name in names] for names in _KINDS)
_FULL = "evaluations are used up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Improved:
    """The best plan found."""

    placed: Placed
    time_s: float
    """Infinite where none that fits was found."""
    evaluations: int
    """Distinct plans looked up."""


class _UsedUpError(Exception):
    """No evaluations are left."""


class _Search:
    """Remembers what was looked up, and the best of it."""

    def __init__(self, instance: Instance, max_evaluations: int) -> None:
        self.instance = instance
        self.max_evaluations = max_evaluations
        self.known: dict[Placed, float] = {}
        self.best: Placed | None = None
        self.been: set[int] = set()
        """Rows descended in."""

    def time_s(self, placed: Placed) -> float:
        if placed in self.known:
            return self.known[placed]
        if len(self.known) >= self.max_evaluations:
            raise _UsedUpError(_FULL)
        room = self.instance.rooms.open(placed.row)
        found = float(room.time_s[(*placed.variants, placed.cut)])
        self.known[placed] = found
        if self.best is None or found < self.known[self.best]:
            self.best = placed
        return found

    def descend(self, placed: Placed) -> Placed:
        """The best plan of the row that changes of one group or cut at a time lead to."""
        self.been.add(placed.row)
        while True:
            before_s = self.time_s(placed)
            for place in range(self.instance.num_groups + 1):
                placed = min(self._line(placed, place), key=self.time_s)
            if self.time_s(placed) >= before_s:
                return placed

    def _line(self, placed: Placed, place: int) -> Iterator[Placed]:
        """``placed`` first, so that it stays where nothing is better."""
        yield placed
        for number in range(self.instance.room_shape[place]):
            if place == self.instance.num_groups:
                yield replace(placed, cut=number)
            else:
                variants = (*placed.variants[:place], number, *placed.variants[place + 1 :])
                yield replace(placed, variants=variants)

    def climb(self, placed: Placed, width: int, num_entered: int) -> None:
        """From row to row as long as it gets better."""
        here: Placed | None = self.descend(placed)
        while here is not None:
            rows = self.neighbors(here.row, width).tolist()
            near = sorted((replace(here, row=row) for row in rows), key=self.time_s)
            entered = map(self.descend, near[:num_entered])
            here_s = self.time_s(here)
            here = next((there for there in entered if self.time_s(there) < here_s), None)

    def neighbors(self, row: int, width: int) -> NDArray[np.int64]:
        """At most ``width`` rows near ``row``, those first that look fastest."""
        rows = self.instance.rows
        differs = rows != rows[row]
        count = sum(differs[:, columns].any(axis=1).astype(np.int64) for columns in _COLUMNS)
        near = np.flatnonzero((count >= 1) & (count <= 2))
        order = np.argsort(self.instance.row_features[near, _GLANCE], kind="stable")
        return near[order][:width]


def improve(
    instance: Instance,
    starts: Sequence[Placed],
    *,
    max_evaluations: int,
    width: int = 24,
    num_entered: int = 6,
) -> Improved:
    """The best plan that local search finds from ``starts``, the best of them first.

    Deterministic. ``starts`` count as evaluations; one at least is needed.

    Args:
        instance: what to plan.
        starts: plans to begin with; the first ones where evaluations run out.
        max_evaluations: distinct plans to look up at most, 1 or more.
        width: neighbors of a row looked up at most.
        num_entered: of these, how many are gone into.
    """
    search = _Search(instance, max_evaluations)
    try:
        for start in sorted(dict.fromkeys(starts), key=search.time_s):
            if start.row not in search.been:
                search.climb(start, width, num_entered)
    except _UsedUpError:
        pass
    assert search.best is not None, "one start was looked up"
    return Improved(
        placed=search.best, time_s=search.known[search.best], evaluations=len(search.known)
    )
