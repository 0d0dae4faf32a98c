"""Searchers without an agent over the plans of one instance, each with the same look-ups.

All of them may ask for free what the agent is told, too: which rows have a plan that fits, and what
a glance says of a row (``ROW_FEATURES``). What is counted, as in ``agents.local_search``, are
distinct plans looked up. Random plans are drawn decision by decision among the valid candidates,
like those of an untrained policy.

    random      masked random decisions
    glance      rows as a glance orders them; on each the plans that treat all groups alike
    annealing   one change at a time, worse plans taken with exp(-relative loss / temperature)
    genetic     tournaments, crossing of rows in log sizes and of variants, mutation, elitism
    cma         CMA-ES (library ``cma``) over the same numbers, rounded to rows and variants
    local       local search of ``agents.local_search`` from the first plan of ``glance`` that fits
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.agents.local_search import improve
from meshwright.env.batched import BatchedPlacement
from meshwright.env.compiled import compile_instances
from meshwright.env.decode import Placed
from meshwright.env.instance import ROW_DECISIONS, ROW_FEATURES, Instance

__all__ = ["Lookups", "Problem", "available", "best_by_budget", "is_random"]

FloatArray = NDArray[np.float64]

_GLANCE = ROW_FEATURES.index("log_step_s")
_KINDS = tuple(
    [ROW_DECISIONS.index(name) for name in names]
    for names in (
        ("tp",),
        ("cp",),
        ("ep",),
        ("pp", "num_microbatches", "schedule"),
        ("dp", "dp_shard", "zero_stage"),
    )
)
"""Rows are near one another where two of these differ at most."""

_HOTTEST, _COLDEST = 0.03, 0.001
_SHARE_OF_STARTS = 0.25
_LOOKUPS_OF_A_WALK = 100
_POPULATION = 24
_MUTATION = 0.15
_PATIENCE = 3000
_DRAWN_AT_ONCE = 256


class _UsedUpError(Exception):
    """No look-ups are left."""


class Problem:
    """An instance as searchers see it."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.compiled = compile_instances([instance])
        self.fitting = [row for row in range(len(instance.rows)) if instance.rooms.fits(row)]
        sizes = np.log2(instance.rows + 1.0)
        width = np.maximum(sizes.max(axis=0) - sizes.min(axis=0), 1.0)
        self.scaled = (sizes - sizes.min(axis=0)) / width
        """(K, D) decisions of rows from 0 to 1, in logarithms."""

    def nearest(self, point: FloatArray) -> int:
        """The row that fits, nearest to (D,) numbers from 0 to 1."""
        distance = np.abs(self.scaled[self.fitting] - point).sum(axis=1)
        return self.fitting[int(distance.argmin())]

    def random(self, rng: np.random.Generator, count: int) -> list[Placed]:
        """Plans drawn decision by decision among the valid candidates."""
        environment = BatchedPlacement(self.compiled, count)
        observation: Any = environment.reset_to(np.zeros(count, np.int64))
        while np.isnan(environment.time_s()).any():
            mask = observation["action_mask"]
            observation = environment.step((mask * rng.random(mask.shape)).argmax(axis=1))[0]
        return [placed for placed in environment.placed() if placed is not None]

    def by_glance(self) -> Iterator[Placed]:
        """Rows as a glance orders them; on each the plans that treat all groups alike."""
        instance = self.instance
        order = np.argsort(instance.row_features[self.fitting, _GLANCE], kind="stable")
        for place in order.tolist():
            for number, cut in product(range(len(instance.variants)), range(instance.num_cuts)):
                variants = (number,) * instance.num_groups
                yield Placed(row=self.fitting[place], variants=variants, cut=cut)


class Lookups:
    """Looks plans up, counts distinct ones, and remembers the best after each."""

    def __init__(self, problem: Problem, max_evaluations: int, seed: int) -> None:
        self.problem = problem
        self.max_evaluations = max_evaluations
        self.rng = np.random.default_rng(seed)
        self.known: dict[Placed, float] = {}
        self.curve: list[float] = []
        """Least time after each evaluation."""
        self._stale = 0
        self._drawn: list[Placed] = []
        self._near: dict[int, NDArray[np.int64]] = {}

    def time_s(self, placed: Placed) -> float:
        """Step time; infinite where it does not fit.

        Ends the search when all is used up, and where nothing new has been asked for long.
        """
        if placed in self.known:
            self._stale += 1
            if self._stale > _PATIENCE:
                raise _UsedUpError
            return self.known[placed]
        if len(self.known) >= self.max_evaluations:
            raise _UsedUpError
        self._stale = 0
        room = self.problem.instance.rooms.open(placed.row)
        found = float(room.time_s[(*placed.variants, placed.cut)])
        self.known[placed] = found
        self.curve.append(min(found, self.curve[-1] if self.curve else math.inf))
        return found

    def random(self) -> Placed:
        """One random plan that fits."""
        if not self._drawn:
            self._drawn = self.problem.random(self.rng, min(self.max_evaluations, _DRAWN_AT_ONCE))
        return self._drawn.pop()

    def mutated(self, placed: Placed) -> Placed:
        """Another variant of a group, another cut, or a row near by."""
        instance, fitting = self.problem.instance, self.problem.fitting
        shape, rng = instance.room_shape, self.rng
        places = [place for place, count in enumerate(shape) if count > 1]
        if places and (len(fitting) == 1 or rng.random() < 0.5):
            place = int(rng.choice(places))
            number = int(rng.integers(shape[place]))
            if place == len(shape) - 1:
                return replace(placed, cut=number)
            variants = (*placed.variants[:place], number, *placed.variants[place + 1 :])
            return replace(placed, variants=variants)
        if placed.row not in self._near:
            differs = instance.rows[fitting] != instance.rows[placed.row]
            kinds = sum(differs[:, columns].any(axis=1).astype(np.int64) for columns in _KINDS)
            self._near[placed.row] = np.array(fitting)[(kinds >= 1) & (kinds <= 2)]
        near = self._near[placed.row]
        return replace(placed, row=int(rng.choice(near))) if len(near) else placed


