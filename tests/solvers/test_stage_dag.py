"""Stages of graphs that are no chains: the integer program against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from meshwright.solvers.stage_dag import DagProblem, dag_time_s, solve_dag


def brute_force(problem: DagProblem) -> float:
    """The least time of all stages whose values never go down, in all ways."""
    best = np.inf
    stages, ways = range(problem.num_stages), range(len(problem.devices))
    for way_of in itertools.product(ways, repeat=problem.num_stages):
        if sum(problem.devices[way] for way in way_of) > problem.total_devices:
            continue
        for stage_of in itertools.product(stages, repeat=problem.time_s.shape[1]):
            goes_up = all(stage_of[u] <= stage_of[v] for u, v in problem.passing_s)
            held = np.zeros(problem.num_stages)
            for unit, stage in enumerate(stage_of):
                held[stage] += problem.memory_bytes[way_of[stage], unit]
            fits = all(held[s] <= problem.capacity_bytes[way_of[s]] for s in stages)
            if goes_up and fits and len(set(stage_of)) == problem.num_stages:
                best = min(best, dag_time_s(problem, stage_of, way_of))
    return float(best)


def random_problem(seed: int, num_ways: int) -> DagProblem:
    """Five units with random edges from lower to higher numbers; way w has w + 1 devices."""
    rng = np.random.default_rng(seed)
    pairs = [pair for pair in itertools.combinations(range(5), 2) if rng.random() < 0.35]
    work = rng.uniform(0.5, 2.0, 5)
    return DagProblem(
        time_s=np.stack([work / (way + 1) ** 0.8 for way in range(num_ways)]),
        memory_bytes=np.ones((num_ways, 5)),
        capacity_bytes=(3.0,) * num_ways,
        devices=tuple(range(1, num_ways + 1)),
        total_devices=3 if num_ways == 1 else 5,
        passing_s={pair: float(rng.uniform(0.0, 0.5)) for pair in pairs},
        num_stages=int(rng.integers(2, 4)),
        num_microbatches=int(rng.integers(1, 8)),
    )


@pytest.mark.parametrize("num_ways", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_best_stages_are_found(seed: int, num_ways: int) -> None:
    problem = random_problem(seed, num_ways)
    expected = brute_force(problem)

    found = solve_dag(problem)

    assert found is not None
    assert pytest.approx(expected, rel=2e-3) == found.time_s
    assert found.bound_s <= expected * (1 + 1e-9)


def test_towers_stand_side_by_side() -> None:
    """Two towers of two units and a sum: each tower a stage, the sum after both, 2.1 s deep."""
    problem = DagProblem(
        time_s=np.array([[1.0, 1.0, 1.0, 1.0, 0.1]]),
        memory_bytes=np.zeros((1, 5)),
        capacity_bytes=(1.0,),
        devices=(1,),
        total_devices=3,
        passing_s={(0, 1): 0.0, (2, 3): 0.0, (1, 4): 0.0, (3, 4): 0.0},
        num_stages=3,
        num_microbatches=4,
    )

    found = solve_dag(problem)

    assert found is not None
    assert pytest.approx(3 * 2.0 + 2.1) == found.time_s
    assert found.stage_of[0] == found.stage_of[1] != found.stage_of[2] == found.stage_of[3]
