"""Thousands of plans a second: every strategy priced once for every segment, then sums.

``PlanSpace`` holds what all strategies of one skeleton cost all segments. A plan is then a row of
strategy numbers and the first segments of its stages; ``evaluate`` works on many rows at once, by
the formulas of ``cost.step`` and ``cost.memory`` on sums over stages and the pipeline's closed
form. For one sharding everywhere it agrees with the exact price; mixtures of shardings are
estimated. ``price_decision`` is the exact judge.

Shapes: n plans, V segments, P stages, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshwright.cost.columns import FloatArray, IntArray
from meshwright.cost.framework import with_framework_s
from meshwright.cost.offload import offload_time_s
from meshwright.cost.pipeline import simulate_many
from meshwright.cost.stage_work import beside_gathers, exposed_s
from meshwright.cost.step import StepCost
from meshwright.plans.plan import ScheduleName
from meshwright.plans.runnable import unrunnable_reasons
from meshwright.space.decided import decided_plan
from meshwright.space.decision import Decision, Skeleton, Strategy
from meshwright.space.search import Candidate, SearchContext
from meshwright.space.segment_costs import (
    TIMES,
    SegmentCosts,
    price_segments,
    split_of_skeleton,
)
from meshwright.space.stages import SpaceStages
from meshwright.spmd.parameters import STEP_BYTES

__all__ = ["Evaluated", "PlanSpace", "candidate_of_decision", "price_decision"]

_CHUNK_AMOUNTS = 400_000
"""Amounts looked up at once: about what the processor's cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What plans cost; arrays of shape (n,)."""

    time_s: FloatArray
    excess: FloatArray
    """By how much the fullest stage exceeds its capacity, as a fraction of it; negative: room."""

    @property
    def fits(self) -> NDArray[np.bool_]:
        """(n,) whether every stage fits."""
        return self.excess <= 0.0


