"""Beam search: plans built stage by stage, and in a stage class by class.

A partial plan is a draft whose first segments are decided. Its worth is that of the best of its
completions, in which the undecided segments do the fastest, the leanest, or one of the uniform
plans between them. So every partial plan stands for complete plans that are priced, and the best
of them is known whenever time runs out. While plans are left to price, all is done again with a
beam twice as wide and runs of equal segments decided in twice as many parts.

A partial plan is dropped where its fastest completion is slower than the best plan known to fit:
where the times of segments add up, no other completion is faster. They do but for changes of
layout between segments, which ``_MARGIN`` is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from meshwright.solvers.landscape import Draft, IntArray, Landscape, Place
from meshwright.solvers.neighborhood import Neighborhood
from meshwright.solvers.walk import WalkSettings, uniform_places

__all__ = ["build"]

_MARGIN = 0.02
_MAX_BETWEEN = 2
"""Uniform plans between the fastest and the leanest that complete partial ones."""

_MAX_STRATEGIES = 8
"""Strategies tried for a run of segments, of those that none beats in both time and memory."""

_DOUBLINGS = 5
_NUM_PARTS = 3
"""Parts a run of equal segments in a stage is decided in, at first."""

_CUT_REACH = 2
"""Segments a stage boundary may move to either side of the even cut."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, eq=False)
class _Partial:
    """A plan decided up to a segment."""

    draft: Draft
    decided: int
    """First undecided segment."""


@dataclass(frozen=True, slots=True, eq=False)
class _Front:
    """What a room's undecided segments may do."""

    completions: tuple[IntArray, ...]
    """Each (segments,) strategies, the fastest first."""
    by_class: dict[int, IntArray]
    """For each segment class the strategies worth trying."""


def build(landscape: Landscape, moves: Neighborhood, settings: WalkSettings) -> None:
    """Build plans on one skeleton after the other; the answer is ``landscape.best``.

    The skeletons come in the order of their best uniform plans.
    """
    rooms = uniform_places(landscape, settings)
    ranked = sorted(rooms, key=lambda index: rooms[index][0].height)
    classes = moves.segment_classes
    for doubling in range(_DOUBLINGS):
        for skeleton in ranked:
            front = _front(landscape, rooms[skeleton], classes)
            beam = [_Partial(draft=rooms[skeleton][0].draft, decided=0)]
            while beam and not landscape.is_exhausted:
                grown = [
                    partial
                    for parent in beam
                    for partial in _decisions(parent, classes, front, _NUM_PARTS * 2**doubling)
                ]
                beam = _kept(landscape, grown, front, settings.num_walkers * 2**doubling)
            if landscape.is_exhausted:
                return


def _decisions(
    parent: _Partial, classes: IntArray, front: _Front, num_parts: int
) -> Iterator[_Partial]:
    """The parent with its next equal segments decided, and the stage they begin."""
    count, first = len(classes), parent.decided
    if first >= count:
        return
    for draft in _cuts(parent):
        starts = draft.starts
        begin = int(starts[starts <= first][-1])
        later = starts[starts > first]
        limit = int(later[0]) if len(later) else count
        same = classes[begin:limit] == classes[first]
        part = -(-int(same.sum()) // num_parts)
        end = first
        while end < min(first + part, limit) and classes[end] == classes[first]:
            end += 1
        for strategy in front.by_class[int(classes[first])].tolist():
            assignment = draft.assignment.copy()
            assignment[first:end] = strategy
            yield _Partial(draft=_with(draft, assignment=assignment), decided=end)


def _cuts(parent: _Partial) -> Iterator[Draft]:
    """The parent, and where it is about to begin a stage, that with its end moved about."""
    draft = parent.draft
    stage = int(np.searchsorted(draft.starts, parent.decided))
    is_start = stage < len(draft.starts) and draft.starts[stage] == parent.decided
    if not is_start or stage + 1 == len(draft.starts):
        yield draft
        return
    ends = np.append(draft.starts, len(draft.assignment))
    low = max(int(ends[stage]) + 1, int(ends[stage + 1]) - _CUT_REACH)
    high = min(int(ends[stage + 2]) - 1, int(ends[stage + 1]) + _CUT_REACH)
    for end in range(low, high + 1):
        starts = draft.starts.copy()
        starts[stage + 1] = end
        yield _with(draft, starts=starts)


def _kept(
    landscape: Landscape, grown: Sequence[_Partial], front: _Front, width: int
) -> list[_Partial]:
    """The best partial plans, none that cannot become better than what is known."""
    completions = [_completed(partial, rest) for partial in grown for rest in front.completions]
    known_s = landscape.best_s
    places = landscape.priced(completions)
    each = len(front.completions)
    ranked: list[tuple[float, _Partial]] = []
    for number, partial in enumerate(grown):
        mine = [place for place in places[number * each : (number + 1) * each] if place]
        if len(mine) == each and mine[0].time_s <= known_s * (1 + _MARGIN):
            ranked.append((min(place.height for place in mine), partial))
    ranked.sort(key=lambda item: item[0])
    return [partial for _, partial in ranked[:width]]


def _completed(partial: _Partial, rest: IntArray) -> Draft:
    assignment = rest.copy()
    assignment[: partial.decided] = partial.draft.assignment[: partial.decided]
    return _with(partial.draft, assignment=assignment)


def _with(
    draft: Draft, *, assignment: IntArray | None = None, starts: IntArray | None = None
) -> Draft:
    return Draft(
        skeleton=draft.skeleton,
        assignment=draft.assignment if assignment is None else assignment,
        starts=draft.starts if starts is None else starts,
    )


# What segments may do --------------------------------------------------------------------------


def _front(landscape: Landscape, uniform: Sequence[Place], classes: IntArray) -> _Front:
    """What changing one class of the leanest uniform plan shows."""
    chain = _undominated(uniform)
    base = chain[-1].draft
    fastest, leanest = chain[0].draft.assignment.copy(), base.assignment.copy()
    by_class = {}
    for number in np.unique(classes).tolist():
        segment = int(np.argmax(classes == number))
        drafts = []
        for place in uniform:
            assignment = base.assignment.copy()
            assignment[classes == number] = place.draft.assignment[0]
            drafts.append(_with(base, assignment=assignment))
        found = [place for place in landscape.priced(drafts) if place is not None]
        good = [int(place.draft.assignment[segment]) for place in _undominated(found)]
        # The fullest stage may be another one: what is lean everywhere is lean here.
        good += [int(place.draft.assignment[0]) for place in chain]
        fastest[classes == number] = good[0]
        by_class[number] = np.array(_spread(list(dict.fromkeys(good)), _MAX_STRATEGIES))
    between = [place.draft.assignment for place in _spread(chain[1:-1], _MAX_BETWEEN)]
    return _Front(completions=(fastest, *between, leanest), by_class=by_class)


def _spread(items: Sequence[_Item], most: int) -> list[_Item]:
    """At most so many of ``items``, evenly from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _undominated(places: Sequence[Place]) -> list[Place]:
    """Those for which no other is both faster and leaner, the fastest first."""
    found: list[Place] = []
    for place in sorted(places, key=lambda item: (item.time_s, item.excess)):
        if not found or place.excess < found[-1].excess:
            found.append(place)
    return found
