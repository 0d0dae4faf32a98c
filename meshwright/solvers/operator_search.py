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
from itertools import product

from meshwright.cost.model import choice_of
from meshwright.cost.table import DATA_AXES
from meshwright.errors import PlanRefused
from meshwright.graph.dimensions import BATCH
from meshwright.plans.plan import Recompute
from meshwright.solvers.operators import OperatorProblem
from meshwright.solvers.wiring import Wiring, wiring_of
from meshwright.space.decided import decided_plan
from meshwright.space.decision import Decision, Sharding, Skeleton, Strategy
from meshwright.space.evaluate import candidate_of_decision
from meshwright.space.search import Candidate, SearchContext, SolveResult, SolveStatus
from meshwright.space.uniform import divisors, largest_divisor

__all__ = ["OperatorLevel"]

_SHORTLIST = 4
_MAX_SHARDINGS = 2
"""Points of the Pareto set tried on one mesh."""


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
        wiring = wiring_of(context.model.analysis.graph, context.model.segmentation)
        for skeleton in _meshes(context):
            if deadline_s is not None and time.monotonic() > deadline_s:
                stopped = True
                break
            tp = skeleton.sizes["tp"]
            context.report(f"{self.name}: tp={tp}")
            try:
                for sharding in _shardings(context, skeleton, wiring, deadline_s):
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
        shortlist = found[:_SHORTLIST]
        plain = next((item for item in found if _is_plain(item[1])), None)
        if plain is not None and plain not in shortlist:
            shortlist.append(plain)
        best = [
            candidate_of_decision(context, decision, solver=self.name) for _, decision in shortlist
        ]
        return tuple(sorted((c for c in best if c.cost.fits), key=lambda c: c.time_s))


def _is_plain(decision: Decision) -> bool:
    """One copy of the model on every device, nothing computed twice."""
    sizes, strategy = decision.skeleton.sizes, decision.strategies[0]
    return (
        sizes["tp"] == sizes["dp_shard"] == 1
        and strategy.zero_stage == 0
        and strategy.recompute is Recompute.NONE
    )


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
    context: SearchContext, skeleton: Skeleton, wiring: Wiring, deadline_s: float | None
) -> Iterator[Sharding]:
    """Of the integer program: the fastest, and one that is leaner."""
    if skeleton.sizes["tp"] == 1:
        is_split = skeleton.sizes["dp_shard"] > 1
        labels = context.model.labels.by_segment
        yield Sharding(
            name="batch",
            by_class=tuple(
                ((("dp_shard", (BATCH,)),) if is_split and BATCH in labels[segment.index] else ())
                for segment in context.model.segmentation.representatives()
            ),
        )
        return
    seen: set[object] = set()
    problem = OperatorProblem(context, skeleton, zero_stage=3, wiring=wiring)
    for choice in problem.pareto(at_most=_MAX_SHARDINGS, deadline_s=deadline_s):
        sharding = problem.plan(choice).sharding
        key = (sharding.by_class, sharding.operators_by_class)
        if key not in seen:
            seen.add(key)
            yield sharding


def _priced(
    context: SearchContext, skeleton: Skeleton, sharding: Sharding
) -> Iterator[tuple[float | None, Decision]]:
    """Micro-batches, ZeRO and recompute, each with its time; ``None`` where it does not fit."""
    model = context.model
    count = len(model.segment_classes)
    ways, tp = skeleton.sizes["dp_shard"], skeleton.sizes["tp"]
    cut = ways * (tp if _cuts_batch(sharding) else 1)
    splits = divisors(context.batch // cut) if context.can_split_step else (1,)
    too_large: set[int] = set()
    for num_microbatches, dp_shard in product(splits[::-1], _shard_sizes(context, ways, tp)):
        if dp_shard in too_large:
            continue
        some_fit = False
        sizes = {"dp_replicate": ways // dp_shard, "dp_shard": dp_shard, "tp": tp}
        own = Skeleton.of(sizes, num_microbatches=num_microbatches)
        strategy = Strategy(sharding=_on(sharding, own), zero_stage=int(dp_shard > 1))
        decision = Decision(skeleton=own, starts=(0,), strategies=(strategy,) * count)
        plan = decided_plan(context, decision, solver="")
        table, choice = model.table_of_plan(plan), choice_of(plan, model.segment_classes)
        for zero_stage in (1, 2, 3) if dp_shard > 1 else (0,):
            for recompute in Recompute:
                changed = replace(
                    choice, zero_stages=(zero_stage,) * count, policies=(recompute,) * count
                )
                cost = model.pricer.price(table, changed, simulate=False)
                strategies = (
                    replace(strategy, zero_stage=zero_stage, recompute=recompute),
                ) * count
                yield (
                    cost.time_s if cost.fits else None,
                    replace(decision, strategies=strategies),
                )
                some_fit = some_fit or cost.fits
                # Computing again only helps what does not fit.
                if cost.fits:
                    break
        if not some_fit:
            # Larger micro-batches need more still.
            too_large.add(dp_shard)


def _shard_sizes(context: SearchContext, ways: int, tp: int) -> tuple[int, ...]:
    """Sizes of ``dp_shard``: none, all data-parallel ranks, those of one host."""
    host = max(host.num_devices for host in context.cluster.hosts)
    near = max(d for d in divisors(ways) if d <= max(1, host // tp))
    return tuple(sorted({1, ways, near}))


def _on(sharding: Sharding, skeleton: Skeleton) -> Sharding:
    """The same with the batch on the data-parallel axes that the skeleton has."""
    axes = [axis for axis in DATA_AXES if skeleton.sizes[axis] > 1]
    by_class = []
    for labels in sharding.by_class:
        named = dict(labels)
        batch = named.pop("dp_shard", ())
        by_class.append((*((axis, batch) for axis in axes), *named.items()))
    return replace(sharding, by_class=tuple(by_class))


def _cuts_batch(sharding: Sharding) -> bool:
    """Whether ``tp`` cuts the batch somewhere."""
    exceptions = [labels for every in sharding.operators_by_class for _, labels in every]
    return any(
        axis == "tp" and BATCH in labels
        for shard in (*sharding.by_class, *exceptions)
        for axis, labels in shard
    )
