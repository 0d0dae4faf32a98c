"""Stages on unequal sub-meshes: the dynamic program against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from meshwright.solvers.stage_chain import ChainProblem, solve_chain


def brute_force(problem: ChainProblem) -> float:
    """The least time over all cuts and all ways."""
    num_ways, num_levels, num_units, _ = problem.cost_s.shape
    best = np.inf
    for count in range(1, min(problem.max_stages, num_units) + 1):
        for cuts in itertools.combinations(range(1, num_units), count - 1):
            bounds = [0, *cuts, num_units]
            for ways in itertools.product(range(num_ways), repeat=count):
                used = problem.uses[list(ways)].sum(axis=0)
                if (used > np.array(problem.devices)).any():
                    continue
                times = [
                    problem.cost_s[
                        way, min(count - s, num_levels) - 1, bounds[s], bounds[s + 1] - 1
                    ]
                    for s, way in enumerate(ways)
                ]
                if not np.isfinite(times).all():
                    continue
                best = min(best, sum(times) + (problem.num_microbatches - 1) * max(times))
    return float(best)


def random_problem(seed: int, devices: tuple[int, ...], num_units: int = 5) -> ChainProblem:
    """Units of random work; ways on 1, 2 and 3 devices of each type; some stages do not fit."""
    rng = np.random.default_rng(seed)
    work = rng.uniform(0.5, 2.0, num_units)
    uses, costs = [], []
    for kind in range(len(devices)):
        for size in (1, 2, 3):
            uses.append([size * (kind == other) for other in range(len(devices))])
            speed = size**0.9 * (1 + kind)
            before = np.concatenate([[0.0], np.cumsum(work)])
            cost = (before[None, 1:] - before[:-1, None]) / speed
            cost[np.tril_indices(num_units, -1)] = np.inf
            levels = np.stack([cost, np.where(cost * speed > 4.0, np.inf, cost)])
            costs.append(levels)
    return ChainProblem(
        cost_s=np.stack(costs),
        uses=np.array(uses),
        devices=devices,
        num_microbatches=int(rng.integers(1, 9)),
        max_stages=4,
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("devices", [(5,), (3, 2)])
def test_the_best_stages_are_found(seed: int, devices: tuple[int, ...]) -> None:
    problem = random_problem(seed, devices)
    expected = brute_force(problem)

    solution = solve_chain(problem)

    assert solution is not None
    assert pytest.approx(expected) == solution.time_s
    assert 0 == solution.stages[0].first
    assert 4 == solution.stages[-1].last


def test_work_of_one_and_three_goes_to_one_and_three_devices() -> None:
    """Units of 1 s and 3 s, speed proportional to devices: only 1 + 3 devices balance."""
    cost = np.array([[1.0, 4.0], [np.inf, 3.0]])
    problem = ChainProblem(
        cost_s=np.stack([cost[None] / size for size in (1, 2, 3)]),
        uses=np.array([[1], [2], [3]]),
        devices=(4,),
        num_microbatches=100,
        max_stages=2,
    )

    solution = solve_chain(problem)

    assert solution is not None
    assert [0, 2] == [stage.way for stage in solution.stages]
    assert pytest.approx(101.0) == solution.time_s


def test_nothing_fits_is_said() -> None:
    problem = ChainProblem(
        cost_s=np.full((1, 1, 2, 2), np.inf),
        uses=np.array([[1]]),
        devices=(2,),
        num_microbatches=1,
        max_stages=2,
    )

    assert solve_chain(problem) is None
