"""Moves between plans: small changes of a draft that local searches try.

strategy    one segment, a run of segments within a stage, all segments of a class (everywhere or
            in one stage), or every segment takes another strategy; half of the time one that
            differs in a single respect
border      the strategy of a segment spreads to its neighbors
cut         a stage boundary moves by a few segments
skeleton    the same plan on a skeleton nearby: twice the tensor parallelism, half the stages...
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence

import numpy as np

from meshwright.solvers.landscape import Draft, IntArray, Landscape, Room

__all__ = ["Neighborhood"]

_WEIGHTS = {
    "segment": 0.15,
    "run": 0.2,
    "class": 0.2,
    "everywhere": 0.05,
    "border": 0.15,
    "cut": 0.15,
    "skeleton": 0.1,
}
"""How often each move is tried."""


class Neighborhood:
    """Draws random moves; all randomness comes from ``rng``."""

    def __init__(
        self,
        landscape: Landscape,
        segment_classes: Sequence[int],
        rng: np.random.Generator,
    ) -> None:
        """Moves in ``landscape``.

        Args:
            landscape: where the drafts live.
            segment_classes: (segments,) class of each segment.
            rng: drawn from by every move.
        """
        self._landscape = landscape
        self.segment_classes = np.asarray(segment_classes, dtype=np.int64)
        self._rng = rng
        self._names = tuple(_WEIGHTS)
        self._below = np.cumsum(list(_WEIGHTS.values())).tolist()

    def changed(self, draft: Draft) -> Draft:
        """A random neighbor of ``draft``; itself where the move drawn has nothing to change."""
        name = self._names[bisect(self._below, self._below[-1] * self._rng.random())]
        if name == "skeleton":
            return self._other_skeleton(draft)
        if name == "cut":
            return self._moved_cut(draft)
        room = self._landscape.room(draft.skeleton)
        assert room is not None, "drafts are made in rooms that have plans"
        assignment = draft.assignment.copy()
        where = self._where(name, draft)
        if name == "border":
            assignment[where] = draft.assignment[self._one_of(where)]
        else:
            assignment[where] = self._strategy(room, int(assignment[self._one_of(where)]))
        return Draft(skeleton=draft.skeleton, assignment=assignment, starts=draft.starts)

    def _where(self, name: str, draft: Draft) -> IntArray:
        """Segments that a move of strategies changes."""
        count = len(draft.assignment)
        segment = int(self._rng.integers(count))
        first, end = _stage_of(draft.starts, segment, count)
        if name == "segment":
            return np.array([segment])
        if name == "everywhere":
            return np.arange(count)
        if name == "class":
            same = np.flatnonzero(self.segment_classes == self.segment_classes[segment])
            inside = same[(same >= first) & (same < end)]
            return inside if self._rng.random() < 0.5 else same
        if name == "border":
            reach = int(self._rng.geometric(0.5))
            return np.arange(max(segment - reach, 0), min(segment + reach + 1, count))
        one, other = sorted(self._rng.integers(first, end, size=2).tolist())
        return np.arange(one, other + 1)

    def _strategy(self, room: Room, now: int) -> int:
        related = room.related[now]
        if len(related) and self._rng.random() < 0.5:
            return self._one_of(related)
        return int(self._rng.integers(room.pricer.num_strategies))

    def _one_of(self, items: IntArray) -> int:
        return int(items[int(self._rng.integers(len(items)))])

    def _moved_cut(self, draft: Draft) -> Draft:
        if len(draft.starts) == 1:
            return draft
        starts = draft.starts.copy()
        stage = int(self._rng.integers(1, len(starts)))
        ends = np.append(starts, len(draft.assignment))
        step = int(self._rng.geometric(0.6)) * (1 if self._rng.random() < 0.5 else -1)
        starts[stage] = min(max(ends[stage] + step, ends[stage - 1] + 1), ends[stage + 1] - 1)
        return Draft(skeleton=draft.skeleton, assignment=draft.assignment, starts=starts)

    def _other_skeleton(self, draft: Draft) -> Draft:
        others = self._landscape.neighbors(draft.skeleton)
        if not len(others):
            return draft
        moved = self._landscape.moved(draft, self._one_of(others))
        return draft if moved is None else moved


def _stage_of(starts: IntArray, segment: int, num_segments: int) -> tuple[int, int]:
    """First segment and end of the stage that holds ``segment``."""
    stage = int(np.searchsorted(starts, segment, side="right")) - 1
    end = int(starts[stage + 1]) if stage + 1 < len(starts) else num_segments
    return int(starts[stage]), end
