"""Simulated annealing from many starts, "go with the winners".

Every walker tries one random move in a round; all moves of a round are priced in one batch. A
move uphill by ``d`` (a relative difference of step times, see ``landscape``) is taken with the
probability ``exp(-d / temperature)``; the temperature falls geometrically with the share of the
evaluations used up. From time to time the worst quarter of the walkers gives way to copies of the
best quarter (Aldous and Vazirani, "Go with the winners" algorithms, FOCS 1994).
"""

from __future__ import annotations

import numpy as np

from meshwright.solvers.landscape import Landscape, Place
from meshwright.solvers.neighborhood import Neighborhood
from meshwright.solvers.walk import WalkSettings, starting_places

__all__ = ["anneal"]

_HOTTEST, _COLDEST = 0.1, 0.0005
"""Temperatures: at first a tenth of the step time is nothing, at last half a thousandth counts."""

_ROUNDS_BETWEEN_CULLS = 20

_MOVES_PER_EVALUATION = 3
"""Moves tried at most for each plan that may be priced: many lead to plans seen before."""


def anneal(landscape: Landscape, moves: Neighborhood, settings: WalkSettings) -> None:
    """Walk until the landscape is exhausted; what was found is ``landscape.best``."""
    walkers = starting_places(landscape, settings)
    spent_before = landscape.evaluations
    budget = max(settings.max_evaluations - spent_before, 1)
    num_rounds = max(_MOVES_PER_EVALUATION * budget // max(len(walkers), 1), 1)
    for number in range(num_rounds if walkers else 0):
        share = max((landscape.evaluations - spent_before) / budget, number / num_rounds)
        temperature = _HOTTEST * (_COLDEST / _HOTTEST) ** min(share, 1.0)
        tried = landscape.priced([moves.changed(walker.draft) for walker in walkers])
        luck = settings.rng.random(len(walkers)).tolist()
        walkers = [
            _next(walker, place, temperature, chance)
            for walker, place, chance in zip(walkers, tried, luck, strict=True)
        ]
        if landscape.is_exhausted:
            return
        if (number + 1) % _ROUNDS_BETWEEN_CULLS == 0:
            walkers = _culled(walkers)


def _next(now: Place, tried: Place | None, temperature: float, luck: float) -> Place:
    """Where a walker is after its round."""
    if tried is None:
        return now
    uphill = tried.height - now.height
    return tried if uphill <= 0 or luck < np.exp(-uphill / temperature) else now


def _culled(walkers: list[Place]) -> list[Place]:
    """The worst quarter replaced by copies of the best."""
    ranked = sorted(walkers, key=lambda place: place.height)
    quarter = len(ranked) // 4
    return ranked[: len(ranked) - quarter] + ranked[:quarter]
