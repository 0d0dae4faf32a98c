"""The cost model: a plan's step time and peak memory.

From data sheets alone, or with learned prices of operators and collectives (``cost.pricing``).

Tables: ``table(shards, axis_sizes)`` takes one mapping for each segment *class*,
``table_of_segments(shards, axis_sizes, operators=())`` one for each *segment* (a mixture), with
exceptions by operator number; see their docstrings. Both remember what they built.

The interval of a step time is that of its ``Pricing``; of an analytic one it is stated, not fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import TypeVar

import numpy as np

from meshwright.cluster.model import Cluster
from meshwright.cost.base import Source
from meshwright.cost.choice import CORRECTION_CAUSE
from meshwright.cost.corrected import corrected
from meshwright.cost.kind_times import batch_splits
from meshwright.cost.memory import CAUSES
from meshwright.cost.precision import TORCH_DTYPE, check_units, pricing_for
from meshwright.cost.pricing import ANALYTIC, Pricing
from meshwright.cost.reduction import data_traffic
from meshwright.cost.sources import learned_share, learned_shares
from meshwright.cost.step import Choice, StepCost, StepPricer
from meshwright.cost.table import DATA_AXES, CollectiveCount, CostTable, Split
from meshwright.cost.tabulate import Tabulator, Ways
from meshwright.errors import PlanRefused
from meshwright.graph.dimensions import DimensionLabels
from meshwright.graph.factors import FactorAnalysis
from meshwright.graph.opgraph import InputRole, OpGraph
from meshwright.graph.periods import Periods
from meshwright.graph.segments import Segmentation
from meshwright.plans.plan import AXIS_NAMES, JobSpec, ParallelPlan, Prediction
from meshwright.spmd.layout import MICRO
from meshwright.spmd.program import CollectiveKind
from meshwright.spmd.wanted import Shard

__all__ = ["StepCostModel", "choice_of", "split_of"]

Shards = Sequence[Shard]
_Item = TypeVar("_Item")
CollectiveCounts = dict[tuple[CollectiveKind, tuple[str, ...]], CollectiveCount]


def split_of(plan: ParallelPlan) -> Split:
    """The plan's mesh and micro-batches."""
    sizes = zip(AXIS_NAMES, plan.mesh.stage_shape, strict=True)
    return Split(
        axis_sizes=tuple(sizes),
        num_microbatches=plan.num_microbatches,
        num_stages=plan.mesh.pp,
        compression=plan.communication.tensor_parallel,
    )


def choice_of(plan: ParallelPlan, segment_classes: Sequence[int]) -> Choice:
    """What ``plan`` decides, segment by segment."""
    entries = plan.segment_plans(segment_classes)
    stage_of = plan.stage_of_segment
    return Choice(
        split=split_of(plan),
        starts=tuple(stage.first_segment for stage in plan.stages),
        first_devices=tuple(stage.first_device for stage in plan.stages),
        zero_stages=tuple(entry.zero_stage for entry in entries),
        policies=tuple(entry.recompute for entry in entries),
        schedule=plan.schedule,
        bucket_bytes=plan.communication.bucket_bytes,
        stage_of_segment=() if list(stage_of) == sorted(stage_of) else stage_of,
        stage_splits=_stage_splits(plan),
        batch_shares=tuple(tuple(stage.batch_shares) for stage in plan.stages),
        token_slices=tuple(plan.token_slices),
        offloaded=tuple(entry.offload for entry in entries),
        pipeline_compression=plan.communication.pipeline,
    )


def _stage_splits(plan: ParallelPlan) -> tuple[Split, ...]:
    """The mesh of each stage; empty where all have the plan's."""
    split = split_of(plan)
    found = tuple(
        replace(split, axis_sizes=tuple(plan.stage_sizes(stage).items()))
        for stage in range(len(plan.stages))
    )
    return found if any(own != split for own in found) else ()