def _random(look: Lookups) -> None:
    while True:
        look.time_s(look.random())


def _glance(look: Lookups) -> None:
    for placed in look.problem.by_glance():
        look.time_s(placed)


def _anneal(look: Lookups) -> None:
    """Walks side by side from the best of random plans; a worst one gives way to a best one."""
    count = max(1, min(look.max_evaluations // _LOOKUPS_OF_A_WALK, 16))
    drawn = [look.random() for _ in range(max(int(_SHARE_OF_STARTS * look.max_evaluations), 1))]
    walkers = sorted(dict.fromkeys(drawn), key=look.time_s)[:count]
    before = len(look.known)
    for number in range(1 << 30):
        share = (len(look.known) - before) / max(look.max_evaluations - before, 1)
        temperature = _HOTTEST * (_COLDEST / _HOTTEST) ** share
        for place, here in enumerate(walkers):
            there = look.mutated(here)
            loss = look.time_s(there) / look.time_s(here) - 1
            if loss <= 0 or look.rng.random() < math.exp(-loss / temperature):
                walkers[place] = there
        if number % 20 == 19:
            walkers.sort(key=look.time_s)
            quarter = len(walkers) // 4
            walkers = walkers[: len(walkers) - quarter] + walkers[:quarter]


def _genetic(look: Lookups) -> None:
    rng = look.rng
    count = min(_POPULATION, max(4, look.max_evaluations // 4))
    people = [look.random() for _ in range(count)]
    while True:
        people.sort(key=look.time_s)
        children = people[:2]
        while len(children) < count:
            one, other = (people[int(rng.integers(count, size=3).min())] for _ in range(2))
            child = _crossed(look, one, other)
            while rng.random() < _MUTATION or (child in look.known and rng.random() < 0.8):
                child = look.mutated(child)
            look.time_s(child)
            children.append(child)
        people = children


def _crossed(look: Lookups, one: Placed, other: Placed) -> Placed:
    problem, rng = look.problem, look.rng

    def either(first: int, second: int) -> int:
        return first if rng.random() < 0.5 else second

    takes = rng.random(problem.scaled.shape[1]) < 0.5
    row = problem.nearest(np.where(takes, problem.scaled[one.row], problem.scaled[other.row]))
    variants = tuple(map(either, one.variants, other.variants))
    return Placed(row=row, variants=variants, cut=either(one.cut, other.cut))


def _cma(look: Lookups) -> None:
    cma: Any = importlib.import_module("cma")

    problem = look.problem
    num_sizes = problem.scaled.shape[1]
    shape = np.array(problem.instance.room_shape)
    worst_s = 0.0
    while True:
        start = look.random()
        worst_s = max(worst_s, look.time_s(start))
        middle = (np.array([*start.variants, start.cut]) + 0.5) / shape
        search = cma.CMAEvolutionStrategy(
            np.concatenate([problem.scaled[start.row], middle]),
            0.3,
            {"bounds": [0, 1], "verbose": -9, "seed": int(look.rng.integers(1, 2**31))},
        )
        while not search.stop():
            points = search.ask()
            times = []
            for point in points:
                numbers = np.minimum((point[num_sizes:] * shape).astype(int), shape - 1).tolist()
                row = problem.nearest(point[:num_sizes])
                placed = Placed(row=row, variants=tuple(numbers[:-1]), cut=numbers[-1])
                times.append(look.time_s(placed))
            worst_s = max([worst_s, *(each for each in times if math.isfinite(each))])
            search.tell(points, [math.log(min(each, 2 * worst_s)) for each in times])


_SEARCHERS: dict[str, Callable[[Lookups], None]] = {
    "random": _random,
    "glance": _glance,
    "annealing": _anneal,
    "genetic": _genetic,
    "cma": _cma,
}
_DETERMINISTIC = ("glance", "local")
_BY_BUDGET = ("annealing", "genetic")
"""Their plans depend on how much may be looked up: each budget is a search of its own."""


def available() -> tuple[str, ...]:
    """Names of the searchers."""
    return (*_SEARCHERS, "local")


def is_random(name: str) -> bool:
    """Whether seeds make a difference."""
    return name not in _DETERMINISTIC


def best_by_budget(name: str, problem: Problem, budgets: Sequence[int], *, seed: int) -> FloatArray:
    """(budgets,) least times that a searcher finds with so many evaluations; deterministic."""
    if name == "local":
        return _local(problem, budgets)
    if name in _BY_BUDGET:
        return np.array([_curve(name, problem, budget, seed)[-1] for budget in budgets])
    curve = _curve(name, problem, max(budgets), seed)
    return np.array([curve[min(budget, len(curve)) - 1] for budget in budgets])


def _local(problem: Problem, budgets: Sequence[int]) -> FloatArray:
    look = Lookups(problem, 1 << 30, seed=0)
    first = next(plan for plan in problem.by_glance() if math.isfinite(look.time_s(plan)))
    before = len(look.known) - 1
    found = [
        improve(problem.instance, [first], max_evaluations=budget - before).time_s
        if budget > before
        else math.inf
        for budget in budgets
    ]
    return np.array(found)


def _curve(name: str, problem: Problem, budget: int, seed: int) -> list[float]:
    look = Lookups(problem, budget, seed)
    with suppress(_UsedUpError):
        _SEARCHERS[name](look)
    return look.curve
