"""Plans from operators alone: the mesh chosen too, and no rule about what tensor parallelism cuts.

For every size of ``tp`` within a host the rest of the devices takes the batch. On each such mesh
the integer program (``operators``) answers with the fastest shardings at some memory bounds; each
is then priced by the exact model with every ZeRO stage, recompute policy and number of
micro-batches, and the best that fit are simulated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from meshwright.cost.model import choice_of
from meshwright.errors import PlanRefused
from meshwright.plans.plan import Recompute
from meshwright.solvers.base import Candidate, SearchContext, SolveResult, SolveStatus
from meshwright.solvers.decided import decided_plan
from meshwright.solvers.decision import Decision, Sharding, Skeleton, Strategy
from meshwright.solvers.evaluate import candidate_of_decision
from meshwright.solvers.operators import OperatorProblem
from meshwright.solvers.space import divisors, largest_divisor

__all__ = ["OperatorLevel"]

_SHORTLIST = 4
_SPLITS = 6
"""Numbers of micro-batches tried on one mesh, the largest micro-batches first among those that
may fit."""

_STATE_SHARE = 0.9
"""Of the memory, what one ZeRO-3 rank's share of everything may take for a mesh to be tried."""


class OperatorLevel:
    """Chooses mesh and operators' shardings together; a ``Proposer`` without pipelines."""

    @property
    def name(self) -> str:
        """``operators``."""
        return "operators"

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """The best plans of every mesh, fastest first."""
        start_s = time.monotonic()
        found: list[tuple[float, Decision]] = []
        notes: dict[str, str] = {}
        evaluations = 0
        stopped = False
        for skeleton in _meshes(context):
            if deadline_s is not None and time.monotonic() > deadline_s:
                stopped = True
                break
            tp = skeleton.sizes["tp"]
            context.report(f"{self.name}: tp={tp}")
            try:
                for sharding in _shardings(context, skeleton, deadline_s):
                    for time_s, decision in _priced(context, skeleton, sharding):
                        evaluations += 1
                        if time_s is not None:
                            found.append((time_s, decision))
            except PlanRefused as error:
                notes.setdefault(f"tp={tp}", str(error))
        found.sort(key=lambda item: item[0])
        candidates = self._simulated(context, found)
        status = SolveStatus.STOPPED if stopped else SolveStatus.DONE
        return SolveResult(
            candidates=candidates,
            evaluations=evaluations,
            seconds=time.monotonic() - start_s,
            status=status if candidates else SolveStatus.NOTHING_FITS,
            notes=notes,
        )

    def _simulated(
        self, context: SearchContext, found: list[tuple[float, Decision]]
    ) -> tuple[Candidate, ...]:
        best = [
            candidate_of_decision(context, decision, solver=self.name)
            for _, decision in found[:_SHORTLIST]
        ]
        return tuple(sorted((c for c in best if c.cost.fits), key=lambda c: c.time_s))


def _meshes(context: SearchContext) -> Iterator[Skeleton]:
    """``tp`` within a host, data parallelism over the rest; micro-batches of about a sample."""
    host = max(host.num_devices for host in context.cluster.hosts)
    for tp in divisors(host):
        ways = largest_divisor(context.batch, at_most=context.cluster.num_devices // tp)
        yield Skeleton.of(
            {"dp_shard": ways, "tp": tp},
            num_microbatches=context.batch // ways if context.can_split_step else 1,
        )


def _shardings(
    context: SearchContext, skeleton: Skeleton, deadline_s: float | None
) -> Iterator[Sharding]:
    """Of the integer program, the fastest that fits and leaner ones."""
    if skeleton.sizes["tp"] == 1:
        batch = tuple(
            (("dp_shard", ("batch",)),)
            if "batch" in names and skeleton.sizes["dp_shard"] > 1
            else ()
            for names in (
                context.model.labels.by_segment[segment.index]
                for segment in context.model.segmentation.representatives()
            )
        )
        yield Sharding(name="batch", by_class=batch)
        return
    seen: set[object] = set()
    problem = OperatorProblem(context, skeleton, zero_stage=3)
    for choice in problem.pareto(deadline_s=deadline_s):
        sharding = problem.plan(choice).sharding
        key = (sharding.by_class, sharding.operators_by_class)
        if key not in seen:
            seen.add(key)
            yield sharding


def _priced(
    context: SearchContext, skeleton: Skeleton, sharding: Sharding
) -> Iterator[tuple[float | None, Decision]]:
    """Every ZeRO stage, recompute policy and some numbers of micro-batches; no time where it does
    not fit."""
    model = context.model
    count = len(model.segment_classes)
    ways = skeleton.sizes["dp_shard"]
    splits = divisors(context.batch // ways) if context.can_split_step else (1,)
    tp_ways = skeleton.sizes["tp"]
    for num_microbatches in splits:
        if context.batch % (ways * num_microbatches * tp_ways) and _cuts_batch(sharding):
            continue
        resized = replace(skeleton, num_microbatches=num_microbatches)
        base = None
        for zero_stage in (0, 1, 2, 3) if ways > 1 else (0,):
            for recompute in Recompute:
                strategy = Strategy(sharding=sharding, zero_stage=zero_stage, recompute=recompute)
                decision = Decision(skeleton=resized, starts=(0,), strategies=(strategy,) * count)
                if zero_stage == 0 or base is None:
                    plan = decided_plan(context, decision, solver="")
                    table = model.table_of_plan(plan)
                    base = choice_of(plan, model.segment_classes)
                choice = replace(
                    base, zero_stages=(zero_stage,) * count, policies=(recompute,) * count
                )
                cost = model.pricer.price(table, choice, simulate=False)
                yield (cost.time_s if cost.fits else None), decision


def _cuts_batch(sharding: Sharding) -> bool:
    """Whether ``tp`` cuts the batch somewhere."""
    exceptions = [labels for every in sharding.operators_by_class for _, labels in every]
    return any(
        axis == "tp" and "batch" in labels
        for shard in (*sharding.by_class, *exceptions)
        for axis, labels in shard
    )
