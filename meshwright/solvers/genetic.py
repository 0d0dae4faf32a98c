"""A genetic search: plans mate where stages meet.

The parents of a child win tournaments. On the same skeleton the child takes the segments before a
stage boundary (or, without a pipeline, before any segment) from one parent and the others from the
other parent, each with its strategies; between skeletons one parent gives the skeleton and the
stages, the other a run of strategies. Most children then mutate by one or two moves of
``neighborhood``. The best tenth survives and equal plans are kept once; and in every generation
some of the starting plans come back, much mutated, so that the population stays diverse. The
search ends when the best plan has not changed for some generations.
"""

from __future__ import annotations

import numpy as np

from meshwright.solvers.landscape import Draft, IntArray, Landscape, Place
from meshwright.solvers.neighborhood import Neighborhood
from meshwright.solvers.walk import WalkSettings, starting_places

__all__ = ["breed"]

_TOURNAMENT = 3
_ELITE_FRACTION = 0.1
_MUTATION_CHANCES = (0.15, 0.6, 0.25)
"""Of no, one and two moves."""

_IMMIGRANT_FRACTION = 0.15
_IMMIGRANT_MOVES = 4

_PATIENCE = 30
"""Generations without a better plan, after which the search ends."""

_CHILDREN_PER_EVALUATION = 4
"""Children made at most for each plan that may be priced: many were seen before."""


def breed(landscape: Landscape, moves: Neighborhood, settings: WalkSettings) -> None:
    """Breed until the landscape is exhausted; what was found is ``landscape.best``."""
    rng, size = settings.rng, settings.num_walkers
    starts = population = starting_places(landscape, settings)
    generations = max(_CHILDREN_PER_EVALUATION * settings.max_evaluations // size, 1)
    num_immigrants = int(size * _IMMIGRANT_FRACTION)
    best_s, since = landscape.best_s, 0
    for _ in range(generations if population else 0):
        parents = [
            (_winner(population, rng), _winner(population, rng))
            for _ in range(size - num_immigrants)
        ]
        children = [
            _mutated(_child(landscape, one, other, rng), moves, _number_of_moves(rng))
            for one, other in parents
        ]
        children += [
            _mutated(starts[index].draft, moves, _IMMIGRANT_MOVES)
            for index in rng.integers(len(starts), size=num_immigrants).tolist()
        ]
        born = [place for place in landscape.priced(children) if place is not None]
        since = since + 1 if landscape.best_s >= best_s else 0
        best_s = landscape.best_s
        if landscape.is_exhausted or since >= _PATIENCE:
            return
        population = _survivors(population, born, size)


def _number_of_moves(rng: np.random.Generator) -> int:
    return int(rng.choice(len(_MUTATION_CHANCES), p=_MUTATION_CHANCES))


def _winner(population: list[Place], rng: np.random.Generator) -> Draft:
    """The lowest of a few drawn at random."""
    drawn = rng.integers(len(population), size=_TOURNAMENT).tolist()
    lowest: Place = min((population[index] for index in drawn), key=lambda place: place.height)
    return lowest.draft


def _child(landscape: Landscape, one: Draft, other: Draft, rng: np.random.Generator) -> Draft:
    if one.skeleton == other.skeleton:
        return _crossed(one, other, rng)
    guest = landscape.moved(other, one.skeleton)
    if guest is None:
        return one
    first, last = sorted(rng.integers(len(one.assignment), size=2).tolist())
    assignment = one.assignment.copy()
    assignment[first : last + 1] = guest.assignment[first : last + 1]
    return Draft(skeleton=one.skeleton, assignment=assignment, starts=one.starts)


def _crossed(one: Draft, other: Draft, rng: np.random.Generator) -> Draft:
    """The front of ``one`` and the back of ``other``, met at a stage boundary."""
    count = len(one.assignment)
    if len(one.starts) == 1:
        where = int(rng.integers(count))
        starts = one.starts
    else:
        stage = int(rng.integers(1, len(one.starts)))
        starts = np.concatenate([one.starts[:stage], other.starts[stage:]])
        if (np.diff(starts) <= 0).any():
            starts = one.starts
        where = int(starts[stage])
    return Draft(
        skeleton=one.skeleton,
        assignment=_joined(one.assignment, other.assignment, where),
        starts=starts,
    )


def _joined(front: IntArray, back: IntArray, where: int) -> IntArray:
    return np.concatenate([front[:where], back[where:]])


def _mutated(draft: Draft, moves: Neighborhood, count: int) -> Draft:
    for _ in range(count):
        draft = moves.changed(draft)
    return draft


def _survivors(parents: list[Place], born: list[Place], size: int) -> list[Place]:
    """The elite of the parents and the best of the children, each plan once."""
    elite = sorted(parents, key=lambda place: place.height)[: max(int(size * _ELITE_FRACTION), 1)]
    distinct = {place.draft.key: place for place in (*elite, *born)}
    return sorted(distinct.values(), key=lambda place: place.height)[:size]
