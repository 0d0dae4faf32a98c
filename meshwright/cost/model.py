"""The analytic cost model: a plan's step time and peak memory from data sheets alone.

The margin of its interval is stated, not fitted: ``_FASTEST`` to ``_SLOWEST`` times the estimate.
It shrinks when measurements replace the assumptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from meshwright.cluster.model import Cluster
from meshwright.cost.base import Source
from meshwright.cost.memory import CAUSES
from meshwright.cost.reduction import data_traffic, stages_of
from meshwright.cost.step import Choice, StepCost, StepPricer
from meshwright.cost.table import DATA_AXES, CollectiveCount, CostTable, Split
from meshwright.errors import PlanRefused
from meshwright.graph.dimensions import DimensionLabels
from meshwright.graph.factors import FactorAnalysis
from meshwright.graph.opgraph import InputRole, OpGraph
from meshwright.graph.segments import Segmentation
from meshwright.plans.plan import AXIS_NAMES, JobSpec, ParallelPlan, Precision, Prediction
from meshwright.spmd.layout import MICRO
from meshwright.spmd.program import CollectiveKind
from meshwright.spmd.sharded import shard_graph

__all__ = ["AnalyticCostModel", "choice_of", "split_of"]

TORCH_DTYPE = {
    Precision.FP64: "float64",
    Precision.FP32: "float32",
    Precision.BF16: "bfloat16",
    Precision.FP16: "float16",
}

RESERVED_FRACTION = 0.08
"""Share of an accelerator's memory kept free: context, communication library, fragmentation.
Assumption; learned margins replace it."""

_FASTEST, _SLOWEST = 0.8, 1.5
"""Interval of the step time around the estimate. Assumption."""

Shards = Sequence[Mapping[str, Sequence[str]]]
CollectiveCounts = dict[tuple[CollectiveKind, tuple[str, ...]], CollectiveCount]


def split_of(plan: ParallelPlan) -> Split:
    """The plan's mesh and micro-batches."""
    sizes = zip(AXIS_NAMES, plan.mesh.stage_shape, strict=True)
    return Split(
        axis_sizes=tuple(sizes), num_microbatches=plan.num_microbatches, num_stages=plan.mesh.pp
    )


def choice_of(plan: ParallelPlan, segment_classes: Sequence[int]) -> Choice:
    """What ``plan`` decides, segment by segment."""
    return Choice(
        split=split_of(plan),
        starts=tuple(stage.first_segment for stage in plan.stages),
        first_devices=tuple(stage.first_device for stage in plan.stages),
        zero_stages=tuple(plan.segments[number].zero_stage for number in segment_classes),
        policies=tuple(plan.segments[number].recompute for number in segment_classes),
        schedule=plan.schedule,
        bucket_bytes=plan.communication.bucket_bytes,
    )


