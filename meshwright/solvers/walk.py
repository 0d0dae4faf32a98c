"""Local searches as proposers: what bounds them, where they start, and how they answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from meshwright.solvers.landscape import Draft, Landscape, Place
from meshwright.solvers.neighborhood import Neighborhood

__all__ = ["Search", "WalkSettings", "starting_places", "uniform_places"]

_MAX_ROOMS = 64
"""Skeletons looked at before the search starts; others are found by moves."""


@dataclass(frozen=True, slots=True, eq=False)
class WalkSettings:
    """What bounds a search, and its source of chance."""

    max_evaluations: int
    """Distinct plans to price."""
    num_walkers: int
    """Places kept at a time: walkers, a population, the width of a beam."""
    rng: np.random.Generator
    drafts: tuple[Draft, ...] = ()
    """Where to start; from uniform plans where there are none."""


Search = Callable[[Landscape, Neighborhood, WalkSettings], None]
"""Searches a landscape until it is exhausted; the answer is in the landscape's memory."""


def uniform_places(landscape: Landscape, settings: WalkSettings) -> dict[int, list[Place]]:
    """By skeleton its uniform plans, lowest first; skeletons that have none are left out.

    At most half of the evaluations go into this.
    """
    found: dict[int, list[Place]] = {}
    for skeleton in settings.rng.permutation(len(landscape.skeletons))[:_MAX_ROOMS].tolist():
        if landscape.is_late or landscape.evaluations > settings.max_evaluations // 2:
            break
        places = [place for place in landscape.priced(landscape.uniform(skeleton)) if place]
        if places:
            found[skeleton] = sorted(places, key=_height)
    return found


def starting_places(landscape: Landscape, settings: WalkSettings) -> list[Place]:
    """The drafts given, or uniform plans: half the best of different skeletons, half of all."""
    if settings.drafts:
        return [place for place in landscape.priced(list(settings.drafts)) if place is not None]
    found = uniform_places(landscape, settings)
    firsts = sorted((places[0] for places in found.values()), key=_height)
    chosen = firsts[: max(settings.num_walkers // 2, 1)]
    taken = {place.draft.key for place in chosen}
    others = sorted((place for places in found.values() for place in places), key=_height)
    rest = [place for place in others if place.draft.key not in taken]
    return chosen + rest[: settings.num_walkers - len(chosen)]


def _height(place: Place) -> float:
    return place.height
