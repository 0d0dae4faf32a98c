"""Local search against optima worked out by enumeration, on toys and drawn instances."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from meshwright.agents.local_search import improve
from meshwright.env.decode import Placed, best_of
from meshwright.env.instance import ROW_FEATURES, Instance, Room
from meshwright.env.rooms import StoredRooms
from meshwright.env.toys import random_instance, toys


class CountedRooms(StoredRooms):
    """Remembers the rows opened."""

    def __init__(self, rooms: StoredRooms) -> None:
        super().__init__(rooms.times)
        self.opened: list[int] = []

    def open(self, row: int) -> Room:
        self.opened.append(row)
        return super().open(row)


def drawn(seed: int, *, fitting_share: float = 0.5) -> tuple[Instance, CountedRooms]:
    rng = np.random.default_rng(seed)
    found = random_instance(rng, num_groups=1 + seed % 3, fitting_share=fitting_share)
    assert isinstance(found.rooms, StoredRooms)
    rooms = CountedRooms(found.rooms)
    return replace(found, rooms=rooms), rooms


def first_of(instance: Instance, row: int = 0) -> Placed:
    return Placed(row=row, variants=(0,) * instance.num_groups, cut=0)


def time_of(instance: Instance, placed: Placed) -> float:
    return float(instance.rooms.open(placed.row).time_s[(*placed.variants, placed.cut)])


def fitting_plans(instance: Instance) -> int:
    """Plans on rows on which something fits."""
    fitting = sum(instance.rooms.fits(row) for row in range(len(instance.rows)))
    return fitting * math.prod(instance.room_shape)


def test_finds_the_optima_of_the_toys_from_any_plan() -> None:
    for instance, best in toys():
        for row, *where in product(range(len(instance.rows)), *map(range, instance.room_shape)):
            start = Placed(row=row, variants=tuple(where[:-1]), cut=where[-1])

            assert best == improve(instance, [start], max_evaluations=10_000).placed


@pytest.mark.parametrize("max_evaluations", [1, 7, 40])
@pytest.mark.parametrize("seed", range(6))
def test_looks_up_as_many_plans_as_it_may_and_tells_the_time(
    seed: int, max_evaluations: int
) -> None:
    instance, rooms = drawn(seed)
    start = first_of(instance)
    found = improve(instance, [start, start], max_evaluations=max_evaluations)
    may = min(max_evaluations, fitting_plans(instance))

    assert max_evaluations >= found.evaluations >= may
    assert found.evaluations == len(rooms.opened)
    assert time_of(instance, found.placed) == found.time_s
    assert time_of(instance, start) >= found.time_s


@pytest.mark.parametrize("fitting_share", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_everything_is_looked_at_once_where_it_may(seed: int, fitting_share: float) -> None:
    instance, rooms = drawn(seed, fitting_share=fitting_share)
    start = next(first_of(instance, row) for row in range(99) if instance.rooms.fits(row))
    found = improve(instance, [start], max_evaluations=100_000)

    assert fitting_plans(instance) == found.evaluations == len(rooms.opened)
    assert best_of(instance)[0] == found.time_s


def test_is_the_same_each_time_and_more_lookups_never_make_it_worse() -> None:
    for seed in range(6):
        instance, _ = drawn(seed)
        starts = [first_of(instance, row) for row in range(3)]
        runs = [improve(instance, starts, max_evaluations=count) for count in (3, 6, 12, 24, 48)]
        times = [run.time_s for run in runs]

        assert min(time_of(instance, start) for start in starts) == times[0]
        assert sorted(times, reverse=True) == times
        assert runs[2] == improve(instance, starts, max_evaluations=12)


def test_all_starts_may_be_plans_that_do_not_fit() -> None:
    instance, _ = drawn(2, fitting_share=0.05)
    unfit = [first_of(instance, row) for row in range(len(instance.rows))]
    unfit = [start for start in unfit if math.isinf(time_of(instance, start))][:4]
    found = improve(instance, unfit, max_evaluations=100_000)

    assert 4 == len(unfit)
    assert math.inf == improve(instance, unfit, max_evaluations=4).time_s
    assert best_of(instance)[0] == found.time_s


def test_rows_that_look_fast_come_first() -> None:
    """With a glance that is right, the fastest row is the first to be looked into."""
    instance, _ = drawn(3, fitting_share=1.0)
    least = np.array([instance.rooms.open(row).time_s.min() for row in range(len(instance.rows))])
    features = instance.row_features.copy()
    features[:, ROW_FEATURES.index("log_step_s")] = np.log(least)
    features[:, ROW_FEATURES.index("log_fullest_none")] = -1.0
    instance, rooms = drawn(3, fitting_share=1.0)
    slowest, fastest = int(least.argmax()), int(least.argmin())
    instance = replace(instance, row_features=features)
    improve(instance, [first_of(instance, slowest)], max_evaluations=2)

    assert [slowest, fastest] == rooms.opened
