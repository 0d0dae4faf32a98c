"""Annealing, the genetic search and the beam on landscapes whose optimum is known."""

from __future__ import annotations

import time

import numpy as np
import pytest

from meshwright.errors import PlanRefused
from meshwright.solvers.annealing import anneal
from meshwright.solvers.beam import build
from meshwright.solvers.decision import Skeleton
from meshwright.solvers.genetic import breed
from meshwright.solvers.landscape import Draft, Landscape, scaled_starts
from meshwright.solvers.neighborhood import Neighborhood
from meshwright.solvers.walk import Search, WalkSettings
from tests.solvers.synthetic import (
    CLASSES,
    SKELETONS,
    STRATEGIES,
    SyntheticSpace,
    landscape_of,
    optimum_s,
    spaces,
)

SEARCHES = pytest.mark.parametrize(
    "search", [anneal, breed, build], ids=["anneal", "breed", "beam"]
)
ROOMY, TIGHT = 100.0, 6.0


def searched(landscape: Landscape, search: Search, *, seed: int = 0, budget: int = 4000) -> None:
    rng = np.random.default_rng(seed)
    settings = WalkSettings(max_evaluations=budget, num_walkers=16, rng=rng)
    search(landscape, Neighborhood(landscape, CLASSES, rng), settings)


@SEARCHES
@pytest.mark.parametrize("capacity", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_finds_nearly_the_optimum_of_everything(search: Search, capacity: float) -> None:
    """12 skeletons of up to 5 cuts and 4^6 assignments: 147,456 plans, of which 4,000 are priced."""
    gaps = []
    for seed in range(5):
        found = spaces(seed, capacity_bytes=capacity)
        landscape = landscape_of(found, max_evaluations=4000)
        searched(landscape, search)
        gaps.append(landscape.best[0].time_s / optimum_s(found) - 1)

    assert min(gaps) >= -1e-12
    assert float(np.mean(gaps)) <= 0.01
    assert max(gaps) <= 0.04
