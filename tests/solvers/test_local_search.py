"""Annealing, the genetic search and the beam on landscapes whose optimum is known."""

from __future__ import annotations

import time

import numpy as np
import pytest

from meshwright.errors import PlanRefused
from meshwright.solvers.annealing import anneal
from meshwright.solvers.beam import build
from meshwright.solvers.genetic import breed
from meshwright.solvers.landscape import Draft, Landscape, Place, scaled_starts
from meshwright.solvers.neighborhood import Neighborhood
from meshwright.solvers.walk import Search, WalkSettings
from meshwright.space.decision import Skeleton, Strategy
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


def searched(landscape: Landscape, search: Search, *, seed: int = 0, budget: int = 2000) -> None:
    rng = np.random.default_rng(seed)
    settings = WalkSettings(max_evaluations=budget, num_walkers=16, rng=rng)
    search(landscape, Neighborhood(landscape, CLASSES, rng), settings)


@SEARCHES
@pytest.mark.parametrize("capacity", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_finds_nearly_the_optimum_of_everything(search: Search, capacity: float) -> None:
    """12 skeletons, 6 of them with 5 cuts, and 4^6 assignments: 2,000 of 147,456 plans."""
    gaps = []
    for seed in range(3):
        found = spaces(seed, capacity_bytes=capacity)
        landscape = landscape_of(found, max_evaluations=2000)
        searched(landscape, search)
        gaps.append(landscape.best[0].time_s / optimum_s(found) - 1)

    assert min(gaps) >= -1e-12
    assert float(np.mean(gaps)) <= 0.04
    assert max(gaps) <= 0.08


@SEARCHES
def test_the_same_seed_finds_the_same_plans(search: Search) -> None:
    found = []
    for _ in range(2):
        landscape = landscape_of(spaces(3, capacity_bytes=TIGHT), max_evaluations=1500)
        searched(landscape, search, seed=7, budget=1500)
        found.append([(place.draft.key, place.time_s) for place in landscape.best])

    assert found[0] == found[1]


@SEARCHES
def test_prices_no_more_plans_than_allowed_and_none_twice(search: Search) -> None:
    found = spaces(1, capacity_bytes=TIGHT)
    landscape = landscape_of(found, max_evaluations=300)
    searched(landscape, search, budget=300)
    priced = sum(sum(space.calls) for space in found.values())

    assert priced == landscape.evaluations
    assert 100 < priced <= 300


@SEARCHES
def test_stops_at_the_deadline_with_what_it_has(search: Search) -> None:
    found = spaces(1, capacity_bytes=TIGHT)
    late = landscape_of(found, max_evaluations=10**9, deadline_s=time.monotonic() - 1)
    searched(late, search, budget=10**9)
    soon = landscape_of(found, max_evaluations=10**9, deadline_s=time.monotonic() + 0.3)
    start_s = time.monotonic()
    searched(soon, search, budget=10**9)

    assert () == late.best
    assert soon.best[0].fits
    assert time.monotonic() - start_s < 10


@SEARCHES
def test_where_nothing_fits_the_nearest_is_known(search: Search) -> None:
    """Half a byte for a stage; its leanest segments need a third of a byte or more each."""
    landscape = landscape_of(spaces(2, capacity_bytes=0.5), max_evaluations=1000)
    searched(landscape, search, budget=1000)

    assert () == landscape.best
    assert landscape.leanest is not None
    assert landscape.leanest.excess > 0


def test_a_judge_corrects_what_seems_too_fast() -> None:
    """Estimates are half the truth on one skeleton; judged plans carry the true time."""
    found = spaces(0, capacity_bytes=ROOMY)
    true_s = optimum_s(found)
    liar = found[SKELETONS[5]]
    liar.seconds /= 2

    def judge(draft: Draft) -> Place | None:
        priced = found[SKELETONS[draft.skeleton]].evaluate(
            draft.assignment[None], draft.starts[None]
        )
        times = 2 if draft.skeleton == 5 else 1
        return Place(
            draft=draft,
            time_s=times * float(priced.time_s[0]),
            excess=-1,
            fits=True,
            is_judged=True,
        )

    landscape = Landscape(
        SKELETONS,
        lambda skeleton: (found[skeleton], STRATEGIES),
        max_evaluations=2000,
        judge=judge,
        max_judged=1000,
    )
    searched(landscape, anneal)

    assert landscape.best[0].is_judged
    assert pytest.approx(true_s, rel=0.05) == landscape.best[0].time_s


def test_skeletons_without_plans_are_left_alone() -> None:
    found = spaces(0, capacity_bytes=ROOMY)

    def opened(skeleton: Skeleton) -> tuple[SyntheticSpace, tuple[Strategy, ...]]:
        if skeleton.sizes["tp"] == 2:
            raise PlanRefused("cannot be sharded")
        return found[skeleton], STRATEGIES

    landscape = Landscape(SKELETONS, opened, max_evaluations=2000)
    searched(landscape, anneal, budget=2000)
    used = {SKELETONS[place.draft.skeleton].sizes["tp"] for place in landscape.best}

    assert {1} == used


def test_boundaries_scale_with_the_number_of_stages() -> None:
    """(0, 4) of 8 segments: four stages get two segments each, one stage all of them."""
    starts = np.array([0, 4])

    assert [0, 2, 4, 6] == scaled_starts(starts, 8, 4).tolist()
    assert [0] == scaled_starts(starts, 8, 1).tolist()
    assert [0, 1, 2, 3] == scaled_starts(np.array([0]), 4, 4).tolist()
    assert [0, 1, 2] == scaled_starts(np.array([0, 1]), 3, 3).tolist()


def test_moves_keep_plans_whole() -> None:
    """Every neighbor has a strategy for each segment and stages that ascend from 0."""
    landscape = landscape_of(spaces(0, capacity_bytes=ROOMY), max_evaluations=10)
    moves = Neighborhood(landscape, CLASSES, np.random.default_rng(0))
    draft = landscape.uniform(4)[0]
    seen = set()
    for _ in range(500):
        draft = moves.changed(draft)
        seen.add(draft.skeleton)

        assert SKELETONS[draft.skeleton].num_stages == len(draft.starts)
        assert 0 == draft.starts[0]
        assert (np.diff(np.append(draft.starts, len(CLASSES))) > 0).all()
        assert (draft.assignment >= 0).all()
        assert (draft.assignment < len(STRATEGIES)).all()

    assert len(seen) > 6
