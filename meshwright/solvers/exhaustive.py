"""Every uniform plan: tensor, sequence, pipeline and data parallel, ZeRO, micro-batches, recompute.

The space is the product of

* ``tp`` up to a host, where some dimension divides; sequence parallel with it or not;
* ``pp``: every number of stages that divides the devices left, cut by ``partition``;
* data parallel over the rest, as far as the batch divides; ZeRO 0, or 1 to 3 over all of it or over
  what a host holds;
* every number of micro-batches; recompute none, selective, full.

Each is priced by table look-ups with the pipeline's closed form; the best ``_SHORTLIST`` are then
simulated under 1F1B and GPipe.

The sequence-parallel tables of a large graph are built only for the tensor sizes that came out
best without, to save the time of building them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from meshwright.errors import PlanRefused
from meshwright.plans.plan import Recompute, ScheduleName
from meshwright.solvers.base import Candidate, SearchContext, SolveResult, SolveStatus
from meshwright.solvers.partition import StageBytes, least_bottleneck
from meshwright.solvers.space import (
    UniformChoice,
    candidate_of,
    choice_on_segments,
    divisors,
    largest_divisor,
    price,
    stage_times_s,
    table_of,
    tensor_parallel_sizes,
)
from meshwright.spmd.schedule import num_in_flight

__all__ = ["Exhaustive"]

_SHORTLIST = 12
_PROMISING = 1.1
"""Choices that do not fit are cut anew by memory where they are at most this much slower than the
best that fits."""
_PRUNE = 1.3
"""A choice is left out where its segments' own work takes this much longer than the best found."""

_HOPELESS = 2.0
"""Stages cut anew cannot help where parameters and their state exceed the capacity so much."""

_LARGE_GRAPH_OPS = 6000
_SEQUENCE_SIZES = 2
"""Tensor-parallel sizes a large graph gets sequence-parallel tables for."""


@dataclass(slots=True)
class _State:
    """The mutable part of one search."""

    deadline_s: float | None
    evaluations: int = 0
    fits: list[tuple[float, tuple[int, ...], UniformChoice]] = field(default_factory=list)
    fewest_bytes: tuple[float, UniformChoice] | None = None
    notes: dict[str, str] = field(default_factory=dict)
    stopped: bool = False
    best_s: float = float("inf")
    last_s: float = 0.0

    @property
    def is_promising(self) -> bool:
        """The last choice priced would be among the best, if it fitted."""
        return self.last_s < _PROMISING * self.best_s

    def remember(self, excess: float, choice: UniformChoice) -> None:
        """Keep the choice nearest to fitting."""
        if self.fewest_bytes is None or excess < self.fewest_bytes[0]:
            self.fewest_bytes = (excess, choice)

    @property
    def is_late(self) -> bool:
        if self.deadline_s is not None and time.monotonic() > self.deadline_s:
            self.stopped = True
        return self.stopped