class AnalyticCostModel:
    """Prices plans for one graph, job and cluster; a ``CostModel``."""

    def __init__(
        self,
        analysis: FactorAnalysis,
        segmentation: Segmentation,
        labels: DimensionLabels,
        *,
        cluster: Cluster,
        job: JobSpec,
    ) -> None:
        """Tables are built when a plan first needs them.

        Raises:
            BadRequest: a device of the cluster has no unit for the job's precision.
        """
        self.analysis = analysis
        self.segmentation = segmentation
        self.labels = labels
        self.cluster = cluster
        self.job = job
        self.pricer = StepPricer(
            cluster,
            dtype=TORCH_DTYPE[job.precision],
            optimizer=job.optimizer,
            reserved_fraction=RESERVED_FRACTION,
        )
        self.segment_classes = tuple(s.segment_class for s in segmentation.segments)
        self._tables: dict[tuple[object, ...], CostTable] = {}
        self._refused: set[tuple[object, ...]] = set()

    # Tables ------------------------------------------------------------------------------------

    def table(self, shards: Shards, axis_sizes: Mapping[str, int]) -> CostTable:
        """The cost table of a way of sharding.

        Where both batch axes shard alike and divide the batch, one table serves every number of
        ranks and micro-batches.

        Raises:
            PlanRefused: the graph cannot be sharded so.
        """
        for common in self._common_sizes(shards, axis_sizes):
            drop = DATA_AXES if "dp_shard" in common else ()
            key = (_frozen(shards, drop=DATA_AXES), _sorted(common))
            if key in self._refused:
                continue
            if key not in self._tables:
                wanted = [_with_batch_axis(names) for names in shards] if drop else shards
                try:
                    self._tables[key] = self._build(wanted, common, scaled=True)
                except PlanRefused:
                    # The graph may allow fewer ways of cutting the batch than this table has.
                    self._refused.add(key)
                    continue
            return self._tables[key]
        exact = (_frozen(shards, drop=()), _sorted(axis_sizes))
        if exact not in self._tables:
            self._tables[exact] = self._build(shards, axis_sizes, scaled=False)
        return self._tables[exact]

    def _build(self, shards: Shards, sizes: Mapping[str, int], *, scaled: bool) -> CostTable:
        sharded = shard_graph(
            self.analysis, self.segmentation, self.labels, shards=shards, axis_sizes=sizes
        )
        return CostTable(sharded, scaled=scaled, is_rounded=self.pricer.is_rounded)

    def _common_sizes(
        self, shards: Shards, axis_sizes: Mapping[str, int]
    ) -> tuple[dict[str, int], ...]:
        """Axis sizes of tables that stand for many batch splits, the most general first."""
        if self.labels.batch is None:
            return ()
        batch = self.analysis.class_size[self.labels.batch]
        data = axis_sizes.get("dp_replicate", 1) * axis_sizes.get("dp_shard", 1)
        micro = axis_sizes.get(MICRO, 1)
        plain = all(
            list(names.get(axis, ["batch"])) in ([], ["batch"])
            for names in shards
            for axis in DATA_AXES
        )
        if not plain or batch % (data * micro) or axis_sizes.get("ep", 1) > 1:
            return ()
        first = _smallest_factor(batch)
        second = _smallest_factor(batch // first)
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
        shards = [segment.shard for segment in plan.segments]
        choice = choice_of(plan, self.segment_classes)
        sizes = {**choice.split.sizes, MICRO: plan.num_microbatches}
        return self.pricer.price(self.table(shards, sizes), choice)

    def predict(self, plan: ParallelPlan) -> Prediction:
        """Step time and peak memory of ``plan``; see ``CostModel``."""
        return self.prediction(self.cost(plan), plan.mesh.num_devices)

    def prediction(self, cost: StepCost, num_devices: int) -> Prediction:
        """``cost`` as a plan carries it."""
        stage = cost.fullest_stage
        memory = {cause: int(np.ceil(cost.memory.by_cause[cause][stage])) for cause in CAUSES}
        graph = self.analysis.graph
        peak = min(roofline.peak_flop_per_s for roofline in self.pricer.rooflines.values())
        time_s = cost.time_s
        num_tokens = tokens_per_sample(graph, self.labels)
        return Prediction(
            step_time_s=time_s,
            step_time_interval_s=(time_s * _FASTEST, time_s * _SLOWEST),
            peak_memory_bytes=sum(memory.values()),
            memory_capacity_bytes=int(cost.capacity_bytes[stage]),
            fits=cost.fits,
            mfu=graph.num_flop / (time_s * num_devices * peak) if time_s else 0.0,
            tokens_per_s=(
                None if num_tokens is None else num_tokens * self.job.global_batch / time_s
            ),
            samples_per_s=self.job.global_batch / time_s if time_s else 0.0,
            source=[Source.ANALYTIC.value],
            breakdown=dict(cost.breakdown_s),
            memory_breakdown=memory,
        )

    def collective_counts(self, plan: ParallelPlan) -> tuple[CollectiveCounts, ...]:
        """For each stage what a rank's step communicates inside it, by kind and axes.

        These are the redistributions (tensor parallel, sequence, loss...) and what expanded
        operators reduce inside, exact in number and bytes; ``data_bytes`` has the rest.
        """
        shards = [segment.shard for segment in plan.segments]
        choice = choice_of(plan, self.segment_classes)
        sizes = {**choice.split.sizes, MICRO: plan.num_microbatches}
        table = self._build(shards, sizes, scaled=False)
        stage_of = stages_of(choice.starts, table.num_segments)
        return table.convert_counts(choice.split, choice.policies, stage_of)

    def data_bytes(self, plan: ParallelPlan) -> tuple[CollectiveCounts, ...]:
        """For each stage the bytes of gradient reductions and ZeRO gathers in one step.

        ``count`` is that of payloads summed, not of collectives.
        """
        shards = [segment.shard for segment in plan.segments]
        choice = choice_of(plan, self.segment_classes)
        sizes = {**choice.split.sizes, MICRO: plan.num_microbatches}
        table = self._build(shards, sizes, scaled=False)
        stage_of = stages_of(choice.starts, table.num_segments)
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


def _smallest_factor(number: int) -> int:
    """Smallest divisor above 1; 1 for 1."""
    return next((d for d in range(2, int(number**0.5) + 1) if number % d == 0), number)


def _with_batch_axis(names: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    rest = {axis: labels for axis, labels in names.items() if axis not in DATA_AXES}
    return {"dp_shard": ["batch"], **rest}


def _frozen(shards: Shards, *, drop: tuple[str, ...]) -> tuple[object, ...]:
    return tuple(
        tuple(sorted((axis, tuple(labels)) for axis, labels in names.items() if axis not in drop))
        for names in shards
    )


def _sorted(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(sizes.items()))
