"""The best mixture on given stages as an integer program: a plan and a bound.

With one way of sharding the order of segments inside a stage costs nothing, so equal segments are
counted, not told apart. For stage p, kind k (equal rows of costs) and strategy s::

    n(p, k, s)      segments, integer; sum over s = the stage's segments of the kind
    total(p)        sum of n times seconds of a micro-batch, and what is exposed of gathers and of
                    reductions in every micro-batch
    exposed         at least 0.19 of it, at least all but what 0.8 of the compute beside it hides
                    (``cost.stage_work``): both are linear, so their maximum is exact
    minimize        sum of total(p) + (M - 1) slowest + latest tail + transfers
    memory(p)       while the last segment works, and while the optimizer steps: within capacity

Gradients are reduced in buckets; a last bucket that is not full counts by its share, so the optimum
is a lower bound of the closed form. The plan's memory adds the largest transient of any segment
that is used, so that it fits; what the evaluation still finds missing is taken off the capacity.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from meshwright.cost.calibration import Calibration
from meshwright.cost.columns import FloatArray, IntArray
from meshwright.cost.stage_work import beside_gathers, overlap_terms
from meshwright.solvers.ilp import IntegerProgram
from meshwright.solvers.mixture import Mixture
from meshwright.space.evaluate import PlanSpace
from meshwright.space.linear import bucket_seconds, step_seconds
from meshwright.space.segment_costs import TIMES
from meshwright.spmd.parameters import STEP_BYTES

__all__ = ["IntegerMixture", "integer_mixture"]

_ROUNDS = 3


@dataclass(frozen=True, slots=True, eq=False)
class IntegerMixture:
    """What the programs found."""

    mixture: Mixture | None
    bound_s: float
    """No mixture on these stages is faster by the closed form."""
    evaluations: int


def integer_mixture(
    space: PlanSpace,
    starts: IntArray,
    *,
    time_limit_s: float | None = 5.0,
    relative_gap: float = 1e-4,
    spare: float = 0.0,
) -> IntegerMixture:
    """The best mixture on the stages that begin at ``starts`` (P,).

    Args:
        space: with one way of sharding.
        starts: first segment of each stage.
        time_limit_s: for each of a few programs; ``None``: bounded by their work alone.
        relative_gap: to the bound at which a program stops.
        spare: fraction of the capacity that the mixture, not the bound, leaves free.
    """
    assert len(space.costs.shardings) == 1, "one way of sharding"
    until_s = math.inf if time_limit_s is None else time.monotonic() + 2 * time_limit_s
    bound = _Program(space, starts, is_bound=True).minimize(time_limit_s, relative_gap)
    best: Mixture | None = None
    room, evaluations = 1.0 - spare, 0
    for _ in range(_ROUNDS):
        program = _Program(space, starts, is_bound=False, room=room)
        assignment = program.minimize(time_limit_s, relative_gap)[1]
        if assignment is None:
            break
        found = space.evaluate(assignment[None], starts[None], simulate=False)
        evaluations += 1
        excess = float(found.excess[0]) + spare
        mixture = Mixture(assignment, starts, float(found.time_s[0]), excess)
        if best is None or mixture.rank < best.rank:
            best = mixture
        if mixture.fits or time.monotonic() > until_s:
            break
        room *= 1 - min(mixture.excess + 1e-3, 0.5)
    return IntegerMixture(mixture=best, bound_s=bound[0], evaluations=evaluations)


class _Program:
    """One integer program; see the module docstring."""

    def __init__(
        self, space: PlanSpace, starts: IntArray, *, is_bound: bool, room: float = 1.0
    ) -> None:
        self.space, self.costs, self.starts = space, space.costs, starts
        self.is_bound = is_bound
        self.program = IntegerProgram()
        self.micro = space.skeleton.num_microbatches
        ends = [*starts[1:].tolist(), space.num_segments]
        self.slowest = self.program.variable(
            cost=self.micro - 1.0, upper=math.inf, is_integer=False
        )
        self.latest = self.program.variable(cost=1.0, upper=math.inf, is_integer=False)
        self.constant_s = self._transfer_s()
        self.counts: list[list[tuple[IntArray, list[int]]]] = []
        for stage, (start, end) in enumerate(zip(starts.tolist(), ends, strict=True)):
            self.counts.append(self._stage(stage, start, end, room))

    def _transfer_s(self) -> float:
        """What passes between stages does not depend on the strategies."""
        passing = self.space.transfer_s(np.zeros((1, self.space.num_segments), int), self.starts)
        return float(passing)

    def _stage(
        self, stage: int, start: int, end: int, room: float
    ) -> list[tuple[IntArray, list[int]]]:
        space, program = self.space, self.program
        own = self.costs.amounts[start:end]
        _, first, kind = np.unique(
            own.reshape(len(own), -1), axis=0, return_index=True, return_inverse=True
        )
        kind = kind.reshape(-1)
        counts = []
        for number in range(len(first)):
            where = start + np.flatnonzero(kind == number)
            variables = [
                program.variable(upper=float(len(where))) for _ in range(space.num_strategies)
            ]
            program.row(((v, 1.0) for v in variables), lower=len(where), upper=len(where))
            counts.append((where, variables))
        self._time(stage, counts)
        self._memory(stage, counts, room)
        return counts

    def _terms(
        self, counts: list[tuple[IntArray, list[int]]], amount: FloatArray
    ) -> list[tuple[int, float]]:
        """Sum of ``amount`` (V, S) over the stage."""
        return [
            (variable, float(seconds))
            for where, variables in counts
            for variable, seconds in zip(variables, amount[where[0]], strict=True)
        ]

    # Time --------------------------------------------------------------------------------------

    def _time(self, stage: int, counts: list[tuple[IntArray, list[int]]]) -> None:
        program, costs = self.program, self.costs
        amounts = costs.amounts
        roofline = self.space.roofline_of_stage(stage)
        first = roofline * len(TIMES)
        times = np.moveaxis(amounts[:, :, first : first + len(TIMES)], 2, 0)
        often, once = bucket_seconds(self.space)
        column = costs.column
        hides = costs.rooflines[roofline].queue_runs_ahead
        usual = self.space.context.model.pricer.calibration
        gathers = beside_gathers(usual)
        parts = [
            (amounts[:, :, column("forward_gather_s")], times[0], gathers),
            (amounts[:, :, column("backward_gather_s")], times[1], gathers),
            (often, times[1], usual),
        ]
        exposed = [self._exposed(counts, c, beside, hides, by) for c, beside, by in parts]
        total = self._terms(counts, times.sum(axis=0)) + [(v, 1.0) for v in exposed]
        for variable, seconds in total:
            program.add_cost(variable, seconds)
        self.constant_s += float(costs.free_s[roofline].min())
        free_s = float(costs.free_s[roofline].min())
        program.row([(self.slowest, 1.0), *((v, -s) for v, s in total)], lower=free_s)
        late = self._exposed(counts, once, times[1], hides, usual)
        tail = self._terms(counts, step_seconds(self.space, roofline))
        prologue_s = float(costs.prologue_s[roofline].min())
        program.row(
            [(self.latest, 1.0), (late, -1.0), *((v, -s) for v, s in tail)], lower=prologue_s
        )

    def _exposed(
        self,
        counts: list[tuple[IntArray, list[int]]],
        communication_s: FloatArray,
        beside_s: FloatArray,
        hides: bool,
        calibration: Calibration,
    ) -> int:
        """A variable for what a stage's communication adds beside its compute."""
        program = self.program
        exposed = program.variable(upper=math.inf, is_integer=False)
        spoken = self._terms(counts, communication_s)
        if not hides:
            program.row([(exposed, 1.0), *((v, -s) for v, s in spoken)], lower=0.0)
            return exposed
        longer, gain = overlap_terms(calibration)
        least = 1 - gain * longer
        program.row([(exposed, 1.0), *((v, -least * s) for v, s in spoken)], lower=0.0)
        behind = gain * calibration.overlap_fraction * beside_s - communication_s
        program.row([(exposed, 1.0), *self._terms(counts, behind)], lower=0.0)
        return exposed

    # Memory ------------------------------------------------------------------------------------

    def _memory(self, stage: int, counts: list[tuple[IntArray, list[int]]], room: float) -> None:
        """Shares of the stage's capacity."""
        space, costs, program = self.space, self.costs, self.program
        capacity = float(space.capacity_bytes[stage])
        amounts, column = costs.amounts / capacity, costs.column

        def of(name: str) -> FloatArray:
            return np.asarray(amounts[:, :, column(name)])

        shared = float(costs.shared_bytes.min()) / capacity
        always = of("parameters") + of("optimizer")
        working = always + float(space.in_flight[stage]) * of("kept")
        if self.micro > 1:
            working = working + of("gradients")
        spare = np.maximum(
            of("transient_forward") + of("gathered_forward"),
            of("transient_backward") + of("gathered_backward"),
        )
        last = max(int(where[-1]) for where, _ in counts)
        terms = self._terms(counts, working)
        if self.is_bound:
            program.row(terms, upper=1.0 - shared - float(spare[last].min()))
        else:
            self._spare(counts, spare, terms, room - shared)
        after, step = always + of("gradients"), of("step")
        share = STEP_BYTES / capacity
        if sum(len(where) * float(step[where[0]].max()) for where, _ in counts) <= share:
            program.row(self._terms(counts, after + step), upper=room - shared)
        else:
            # The lesser of the sum and ``STEP_BYTES``: none for a bound, all of it for a plan.
            spent = 0.0 if self.is_bound else share
            program.row(self._terms(counts, after), upper=room - shared - spent)

    def _spare(
        self,
        counts: list[tuple[IntArray, list[int]]],
        spare: FloatArray,
        terms: list[tuple[int, float]],
        room: float,
    ) -> None:
        """Room for the largest transient of the strategies that are used."""
        program = self.program
        largest = program.variable(upper=math.inf, is_integer=False)
        for where, variables in counts:
            least = float(spare[where[0]].min())
            program.row([(largest, 1.0)], lower=least)
            for variable, amount in zip(variables, spare[where[0]], strict=True):
                if amount > least * (1 + 1e-6) + 1e-6:
                    used = program.variable()
                    program.row([(used, float(len(where))), (variable, -1.0)], lower=0.0)
                    program.row([(largest, 1.0), (used, -float(amount))], lower=0.0)
        program.row([*terms, (largest, 1.0)], upper=room)

    # Solving -----------------------------------------------------------------------------------

    def minimize(self, time_limit_s: float | None, gap: float) -> tuple[float, IntArray | None]:
        """Bound in seconds, and the strategies of the solution."""
        found = self.program.minimize(time_limit_s=time_limit_s, relative_gap=gap)
        bound_s = found.bound + self.constant_s
        if not found.is_found:
            return bound_s, None
        assignment = np.zeros(self.space.num_segments, dtype=np.int64)
        for counts in self.counts:
            for where, variables in counts:
                numbers = found.values[variables].astype(int)
                assignment[where] = np.repeat(np.arange(len(variables)), numbers)
        return bound_s, assignment