class Exhaustive:
    """Enumerates uniform plans; a ``Proposer``."""

    @property
    def name(self) -> str:
        """``exhaustive``."""
        return "exhaustive"

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """The best uniform plans, fastest first; the one nearest to fitting where none fits."""
        start_s = time.monotonic()
        state = _State(deadline_s)
        sizes = tensor_parallel_sizes(context)
        for tp in sizes:
            self._search_sharding(context, state, tp, sequence_parallel=False)
        for tp in self._sequence_sizes(context, state, sizes):
            self._search_sharding(context, state, tp, sequence_parallel=True)
        state.fits.sort(key=lambda item: item[:2])
        candidates = self._simulated(context, state)
        if not candidates and state.fewest_bytes is not None:
            candidates = [candidate_of(context, state.fewest_bytes[1], solver=self.name)]
        status = SolveStatus.STOPPED if state.stopped else SolveStatus.DONE
        if not state.fits:
            status = SolveStatus.NOTHING_FITS
        return SolveResult(
            candidates=tuple(candidates),
            evaluations=state.evaluations,
            seconds=time.monotonic() - start_s,
            status=status,
            notes=state.notes,
        )

    def _sequence_sizes(
        self, context: SearchContext, state: _State, sizes: tuple[int, ...]
    ) -> tuple[int, ...]:
        wide = tuple(size for size in sizes if size > 1)
        if len(context.model.analysis.graph.ops) <= _LARGE_GRAPH_OPS:
            return wide
        best: dict[int, float] = {}
        for time_s, _, choice in state.fits:
            if choice.tp > 1:
                best[choice.tp] = min(best.get(choice.tp, time_s), time_s)
        ranked = sorted(best, key=lambda tp: best[tp])
        return tuple(sorted(ranked[:_SEQUENCE_SIZES])) if ranked else wide[-1:]

    # One way of sharding -----------------------------------------------------------------------

    def _search_sharding(
        self, context: SearchContext, state: _State, tp: int, *, sequence_parallel: bool
    ) -> None:
        label = f"tp={tp}{' sequence parallel' if sequence_parallel else ''}"
        context.report(f"{self.name}: {label}")
        bases = list(self._bases(context, tp, sequence_parallel=sequence_parallel))
        try:
            # A coarse look first, so that most of the rest can be left out.
            for is_coarse in (True, False):
                for base, pp, splits in bases:
                    if state.is_late:
                        return
                    if is_coarse != (base.recompute is Recompute.SELECTIVE):
                        continue
                    self._search_stages(context, state, base, pp, splits)
        except PlanRefused as error:
            state.notes.setdefault(label, str(error))

    def _bases(
        self, context: SearchContext, tp: int, *, sequence_parallel: bool
    ) -> Iterator[tuple[UniformChoice, int, tuple[int, ...]]]:
        """Choices but for stages and ZeRO, each with ``pp`` and the numbers of micro-batches."""
        left = context.cluster.num_devices // tp
        num_segments = len(context.model.segmentation.segments)
        for pp in (count for count in divisors(left) if count <= num_segments):
            ways = largest_divisor(context.batch, at_most=left // pp)
            splits = divisors(context.batch // ways) if context.can_split_step else (1,)
            for recompute in Recompute:
                base = UniformChoice(
                    tp=tp,
                    sequence_parallel=sequence_parallel,
                    dp_replicate=ways,
                    recompute=recompute,
                )
                # More micro-batches mean less memory and less bubble: most of what fits is there.
                yield base, pp, tuple(reversed(splits))

    def _search_stages(
        self,
        context: SearchContext,
        state: _State,
        base: UniformChoice,
        pp: int,
        splits: tuple[int, ...],
    ) -> None:
        pricer = context.model.pricer
        middle = replace(base, num_microbatches=splits[len(splits) // 2])
        times_s = stage_times_s(context, middle)
        starts = least_bottleneck(times_s, pp)
        assert starts is not None, f"{pp} stages of {len(times_s)} segments"
        table = table_of(context, base)
        for count in splits:
            choice = replace(base, num_microbatches=count, starts=starts)
            bound_s = pricer.bound_s(table, choice_on_segments(context, choice))
            if bound_s > _PRUNE * state.best_s:
                continue
            for zero_stage, dp_shard in _zero_choices(context, base.data_parallel, base.tp):
                cut = replace(
                    choice,
                    dp_replicate=base.data_parallel // dp_shard,
                    dp_shard=dp_shard,
                    zero_stage=zero_stage,
                )
                self._consider_cuts(context, state, cut, times_s)

    def _consider_cuts(
        self,
        context: SearchContext,
        state: _State,
        choice: UniformChoice,
        times_s: Sequence[float],
    ) -> None:
        """Price a choice; where it does not fit, with stages cut by memory too."""
        table = table_of(context, choice)
        excess = context.model.pricer.state_excess(table, choice_on_segments(context, choice))
        if excess > _HOPELESS or (excess > 1 and choice.pp == 1):
            state.remember(excess, choice)
            return
        fits = self._consider(context, state, choice)
        if fits or choice.pp == 1 or not state.is_promising:
            return
        roomier = self._by_memory(context, choice, times_s)
        if roomier is not None and roomier != choice.starts:
            self._consider(context, state, replace(choice, starts=roomier))

    def _consider(self, context: SearchContext, state: _State, choice: UniformChoice) -> bool:
        """Price a choice; whether it fits."""
        cost = price(context, choice, simulate=False)
        state.evaluations += 1
        state.last_s = cost.time_s
        if cost.fits:
            state.best_s = min(state.best_s, cost.time_s)
            state.fits.append((cost.time_s, choice.complexity, choice))
            return True
        state.remember(float((cost.memory.peak_bytes / cost.capacity_bytes).max()), choice)
        return False

    def _by_memory(
        self, context: SearchContext, choice: UniformChoice, times_s: Sequence[float]
    ) -> tuple[int, ...] | None:
        """Stages cut anew so that parameters and kept activations fit, if that can be."""
        table = table_of(context, choice)
        decided = choice_on_segments(context, choice)
        pricer = context.model.pricer
        per_stage = choice.data_parallel * choice.tp
        capacity = min(
            pricer.device_of_stage(first, per_stage)[1] for first in decided.first_devices
        )
        fixed, kept, spare = pricer.segment_bytes(table, decided)
        flight = tuple(
            num_in_flight(
                choice.schedule,
                stage=stage,
                num_stages=choice.pp,
                num_microbatches=choice.num_microbatches,
            )
            for stage in range(choice.pp)
        )
        return least_bottleneck(
            times_s,
            choice.pp,
            StageBytes(
                fixed_bytes=fixed.tolist(),
                kept_bytes=kept.tolist(),
                in_flight=flight,
                capacity_bytes=capacity - spare,
            ),
        )

    # The shortlist -----------------------------------------------------------------------------

    def _simulated(self, context: SearchContext, state: _State) -> list[Candidate]:
        found: list[tuple[float, tuple[int, ...], Candidate]] = []
        for _, _, choice in state.fits[:_SHORTLIST]:
            schedules = list(ScheduleName) if choice.pp > 1 else [choice.schedule]
            for schedule in schedules:
                variant = replace(choice, schedule=schedule)
                candidate = candidate_of(context, variant, solver=self.name)
                state.evaluations += 1
                if candidate.cost.fits:
                    found.append((candidate.time_s, variant.complexity, candidate))
        found.sort(key=lambda item: item[:2])
        return [candidate for _, _, candidate in found]


def _zero_choices(context: SearchContext, data_parallel: int, tp: int) -> Iterator[tuple[int, int]]:
    """ZeRO stage and ``dp_shard``: over all data-parallel ranks, or those of one host."""
    yield 0, 1
    host = max(host.num_devices for host in context.cluster.hosts)
    near = max(d for d in divisors(data_parallel) if d <= max(1, host // tp))
    for dp_shard in sorted({data_parallel, near} - {1}):
        for zero_stage in (1, 2, 3):
            yield zero_stage, dp_shard
