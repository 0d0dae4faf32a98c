"""A look at all skeletons: what each may take at least, and its best uniform plan.

``estimate_s`` is what a skeleton's segments take with their best sharding and nothing computed
twice, evenly cut into stages: memory, data parallelism and transfers left out. Skeletons are tried
in this order until the estimate of the next is no less than the best plan found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from meshwright.cost.columns import FloatArray, IntArray
from meshwright.errors import PlanRefused
from meshwright.plans.plan import Recompute
from meshwright.space.bounds import time_lower_bound_s
from meshwright.space.decision import Decision, Sharding, Skeleton, Strategy
from meshwright.space.evaluate import Evaluated, PlanSpace
from meshwright.space.linear import LinearCosts, linear_costs
from meshwright.space.partition import StageBytes, least_bottleneck
from meshwright.space.resharding import table_of_shardings
from meshwright.space.search import SearchContext
from meshwright.space.segment_costs import split_of_skeleton, stage_rooflines
from meshwright.space.skeletons import WITH_RING, shardings_for, skeletons, strategies_for

__all__ = ["Scope", "Survey", "Surveyed", "Uniform", "everything", "narrow", "scope_of", "survey"]

Scope = Callable[[Skeleton, Sharding | None], bool]
"""Whether a way of sharding is looked at; with ``None``, whether the skeleton is at all."""


_IDLE_BELOW = 0.3
"""Leaving devices idle is tried where all of them would spend less of the best plan's time at their
data sheet's rates."""

_USEFUL = frozenset({"plain", "tensor", "tensor+sequence"})
"""Ways of sharding worth having everywhere: the others are another mesh, or idle devices."""


def everything(_: Skeleton, sharding: Sharding | None) -> bool:
    """The scope of ``-O2``."""
    return sharding is None or sharding.name.removesuffix(WITH_RING) in _USEFUL


def scope_of(context: SearchContext) -> Scope:
    """The scope of the context's level; what a pin asks for is in every scope."""
    pins = context.pins
    is_asked = pins.asks_for("cp") or pins.asks_for("ep") or pins.num_microbatches is not None
    return everything if context.level == "O2" or is_asked else narrow