class StepCostModel:
    """Prices plans for one graph, job and cluster; a ``CostModel``."""

    def __init__(
        self,
        analysis: FactorAnalysis,
        segmentation: Segmentation,
        labels: DimensionLabels,
        *,
        cluster: Cluster,
        job: JobSpec,
        periods: Periods | None = None,
        pricing: Pricing = ANALYTIC,
        tabulator: Tabulator | None = None,
    ) -> None:
        """Tables are built when a plan first needs them, on a short graph where there is one.

        Args:
            analysis: rules and classes of the graph.
            segmentation: its segments.
            labels: their dimension classes.
            cluster: where the plans shall run.
            job: what they shall compute.
            periods: runs of equal units, for tables in a time nearly free of their number.
            pricing: of operators and collectives, and how they join into a step.
            tabulator: of this analysis, where models of other clusters have one.

        Raises:
            BadRequest: a device of the cluster has no unit for the job's precision.
        """
        check_units(cluster, job.precision)
        self.analysis = analysis
        self.segmentation = segmentation
        self.labels = labels
        self.cluster = cluster
        self.job = job
        self.periods = periods
        self.pricing = pricing_for(pricing, job.precision)
        self.pricer = StepPricer(
            cluster,
            dtype=TORCH_DTYPE[job.precision],
            optimizer=job.optimizer,
            pricing=self.pricing,
        )
        self.segment_classes = tuple(s.segment_class for s in segmentation.segments)
        self._tables: dict[tuple[object, ...], CostTable] = {}
        self._refused: set[tuple[object, ...]] = set()
        self._tabulator = tabulator or Tabulator(analysis, segmentation, labels, periods)

    # Tables ------------------------------------------------------------------------------------

    def table(self, shards: Shards, axis_sizes: Mapping[str, int]) -> CostTable:
        """The cost table of a way of sharding; ``shards`` has one mapping for each segment class.

        Raises:
            PlanRefused: the graph cannot be sharded so.
        """
        return self.table_of_segments(
            [shards[number] for number in self.segment_classes], axis_sizes
        )

    def table_of_segments(
        self,
        shards: Shards,
        axis_sizes: Mapping[str, int],
        operators: Sequence[Mapping[int, Shard]] = (),
    ) -> CostTable:
        """The cost table of segments that may each be sharded in a way of their own.

        Where both batch axes shard alike and divide the batch, one table serves every number of
        ranks and micro-batches.

        Args:
            shards: for each segment, mesh axis to labels, most wanted first.
            axis_sizes: devices along each mesh axis, and ``micro``: the number of micro-batches.
            operators: for each segment its exceptions, number of an operator to mesh axis to
                labels, as ``shard_graph`` takes them; empty: no segment has any.

        Raises:
            PlanRefused: the graph cannot be sharded so.
        """
        for common in self._common_sizes(shards, axis_sizes, operators):
            drop = DATA_AXES if "dp_shard" in common else ()
            key = (_ways(shards, operators, drop=DATA_AXES), _sorted(common))
            if key in self._refused:
                continue
            if key not in self._tables:
                wanted = [_with_batch_axis(names) for names in shards] if drop else shards
                try:
                    self._tables[key] = self._build(wanted, common, operators, scaled=True)
                except PlanRefused:
                    # The graph may allow fewer ways of cutting the batch than this table has.
                    self._refused.add(key)
                    continue
            return self._tables[key]
        exact = (_ways(shards, operators), _sorted(axis_sizes))
        if exact not in self._tables:
            self._tables[exact] = self._build(shards, axis_sizes, operators, scaled=False)
        return self._tables[exact]

    def table_of_plan(self, plan: ParallelPlan, *, is_exact: bool = False) -> CostTable:
        """The cost table of ``plan``; ``is_exact``: for its own batch split alone."""
        entries = plan.segment_plans(self.segment_classes)
        shards = [entry.shard for entry in entries]
        operators = [entry.operators_by_number for entry in entries]
        sizes = {**split_of(plan).sizes, MICRO: plan.num_microbatches}
        if is_exact:
            return self._build(shards, sizes, operators, scaled=False)
        return self.table_of_segments(shards, sizes, operators)

    def _build(
        self,
        shards: Shards,
        sizes: Mapping[str, int],
        operators: Sequence[Mapping[int, Shard]],
        *,
        scaled: bool,
    ) -> CostTable:
        ways = _ways(shards, operators)
        columns = self._tabulator.columns(ways, shards, sizes, operators, scaled=scaled)
        return CostTable(
            columns,
            is_rounded=self.pricer.is_rounded,
            batch_splits=self._batch_splits(sizes) if scaled else (),
        )

    def _batch_splits(self, sizes: Mapping[str, int]) -> tuple[tuple[int, int], ...]:
        """Data-parallel ranks and micro-batches that meshes of these other axes may have."""
        if self.pricing.operators is None or self.labels.batch is None:
            return ()
        inside = math.prod(n for axis, n in sizes.items() if axis not in (*DATA_AXES, MICRO))
        batch = self.analysis.class_size[self.labels.batch]
        return batch_splits(batch, self.cluster.num_devices // inside)

    def _common_sizes(
        self,
        shards: Shards,
        axis_sizes: Mapping[str, int],
        operators: Sequence[Mapping[int, Shard]],
    ) -> tuple[dict[str, int], ...]:
        """Axis sizes of tables that stand for many batch splits, the most general first."""
        if self.labels.batch is None:
            return ()
        batch = self.analysis.class_size[self.labels.batch]
        data = axis_sizes.get("dp_replicate", 1) * axis_sizes.get("dp_shard", 1)
        micro = axis_sizes.get(MICRO, 1)
        plain = all(
            list(names.get(axis, ["batch"])) in ([], ["batch"])
            for names in _distinct(shards)
            for axis in DATA_AXES
        ) and not any(
            axis in names
            for exceptions in _distinct(operators)
            for names in exceptions.values()
            for axis in DATA_AXES
        )
        # Where another axis cuts the batch too, what is left of it must stay divisible.
        others = _other_ways(shards, operators, axis_sizes)
        if not plain or batch % (data * micro * others) or axis_sizes.get("ep", 1) > 1:
            return ()
        first = _smallest_factor(batch // others)
        second = _smallest_factor(batch // others // first)
        rest = {a: s for a, s in axis_sizes.items() if a not in (*DATA_AXES, MICRO) and s > 1}
        found = []
        if first > 1 and second > 1:
            found.append({**rest, "dp_shard": first, MICRO: second})
        if first > 1 and micro == 1:
            found.append({**rest, "dp_shard": first})
        if first > 1 and data == 1:
            found.append({**rest, MICRO: first})
        return tuple(found)

    # Plans -------------------------------------------------------------------------------------

    def cost(self, plan: ParallelPlan) -> StepCost:
        """Time and memory of ``plan`` by cause.

        Raises:
            PlanRefused: the graph cannot be sharded so.
        """
        choice = choice_of(plan, self.segment_classes)
        if not choice.stage_splits:
            return self.pricer.price(self.table_of_plan(plan), choice)
        return self.pricer.price_stages(
            self._stage_tables(plan, choice), choice, whole=self.whole_table(plan.num_microbatches)
        )

    def _stage_tables(self, plan: ParallelPlan, choice: Choice) -> list[CostTable]:
        """One table for each stage, where stages have meshes of their own."""
        entries = plan.segment_plans(self.segment_classes)
        tables = []
        for split in choice.stage_splits:
            sizes = {axis: size for axis, size in split.axis_sizes if size > 1}
            shards = [
                {axis: names for axis, names in entry.shard.items() if axis in sizes}
                for entry in entries
            ]
            tables.append(
                self.table_of_segments(
                    shards,
                    {**split.sizes, MICRO: plan.num_microbatches},
                    [entry.operators_by_number for entry in entries],
                )
            )
        return tables

    def whole_table(self, num_microbatches: int) -> CostTable:
        """The cost table of one device: nothing is sharded.

        Raises:
            PlanRefused: the graph cannot be cut into so many micro-batches.
        """
        shards: list[dict[str, list[str]]] = [{} for _ in self.segment_classes]
        sizes = dict.fromkeys(AXIS_NAMES, 1)
        return self.table_of_segments(shards, {**sizes, MICRO: num_microbatches})

    def predict(self, plan: ParallelPlan) -> Prediction:
        """Step time and peak memory of ``plan``; see ``CostModel``."""
        devices = {device for stage in plan.stages for device in stage.devices}
        cost = self.corrected(plan, self.cost(plan))
        return self.prediction(cost, len(devices), learned=self.learned_shares(plan, cost))

    def corrected(self, plan: ParallelPlan, cost: StepCost) -> StepCost:
        """``cost`` of ``plan`` as measured steps correct it (``cost.corrected``)."""
        if self.pricing.steps is None or cost.correction is not None:
            return cost
        return corrected(self.pricer, *self._priced_by(plan), cost)

    def learned_shares(self, plan: ParallelPlan, cost: StepCost) -> dict[str, float]:
        """How far the time of ``plan`` is learned, by cause (``cost.sources``)."""
        return learned_shares(self.pricer, *self._priced_by(plan), cost.breakdown_s)

    def _priced_by(self, plan: ParallelPlan) -> tuple[list[CostTable], Choice]:
        """One table for each stage, and what is decided."""
        choice = choice_of(plan, self.segment_classes)
        tables = self._stage_tables(plan, choice) or [self.table_of_plan(plan)] * len(plan.stages)
        return tables, choice

    def prediction(
        self, cost: StepCost, num_devices: int, *, learned: Mapping[str, float] = {}
    ) -> Prediction:
        """``cost`` as a plan carries it, with ``learned_shares``."""
        share = learned_share(learned, cost.breakdown_s)
        sources = {Source.LEARNED: share > 0, Source.ANALYTIC: share < 1}
        stage = cost.fullest_stage
        memory = {cause: int(np.ceil(cost.memory.by_cause[cause][stage])) for cause in CAUSES}
        graph = self.analysis.graph
        peaks = [roofline.peak_flop_per_s for roofline in self.pricer.rooflines.values()]
        peak = peaks[0] if len(peaks) == 1 else self._mean_peak_flop_per_s()
        time_s = cost.time_s
        interval_s = self.pricing.interval_s(time_s, share)
        if cost.correction is not None:
            learned = {**learned, CORRECTION_CAUSE: cost.correction.trust}
            interval_s = cost.correction.interval_s(time_s, interval_s)
        num_tokens = tokens_per_sample(graph, self.labels)
        return Prediction(
            step_time_s=time_s,
            step_time_interval_s=interval_s,
            peak_memory_bytes=sum(memory.values()),
            memory_capacity_bytes=int(cost.capacity_bytes[stage]),
            fits=cost.fits,
            mfu=graph.num_flop / (time_s * num_devices * peak) if time_s else 0.0,
            tokens_per_s=(
                None if num_tokens is None else num_tokens * self.job.global_batch / time_s
            ),
            samples_per_s=self.job.global_batch / time_s if time_s else 0.0,
            source=[source.value for source, is_in_it in sources.items() if is_in_it],
            sources={cause: round(part, 4) for cause, part in learned.items()},
            breakdown=dict(cost.breakdown_s),
            memory_breakdown=memory,
        )

    def _mean_peak_flop_per_s(self) -> float:
        """Data sheet rate of the cluster's devices on average."""
        rates = self.pricer.rooflines
        total = sum(
            host.num_devices * rates[host.device.name].peak_flop_per_s
            for host in self.cluster.hosts
        )
        return total / self.cluster.num_devices

    def collective_counts(self, plan: ParallelPlan) -> tuple[CollectiveCounts, ...]:
        """For each stage what a rank's step communicates inside it, by kind and axes.

        These are the redistributions (tensor parallel, sequence, loss...) and what expanded
        operators reduce inside, exact in number and bytes; ``data_bytes`` has the rest.
        """
        choice = choice_of(plan, self.segment_classes)
        table = self.table_of_plan(plan, is_exact=True)
        stage_of = choice.stage_of(table.num_segments)
        return table.convert_counts(choice.split, choice.policies, stage_of)

    def data_bytes(self, plan: ParallelPlan) -> tuple[CollectiveCounts, ...]:
        """For each stage the bytes of gradient reductions and ZeRO gathers in one step.

        ``count`` is that of payloads summed, not of collectives.
        """
        choice = choice_of(plan, self.segment_classes)
        table = self.table_of_plan(plan, is_exact=True)
        stage_of = choice.stage_of(table.num_segments)
        num_stages = len(choice.starts)
        traffic = data_traffic(
            table,
            choice.split,
            choice.policies,
            state=table.parameters.state(
                choice.zero_stages,
                dp_shard=plan.mesh.dp_shard,
                optimizer=self.job.optimizer,
            ),
            placed=table.parameters.on_stages(stage_of),
            num_stages=num_stages,
        )
        found: list[CollectiveCounts] = [{} for _ in range(num_stages)]
        micro = plan.num_microbatches
        by_segment = (
            *((payload, 1) for payload in traffic.publish),
            (traffic.forward_gather, micro),
            (traffic.backward_gather, micro),
        )
        rows = [(payload, times, stage_of) for payload, times in by_segment]
        every = np.arange(num_stages)
        rows += [(payload, 1, every) for payload in traffic.once]
        rows += [(payload, micro, every) for payload in traffic.every_backward]
        for payload, times, stages in rows:
            for stage, num_bytes in zip(stages.tolist(), payload.num_bytes.tolist(), strict=True):
                if num_bytes and plan.mesh.dp_shard * plan.mesh.dp_replicate > 0:
                    key = (payload.kind, payload.axes)
                    before = found[stage].get(key, CollectiveCount(count=0, num_bytes=0))
                    found[stage][key] = CollectiveCount(
                        count=before.count + times,
                        num_bytes=before.num_bytes + times * round(num_bytes),
                    )
        return tuple(found)


def tokens_per_sample(graph: OpGraph, labels: DimensionLabels) -> int | None:
    """Tokens of one sample: the second dim of the integer data inputs; ``None`` without any."""
    del labels
    for item in graph.inputs_of(InputRole.DATA):
        spec = graph.values[item.value]
        if len(spec.shape) == 2 and spec.dtype in {"int64", "int32"}:
            return spec.shape[1]
    return None


def _other_ways(
    shards: Shards, operators: Sequence[Mapping[int, Shard]], axis_sizes: Mapping[str, int]
) -> int:
    """Devices along the axes besides the data-parallel ones that cut the batch somewhere."""
    listed = [*_distinct(shards), *(n for e in _distinct(operators) for n in e.values())]
    axes = {axis for names in listed for axis, labels in names.items() if "batch" in labels}
    return math.prod(axis_sizes.get(axis, 1) for axis in axes - set(DATA_AXES))


def _smallest_factor(number: int) -> int:
    """Smallest divisor above 1; 1 for 1."""
    return next((d for d in range(2, int(number**0.5) + 1) if number % d == 0), number)


def _with_batch_axis(names: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    rest = {axis: labels for axis, labels in names.items() if axis not in DATA_AXES}
    return {"dp_shard": ["batch"], **rest}


def _ways(
    shards: Shards, operators: Sequence[Mapping[int, Shard]], *, drop: tuple[str, ...] = ()
) -> Ways:
    """Distinct ways of sharding a segment, axes of ``drop`` left out, and each segment's."""
    numbers: dict[object, int] = {}
    known: dict[tuple[int, int], int] = {}
    given = list(zip(map(id, shards), map(id, operators or repeat(None)), strict=False))
    for index, one in enumerate(given):
        if one not in known:
            exceptions = operators[index] if operators else {}
            way = (
                _frozen(shards[index], drop),
                tuple(sorted((op, _frozen(names, ())) for op, names in exceptions.items())),
            )
            known[one] = numbers.setdefault(way, len(numbers))
    return tuple(numbers), tuple(map(known.__getitem__, given))


def _frozen(shard: Shard, drop: tuple[str, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple(
        sorted((axis, tuple(labels)) for axis, labels in shard.items() if axis not in drop)
    )


def _distinct(items: Sequence[_Item]) -> list[_Item]:
    """Each object of ``items`` once."""
    return list({id(item): item for item in items}.values())


def _sorted(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(sizes.items()))