class PlanSpace:
    """All plans of one skeleton with some strategies."""

    def __init__(
        self, context: SearchContext, skeleton: Skeleton, strategies: Sequence[Strategy]
    ) -> None:
        """Price every strategy for every segment, in the form the user's pins give it there.

        ``strategies`` come first; further forms of theirs follow.

        Raises:
            PlanRefused: the graph cannot be sharded as one of them wants.
        """
        assert strategies, "at least one strategy"
        self.context = context
        self.skeleton = skeleton
        self.strategies, self._places = context.module_pins.forms(strategies)
        self.costs: SegmentCosts = price_segments(context, skeleton, self.strategies)
        if self._places is not None:
            self.costs = self.costs.in_forms(self._places)
        self.num_segments = self.costs.amounts.shape[0]
        self.num_strategies = len(self.strategies)
        self._split = split_of_skeleton(skeleton)
        self._stages = SpaceStages(context, skeleton, self.costs)
        self._calibration = context.model.pricer.calibration
        self._beside_gathers = beside_gathers(self._calibration)
        self._flat = self.costs.amounts.reshape(-1, self.costs.amounts.shape[2])

    def under(self, schedule: ScheduleName) -> PlanSpace:
        """The same under another schedule; what segments cost is not priced again."""
        is_put_off = ScheduleName.ZB_H1 in (schedule, self.skeleton.schedule)
        skeleton = replace(self.skeleton, schedule=schedule)
        if is_put_off and schedule is not self.skeleton.schedule:
            return PlanSpace(self.context, skeleton, self.strategies)
        found = copy(self)
        found.skeleton = skeleton
        found._stages = SpaceStages(self.context, skeleton, self.costs)
        return found

    @property
    def in_flight(self) -> FloatArray:
        """(P,) most micro-batches each stage holds at once."""
        return self._stages.in_flight

    @property
    def capacity_bytes(self) -> FloatArray:
        """(P,) what a rank of each stage may use."""
        return self._stages.capacity_bytes

    def roofline_of_stage(self, stage: int) -> int:
        """Which of ``costs.rooflines`` a stage's slowest device has."""
        return int(self._stages.roofline[stage])

    def transfer_s(self, assignment: IntArray, starts: IntArray) -> float:
        """Seconds of all transfers between stages of one plan, (1, V) and (P,)."""
        ends = np.append(starts[1:], self.num_segments)
        stage_of = np.repeat(np.arange(len(starts)), ends - starts)[None]
        _, near_s, far_s = self._crossing(assignment, starts[None], stage_of)
        return float(near_s.sum() + far_s.sum())

    def evaluate(
        self, assignment: IntArray, starts: IntArray, *, simulate: bool = True
    ) -> Evaluated:
        """Time and memory of n plans.

        Args:
            assignment: (n, V) number of each segment's strategy.
            starts: (n, P) first segment of each stage, ascending from 0.
            simulate: the schedule; otherwise the pipeline's closed form, faster and a percent off.
        """
        assert assignment.shape[1] == self.num_segments, "one strategy for each segment"
        assert starts.shape == (len(assignment), self.skeleton.num_stages), "one start a stage"
        if self._places is not None:
            assignment = self._places[np.arange(self.num_segments), assignment]
        if not len(assignment):
            return Evaluated(time_s=np.zeros(0), excess=np.zeros(0))
        size = max(1, _CHUNK_AMOUNTS // (self.num_segments * self._flat.shape[1]))
        parts = [
            self._evaluate(assignment[first : first + size], starts[first : first + size])
            for first in range(0, len(assignment), size)
        ]
        times = [
            np.concatenate(found, axis=-2) for found in zip(*(t for t, _ in parts), strict=True)
        ]
        return Evaluated(
            time_s=with_framework_s(
                self._calibration,
                self._pipeline_s(*times, simulate=simulate),
                num_microbatches=self.skeleton.num_microbatches,
                num_devices=self.skeleton.num_stages * self.skeleton.num_devices_per_stage,
            ),
            excess=np.concatenate([excess for _, excess in parts]),
        )

    def decision(self, assignment: IntArray, starts: IntArray) -> Decision:
        """One row as a decision: (V,) strategies, (P,) starts."""
        return Decision(
            skeleton=self.skeleton,
            starts=tuple(int(start) for start in starts),
            strategies=tuple(self.strategies[int(number)] for number in assignment),
        )

    # One chunk ---------------------------------------------------------------------------------

    def _evaluate(
        self, assignment: IntArray, starts: IntArray
    ) -> tuple[tuple[FloatArray, ...], FloatArray]:
        """``_pipeline_s``'s arguments, and the excess."""
        count, num_segments = assignment.shape
        rows = self._flat[assignment + np.arange(num_segments) * self.num_strategies]
        stage_of = np.zeros((count, num_segments), dtype=np.int64)
        plan = np.arange(count)[:, None]
        stage_of[plan, starts[:, 1:]] = 1
        np.cumsum(stage_of, axis=1, out=stage_of)
        for event in self.costs.events:
            parted = stage_of[:, event.before] != stage_of[:, event.after]
            added = event.amounts[assignment[:, event.segment]]
            rows[:, event.segment] += parted[:, None] * added
        self._reshard(rows, assignment)
        kept = self.costs.column("kept")
        later = starts[:, 1:]
        rows[plan, later, kept] += self.costs.kept_again[later, assignment[plan, later]]
        bounds = (starts + plan * num_segments).ravel()
        flat = rows.reshape(count * num_segments, -1)
        sums = np.add.reduceat(flat, bounds, axis=0).reshape(count, starts.shape[1], -1)
        passing, near_s, far_s = self._crossing(assignment, starts, stage_of)
        moment = np.maximum.reduceat(
            self._moments(rows, starts, stage_of, assignment).ravel(), bounds
        ).reshape(starts.shape)
        waiting = self._put_off(assignment, bounds)
        excess = self._excess(sums, moment, passing, assignment, waiting[:, :, -1])
        times = self._stage_times_s(sums, assignment[:, 0], waiting)
        return (*times, *near_s, far_s[:, None]), excess

    def _reshard(self, rows: FloatArray, assignment: IntArray) -> None:
        """Add what lies between neighbors of unequal sharding."""
        found = self.costs.resharding
        if found is None:
            return
        sharding = self.costs.sharding_of[assignment]
        plan, segment = np.nonzero(sharding[:, 1:] != sharding[:, :-1])
        before, after = sharding[plan, segment], sharding[plan, segment + 1]
        extra = found[:, segment + 1, before, after]
        for number in range(len(self.costs.rooflines)):
            place = number * len(TIMES) + TIMES.index("forward_communication_s")
            rows[plan, segment + 1, place] += extra[0]
            rows[plan, segment, place + 1] += extra[1]

    def _put_off(self, assignment: IntArray, bounds: IntArray) -> FloatArray:
        """(n, P, R + 1) of every stage what ``SegmentCosts.put_off`` says of segments."""
        put_off = self.costs.put_off
        count, num_segments = assignment.shape
        if put_off is None:
            return np.zeros((count, len(bounds) // count, len(self.costs.rooflines) + 1))
        rows = put_off[np.arange(num_segments), assignment].reshape(count * num_segments, -1)
        return np.add.reduceat(rows, bounds, axis=0).reshape(count, len(bounds) // count, -1)

    # Time --------------------------------------------------------------------------------------

    def _stage_times_s(
        self, sums: FloatArray, first: IntArray, put_off: FloatArray
    ) -> tuple[FloatArray, ...]:
        """(n, P) seconds of each: forward, backward, its part that can wait; what comes last."""
        costs, stages = self.costs, self._stages
        picked = stages.pick(sums)
        column, hides = costs.column, stages.hides
        once, often = self._reduction_s(sums)

        def exposed(communication_s: FloatArray, beside_s: FloatArray) -> FloatArray:
            return exposed_s(communication_s, beside_s, hides, self._calibration)

        def gathered(name: str, beside_s: FloatArray) -> FloatArray:
            return exposed_s(sums[:, :, column(name)], beside_s, hides, self._beside_gathers)

        there = gathered("forward_gather_s", picked[0])
        back = gathered("backward_gather_s", picked[1])
        there += picked[0::2].sum(axis=0) + costs.free_s[stages.roofline][:, first].T
        often_s = exposed(often, picked[1])
        back += picked[1::2].sum(axis=0) + often_s
        weight_s = np.zeros(back.shape)
        if costs.put_off is not None:
            own = stages.roofline[None, :, None]
            weight_s = np.take_along_axis(put_off, own, axis=2)[:, :, 0] + often_s
        tail_s = exposed(once, picked[1]) + sums[:, :, column("publish_s")]
        tail_s += costs.prologue_s[stages.roofline][:, first].T
        tail_s += sums[:, :, column("step_traffic")] / stages.bytes_per_s
        tail_s += offload_time_s(
            sums[:, :, column("host_link")],
            sums[:, :, column("host_step")],
            link_bytes_per_s=stages.to_host_bytes_per_s,
        )
        tail_s += stages.tied_s(sums[:, :, column("tied")])
        return there, back, np.minimum(weight_s, back), tail_s

    def _pipeline_s(
        self,
        forward_s: FloatArray,
        backward_s: FloatArray,
        weight_s: FloatArray,
        tail_s: FloatArray,
        forward_transfer_s: FloatArray,
        backward_transfer_s: FloatArray,
        far_s: FloatArray,
        *,
        simulate: bool,
    ) -> FloatArray:
        """(n,) seconds of a step; what goes farther than to a neighbor counts in closed form."""
        micro = self.skeleton.num_microbatches
        if simulate and forward_s.shape[1] > 1:
            return simulate_many(
                self.skeleton.schedule,
                forward_s=forward_s,
                backward_s=backward_s,
                num_microbatches=micro,
                forward_transfer_s=forward_transfer_s,
                backward_transfer_s=backward_transfer_s,
                weight_s=weight_s,
                tail_s=tail_s,
            )
        both = forward_s + backward_s
        busiest = both.argmax(axis=1)[:, None]
        # What is put off neither delays the stages that wait nor idles (``closed_form_s``).
        filling = np.maximum(both - 2 * weight_s, 0.0)
        np.put_along_axis(filling, busiest, 0.0, axis=1)
        through_s = filling.sum(axis=1) + micro * both.max(axis=1)
        transfer_s = forward_transfer_s.sum(axis=1) + backward_transfer_s.sum(axis=1)
        return np.asarray(through_s + tail_s.max(axis=1) + transfer_s + far_s[:, 0])

    def _reduction_s(self, sums: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(n, P) seconds of gradients: once a step, and in every micro-batch."""
        found = {False: np.zeros(sums.shape[:2]), True: np.zeros(sums.shape[:2])}
        bucket_bytes = self.skeleton.communication.bucket_bytes
        for place, (is_often, kind, axes, _) in enumerate(self.costs.payloads):
            num_bytes = sums[:, :, self.costs.first_payload + place]
            buckets = np.maximum(np.ceil(num_bytes / bucket_bytes), 1.0)
            found[is_often] += buckets * self.context.model.pricer.prices.time_s(
                kind,
                num_bytes / buckets,
                axes=axes,
                axis_sizes=self._split.sizes,
                num_stages=self._split.num_stages,
            )
        return found[False], found[True]

    def _crossing(
        self, assignment: IntArray, starts: IntArray, stage_of: IntArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """What passes between stages.

        Returns (n, P) bytes each stage sends and receives; (2, n, P - 1) seconds from each stage to
        the next, and back; (n,) seconds of what goes farther.
        """
        costs, stages = self.costs, self._stages
        count, num_stages = starts.shape
        passing = np.zeros(starts.shape)
        near = np.zeros((2, count, num_stages - 1))
        far_s = np.zeros(count)
        if num_stages == 1:
            return passing, near, far_s
        plan, later = np.arange(count), starts[:, 1:]
        sharding = costs.sharding_of[assignment[plan[:, None], later - 1]]
        for phase, cut_bytes in enumerate(costs.cut_bytes):
            near[phase] = cut_bytes[later, sharding]
        passing[:, 1:] += near.sum(axis=0)
        passing[:, :-1] += near.sum(axis=0)
        for skip in costs.crossings:
            source, target = stage_of[:, skip.source], stage_of[:, skip.target]
            parted = stage_of[:, skip.before] != target
            num_bytes = parted * skip.num_bytes[costs.sharding_of[assignment[:, skip.source]]]
            passing[plan, source] += num_bytes
            passing[plan, target] += num_bytes
            is_near = parted & (np.abs(source - target) == 1)
            edge = np.minimum(np.minimum(source, target), num_stages - 2)
            near[int(not skip.is_forward), plan, edge] += is_near * num_bytes
            far_s += np.where(is_near, 0.0, stages.send_s(num_bytes, source, target))
        return passing, stages.send_s(near, np.arange(num_stages - 1)), far_s

    # Memory ------------------------------------------------------------------------------------

    def _moments(
        self, rows: FloatArray, starts: IntArray, stage_of: IntArray, assignment: IntArray
    ) -> FloatArray:
        """(n, V) bytes beyond what a stage always holds while each segment is at work."""
        column = self.costs.column
        plan = np.arange(len(rows))[:, None]
        kept = np.cumsum(rows[:, :, column("kept")], axis=1)
        kept_before = (kept[plan, starts] - rows[plan, starts, column("kept")])[plan, stage_of]

        def made(name: str) -> FloatArray:
            """From the segment, exclusive, to the end of its stage."""
            total = np.cumsum(rows[:, :, column(name)], axis=1)
            ends = np.concatenate([starts[:, 1:], np.full((len(rows), 1), rows.shape[1])], axis=1)
            return np.asarray(total[plan, ends - 1][plan, stage_of] - total)

        forward = rows[:, :, column("transient_forward")].copy()
        backward = rows[:, :, column("transient_backward")].copy()
        if not self._is_in_place:
            backward += made("gradients")
        if self._split.data_parallel > 1 and not self._is_in_place:
            bucket = self.skeleton.communication.bucket_bytes
            is_full = made("local") + rows[:, :, column("local")] >= bucket
            backward += is_full * (bucket * self._copies(assignment))[:, None]
        if self._stages.gathers:
            joined = stage_of[:, 1:] == stage_of[:, :-1]
            there = rows[:, :, column("gathered_forward")]
            back = rows[:, :, column("gathered_backward")]
            forward += there
            forward[:, :-1] += joined * there[:, 1:]
            backward += back
            backward[:, 1:] += joined * back[:, :-1]
        return np.asarray(np.maximum(forward, backward) + kept - kept_before)

    @property
    def _is_in_place(self) -> bool:
        return bool(self.context.model.pricer.calibration.accumulates_in_place)

    def _copies(self, assignment: IntArray) -> FloatArray:
        """(n,) how often a bucket is held: twice where gradients are kept as chunks."""
        chunks = self._stages.keeps_chunks[assignment].any(axis=1)
        return np.where(chunks, 2.0, 1.0)

    def _excess(
        self,
        sums: FloatArray,
        moment: FloatArray,
        passing: FloatArray,
        assignment: IntArray,
        waiting: FloatArray,
    ) -> FloatArray:
        """(n,) peak of the fullest stage over its capacity, less 1."""
        column, stages = self.costs.column, self._stages
        gradients = sums[:, :, column("gradients")]
        always = sums[:, :, column("parameters")] + sums[:, :, column("optimizer")]
        always += self.costs.shared_bytes[assignment[:, :1]]
        kept = sums[:, :, column("kept")]
        computing = moment + passing + stages.held(kept, waiting) - kept
        computing += self.context.model.pricer.allocator_share * computing
        if self.skeleton.num_microbatches > 1 or self._is_in_place:
            computing += gradients
        after = gradients + np.minimum(sums[:, :, column("step")], STEP_BYTES)
        if self._split.data_parallel > 1 and not self._is_in_place:
            bucket = self.skeleton.communication.bucket_bytes
            last = np.minimum(bucket, sums[:, :, column("local")])
            after = np.maximum(after, gradients + self._copies(assignment)[:, None] * last)
        peak = always + np.maximum(computing, after)
        return np.asarray((peak / stages.capacity_bytes).max(axis=1) - 1.0)


# One decision ----------------------------------------------------------------------------------


def price_decision(context: SearchContext, decision: Decision) -> StepCost:
    """The exact price of a decision.

    Raises:
        PlanRefused: the graph cannot be sharded so.
    """
    return context.model.cost(decided_plan(context, decision, solver=""))


def candidate_of_decision(context: SearchContext, decision: Decision, *, solver: str) -> Candidate:
    """The decision as a plan with its exact price.

    Raises:
        PlanRefused: the graph cannot be sharded so.
    """
    plan = decided_plan(context, decision, solver=solver)
    plan = msgspec.structs.replace(plan, unrunnable=unrunnable_reasons(plan))
    return Candidate(plan=plan, cost=context.model.cost(plan), solver=solver)
