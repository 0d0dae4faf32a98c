"""Operator-level planning: how each operator of each segment class is sharded, by ILP.

For a skeleton, the axes inside a stage that may shard anything (``tp``, ``cp``, ``ep``) are free;
the batch axes shard the batch. One integer program over the choice graph of all segment classes
(equal segments solved once) finds the fastest choice within a memory bound, forward and backward,
compute, collectives and redistributions together. What passes between segments is chosen with the
rest, so segments join without further redistribution than the program has paid for. With several
prices of memory, and what passes between segments held to one layout after the other, it gives a
Pareto set over time, memory and boundary.

Nothing here knows what a head or a vocabulary is: labels are only what a plan calls the classes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.cost.roofline import Roofline
from meshwright.errors import PlanRefused
from meshwright.graph.dimensions import BATCH
from meshwright.plans.plan import Recompute
from meshwright.solvers.boundaries import Boundary, Labels, boundaries_of
from meshwright.solvers.choices import ChoiceGraph
from meshwright.solvers.operator_labels import shardings_of_picks
from meshwright.solvers.segment_graph import choice_graph
from meshwright.solvers.segment_ilp import GraphChoice, SegmentProgram
from meshwright.solvers.segment_prices import ChoicePrices
from meshwright.solvers.wiring import Wiring
from meshwright.space.decision import Sharding, Skeleton
from meshwright.space.search import SearchContext
from meshwright.space.segment_costs import split_of_skeleton
from meshwright.spmd.layout import MICRO

__all__ = ["OperatorPlan", "OperatorProblem", "operator_shardings"]

FREE_AXES = ("cp", "ep", "tp")

_PRICE_STEPS = (0.0, 0.3, 3.0)
"""Prices of memory: what all bytes of the fastest choice cost, relative to its time."""

_TIME_LIMIT_S = 20.0
"""Of one integer program; the best so far counts where it is not proven best."""

_MANY_EXCEPTIONS = 12
"""Lists that so many operators depart from are not priced without their exceptions."""

_WORTH = 1e-3
"""Exceptions must make the step faster by this share, or the plain lists stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorPlan:
    """One solution: what the program expects, and how a plan says it."""

    sharding: Sharding
    program_s: float
    """Seconds of a step's segments by the integer program, all stages in turn."""
    bound_s: float
    """No choice is faster, by the same program."""
    exact_s: float
    """The same by the cost table of ``sharding``: every micro-batch's operators and
    redistributions, without what is done once in a step."""
    repeated_s: float
    """Of ``program_s`` what every micro-batch repeats, comparable with ``exact_s``."""
    memory_bytes: float
    """Of all segments: parameters, their state, kept activations."""
    is_proven: bool