def narrow(skeleton: Skeleton, sharding: Sharding | None) -> bool:
    """The scope of ``-O1``: no context parallelism, and expert parallelism in few forms.

    With experts cut, every number of micro-batches has a table of its own.
    """
    sizes, micro = skeleton.sizes, skeleton.num_microbatches
    if sizes["ep"] > 1 and (sizes["dp_replicate"] > 1 or micro not in (1, 4 * skeleton.num_stages)):
        return False
    return sizes["cp"] == 1 and everything(skeleton, sharding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """A plan whose segments all do the same."""

    time_s: float
    excess: float
    decision: Decision

    @property
    def fits(self) -> bool:
        """Every stage fits."""
        return self.excess <= 0.0

    @property
    def strategy(self) -> Strategy:
        """What its segments do."""
        return self.decision.strategies[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """A skeleton before anything is decided on it."""

    skeleton: Skeleton
    shardings: tuple[Sharding, ...]
    estimate_s: float


@dataclass(slots=True, kw_only=True)
class Survey:
    """What a look around found."""

    skeletons: list[Surveyed] = field(default_factory=list)
    """All, by estimate."""
    uniform: list[Uniform] = field(default_factory=list)
    """Of the skeletons tried; the best of each."""
    evaluations: int = 0
    is_complete: bool = True
    """No skeleton was left out for lack of time."""
    notes: dict[str, str] = field(default_factory=dict)
    """Why a way of sharding is not among them."""

    @property
    def fitting(self) -> list[Uniform]:
        """Uniform plans that fit, fastest first."""
        return sorted((u for u in self.uniform if u.fits), key=lambda u: u.time_s)

    @property
    def bound_s(self) -> float | None:
        """No plan on these skeletons is faster, whatever its segments do."""
        return min((item.estimate_s for item in self.skeletons), default=None)

    @property
    def best_s(self) -> float:
        """Time of the fastest uniform plan that fits."""
        return min((u.time_s for u in self.uniform if u.fits), default=float("inf"))


def survey(
    context: SearchContext, *, within: Scope | None = None, deadline_s: float | None = None
) -> Survey:
    """Look at every skeleton the pins allow.

    Args:
        context: what to plan.
        within: ways of sharding to look at; all by default.
        deadline_s: ``time.monotonic()`` after which to return what there is.
    """
    found = Survey()
    _tour(context, skeletons(context), within, found, deadline_s)
    if time_lower_bound_s(context) < _IDLE_BELOW * found.best_s:
        _tour(context, skeletons(context, leave_idle=True), within, found, deadline_s)
    return found


def _tour(
    context: SearchContext,
    every: Iterator[Skeleton],
    within: Scope | None,
    found: Survey,
    deadline_s: float | None,
) -> None:
    """Look at skeletons, then price uniform plans on those that may beat what was found."""
    looked = [
        item
        for skeleton in every
        if within is None or within(skeleton, None)
        for item in _looked_at(context, skeleton, within, found)
    ]
    looked.sort(key=lambda item: item.estimate_s)
    found.skeletons = sorted(found.skeletons + looked, key=lambda item: item.estimate_s)
    best_s = found.best_s
    for item in looked:
        if item.estimate_s >= best_s:
            break
        if deadline_s is not None and time.monotonic() > deadline_s:
            found.is_complete = False
            break
        for uniform in _uniform(context, item, found, best_s):
            found.uniform.append(uniform)
            if uniform.fits:
                best_s = min(best_s, uniform.time_s)


def _looked_at(
    context: SearchContext, skeleton: Skeleton, within: Scope | None, found: Survey
) -> Iterator[Surveyed]:
    shardings = [
        sharding
        for sharding in shardings_for(context, skeleton)
        if within is None or within(skeleton, sharding)
    ]
    split = split_of_skeleton(skeleton)
    # The fastest type of device stands for all: the estimate must not be too high.
    roofline = max(stage_rooflines(context, skeleton), key=lambda r: r.flop_per_s)
    policies = (Recompute.NONE,) * len(context.model.segment_classes)
    totals: list[FloatArray] = []
    usable = []
    for sharding in shardings:
        try:
            table = table_of_shardings(context, skeleton, (sharding,) * len(policies))
        except PlanRefused as error:
            found.notes.setdefault(sharding.name, str(error))
            continue
        times = table.segment_times(
            split, policies, roofline=roofline, prices=context.model.pricer.prices
        )
        totals.append(times.total_s)
        usable.append(sharding)
    if not usable:
        return
    micro, count = skeleton.num_microbatches, skeleton.num_stages
    work_s = float(np.min(totals, axis=0).sum())
    yield Surveyed(
        skeleton=skeleton,
        shardings=tuple(usable),
        estimate_s=work_s / (1 - (1 - 1 / micro) ** count),
    )


def _uniform(
    context: SearchContext, item: Surveyed, found: Survey, best_s: float
) -> Iterator[Uniform]:
    """The best plan of each sharding that fits, or the one nearest to it."""
    every = strategies_for(context, item.skeleton)
    for sharding in item.shardings:
        mine = [strategy for strategy in every if strategy.sharding == sharding]
        # Offload only ever costs time: it is for what would be faster but does not fit without.
        wanting: list[Strategy] = []
        strategies = [strategy for strategy in mine if not strategy.offload]
        limit_s = best_s
        if strategies:
            space = PlanSpace(context, item.skeleton, strategies)
            for uniform in _best_cuts(space, best_s, found, wanting):
                limit_s = min(limit_s, uniform.time_s if uniform.fits else limit_s)
                yield uniform
        able = [strategy for strategy in mine if strategy.offload]
        if strategies:
            able = [strategy for strategy in able if replace(strategy, offload=False) in wanting]
        if able:
            space = PlanSpace(context, item.skeleton, able)
            yield from _best_cuts(space, limit_s, found, [])


def _best_cuts(
    space: PlanSpace, best_s: float, found: Survey, wanting: list[Strategy]
) -> Iterator[Uniform]:
    """The best uniform plan of a space on stages of equal time, and on stages cut by memory.

    ``wanting`` receives the strategies that are faster than the best plan but do not fit.
    """
    num_stages = space.skeleton.num_stages
    costs = linear_costs(space)
    cut = least_bottleneck(costs.time_s[:, 0].tolist(), num_stages)
    if cut is None:
        return
    numbers = np.arange(space.num_strategies)
    priced = _priced(space, numbers, [cut] * len(numbers), found)
    best = _best(space, numbers, [cut] * len(numbers), priced)
    yield best
    limit_s = min(best_s, best.time_s if best.fits else best_s)
    too_large = np.flatnonzero((priced.excess > 0) & (priced.time_s < limit_s)).tolist()
    wanting += [space.strategies[number] for number in too_large]
    if num_stages == 1:
        return
    # Stages cut by memory may make something faster fit.
    roomier = {number: _cut_by_memory(space, costs, number) for number in too_large}
    able = [number for number, other in roomier.items() if other not in (None, cut)]
    if able:
        chosen, cuts = np.array(able), [roomier[number] for number in able]
        yield _best(space, chosen, cuts, _priced(space, chosen, cuts, found))


_Cuts = Sequence[tuple[int, ...] | None]


def _priced(space: PlanSpace, numbers: IntArray, cuts: _Cuts, found: Survey) -> Evaluated:
    """Some strategies, each everywhere and with its stages."""
    assignment = np.repeat(numbers[:, None], space.num_segments, axis=1)
    found.evaluations += len(numbers)
    return space.evaluate(assignment, np.array(cuts, dtype=np.int64), simulate=False)


def _best(space: PlanSpace, numbers: IntArray, cuts: _Cuts, priced: Evaluated) -> Uniform:
    # Strategies are sorted from the simplest; of equals the first wins.
    order = np.lexsort((numbers, priced.time_s, np.maximum(priced.excess, 0.0)))
    first = int(order[0])
    starts = np.array(cuts[first], dtype=np.int64)
    return Uniform(
        time_s=float(priced.time_s[first]),
        excess=float(priced.excess[first]),
        decision=space.decision(np.full(space.num_segments, numbers[first]), starts),
    )


def _cut_by_memory(space: PlanSpace, costs: LinearCosts, number: int) -> tuple[int, ...] | None:
    """Stages that hold what one strategy brings, if that can be."""
    spare = float(costs.spare_bytes[:, number].max()) + float(space.costs.shared_bytes[number])
    memory = StageBytes(
        fixed_bytes=costs.fixed_bytes[:, number].tolist(),
        kept_bytes=costs.kept_bytes[:, number].tolist(),
        in_flight=space.in_flight.astype(int).tolist(),
        capacity_bytes=float(space.capacity_bytes.min()) - spare,
    )
    return least_bottleneck(costs.time_s[:, number].tolist(), space.skeleton.num_stages, memory)