class OperatorProblem:
    """The choices of one skeleton, to be solved for several memory bounds."""

    def __init__(
        self,
        context: SearchContext,
        skeleton: Skeleton,
        *,
        zero_stage: int = 0,
        allowed: Mapping[str, frozenset[str] | None] | None = None,
        wiring: Wiring | None = None,
    ) -> None:
        """Build the program.

        Args:
            context: graph, cluster and job.
            skeleton: mesh, stages and micro-batches.
            zero_stage: of all parameters.
            allowed: labels each free axis may shard; all of them where it is not named.
            wiring: of the graph, where the caller has it already.
        """
        self.context, self.skeleton = context, skeleton
        sizes = skeleton.sizes
        self.free = tuple(axis for axis in FREE_AXES if sizes[axis] > 1)
        self.background = {axis: (BATCH,) for axis in ("dp_replicate", "dp_shard")}
        model = context.model
        self.graph: ChoiceGraph = choice_graph(
            model.analysis,
            model.segmentation,
            model.labels,
            axis_sizes={**sizes, MICRO: skeleton.num_microbatches},
            background=self.background,
            allowed={axis: (allowed or {}).get(axis) for axis in self.free},
            wiring=wiring,
        )
        self.prices = ChoicePrices(
            self.graph,
            roofline=slowest_roofline(context),
            prices=model.pricer.prices,
            optimizer=context.job.optimizer,
            calibration=model.pricer.calibration,
            zero_stage=zero_stage,
            num_stages=skeleton.num_stages,
            is_rounded=model.pricer.is_rounded,
        )
        flight = min(skeleton.num_stages, skeleton.num_microbatches)
        self.program = SegmentProgram(self.graph, self.prices, micro_batches_in_flight=flight)

    def solve(
        self, *, memory_bytes: float | None = None, time_limit_s: float | None = _TIME_LIMIT_S
    ) -> GraphChoice | None:
        """The fastest choice within a bound on all segments' bytes."""
        if memory_bytes is None:
            return self.program.solve(time_limit_s=time_limit_s)
        return self.program.solve_within(memory_bytes, time_limit_s=time_limit_s)

    def pareto(
        self, *, at_most: int = 3, deadline_s: float | None = None, boundary: Boundary | None = None
    ) -> tuple[GraphChoice, ...]:
        """Choices none of which is both faster and leaner than another, fastest first.

        They lie on the lower convex hull of time over memory: each is the best at some price, of
        all choices or of those with one ``boundary``.
        """
        found: list[GraphChoice] = []
        allowed = {} if boundary is None else boundary.allowed
        price = 0.0
        for step in _PRICE_STEPS[:at_most]:
            if deadline_s is not None and time.monotonic() > deadline_s:
                break
            if found:
                price = step * found[0].step_s / found[0].memory_bytes
            choice = self.program.solve(
                memory_price=price, allowed=allowed, time_limit_s=_left(deadline_s)
            )
            if choice is not None and choice.picks not in {other.picks for other in found}:
                found.append(choice)
        return tuple(found)

    def pareto_of_boundaries(
        self, *, at_most: int = 2, deadline_s: float | None = None
    ) -> dict[Labels, tuple[GraphChoice, ...]]:
        """The Pareto set over time, memory and boundary: ``pareto`` for each boundary."""
        found = {}
        for boundary in boundaries_of(self.graph):
            choices = self.pareto(at_most=at_most, deadline_s=deadline_s, boundary=boundary)
            if choices:
                found[boundary.labels] = choices
        return found

    def plan(self, choice: GraphChoice, *, name: str = "ilp") -> OperatorPlan:
        """The choice as a plan says it: with exceptions where they make it faster.

        Raises:
            PlanRefused: no way of saying it can be sharded so.
        """
        ways = shardings_of_picks(self.graph, choice.picks, self.background, name=name)
        if sum(len(every) for every in ways[0].operators_by_class) > _MANY_EXCEPTIONS:
            ways = ways[:1]
        priced: list[tuple[float, Sharding]] = []
        refusal: PlanRefused | None = None
        for sharding in ways:
            try:
                priced.append((self.exact_s(sharding), sharding))
            except PlanRefused as error:
                refusal = error
        if not priced:
            assert refusal is not None
            raise refusal
        best_s = min(exact_s for exact_s, _ in priced)
        # The ways come with all exceptions first and with none last.
        exact_s, sharding = [p for p in priced if p[0] <= best_s * (1 + _WORTH)][-1]
        return OperatorPlan(
            sharding=sharding,
            program_s=choice.step_s,
            bound_s=choice.bound_s,
            exact_s=exact_s,
            repeated_s=choice.repeated_s,
            memory_bytes=choice.memory_bytes,
            is_proven=choice.is_proven,
        )

    def exact_s(self, sharding: Sharding) -> float:
        """Seconds a step spends in segments on one rank, launches left out, by the cost table.

        Raises:
            PlanRefused: the graph cannot be sharded so.
        """
        classes = self.context.model.segment_classes
        exceptions = sharding.operators_by_class
        table = self.context.model.table_of_segments(
            [sharding.labels_of(number) for number in classes],
            {**self.skeleton.sizes, MICRO: self.skeleton.num_microbatches},
            [{n: dict(labels) for n, labels in exceptions[number]} for number in classes]
            if exceptions
            else (),
        )
        pricer = self.context.model.pricer
        times = table.segment_times(
            split_of_skeleton(self.skeleton),
            (Recompute.NONE,) * table.num_segments,
            roofline=slowest_roofline(self.context),
            prices=pricer.prices,
        )
        launches = times.forward_launch_s + times.backward_launch_s
        return self.skeleton.num_microbatches * float((times.total_s - launches).sum())


def _left(deadline_s: float | None) -> float | None:
    """Seconds for one program; without a deadline its work alone bounds it."""
    if deadline_s is None:
        return None
    return min(_TIME_LIMIT_S, max(deadline_s - time.monotonic(), 0.1))


def slowest_roofline(context: SearchContext) -> Roofline:
    """Of the cluster's devices."""
    return min(context.model.pricer.rooflines.values(), key=lambda r: r.flop_per_s)


def operator_shardings(
    context: SearchContext, skeleton: Skeleton, *, deadline_s: float | None = None
) -> tuple[Sharding, ...]:
    """Shardings of all segment classes on a skeleton's mesh, from operators alone.

    One for each point of the Pareto set over time, memory and what passes between segments (the
    same everywhere, or anything), the fastest first; none where no axis is free or nothing can be
    cut along one.
    """
    if all(skeleton.sizes[axis] == 1 for axis in FREE_AXES):
        return ()
    problem = OperatorProblem(context, skeleton)
    points = [("ilp", choice) for choice in problem.pareto(deadline_s=deadline_s)]
    for labels, choices in problem.pareto_of_boundaries(deadline_s=deadline_s).items():
        name = "+".join(("ilp", *(label for _, label in labels))) if labels else "ilp+whole"
        points += [(name, choice) for choice in choices]
    found: list[Sharding] = []
    for name, choice in sorted(points, key=lambda point: point[1].step_s):
        try:
            plan = problem.plan(choice, name=name)
        except PlanRefused as error:
            context.report(f"operators: {error}")
            continue
        if all(_said(plan.sharding) != _said(other) for other in found):
            found.append(plan.sharding)
    return tuple(found)


def _said(sharding: Sharding) -> tuple[object, ...]:
    return (sharding.by_class, sharding.operators_by_class)
