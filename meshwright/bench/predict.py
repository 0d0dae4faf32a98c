"""Predicted step time and memory of measured runs, their plans as given.

Runs of one model share its captured graph, its analysis and its tables: the graph is captured with
a small batch, and amounts are scaled to the samples a rank has, as tables allow (``Split``). Where
they do not (experts over ``ep``), it is captured with the batch of the run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from meshwright.bench.clusters import cluster_of
from meshwright.bench.given_plans import Degrees, degrees_of, given_plan, shards_of
from meshwright.bench.masks import bytes_with_masks
from meshwright.bench.models import RunModel, model_of, unlike_told, with_family
from meshwright.bench.runs import MeasuredRun, Skipped
from meshwright.bench.selective import kept_nodes
from meshwright.bench.software import Selective, Software, calibration_for, software_of
from meshwright.capture import capture
from meshwright.cluster.model import Cluster
from meshwright.cost.corrected import corrected, step_shape
from meshwright.cost.memory import CAUSES
from meshwright.cost.model import StepCostModel, choice_of
from meshwright.cost.precision import FP8, TORCH_DTYPE
from meshwright.cost.pricing import ANALYTIC, Pricing, StepShape
from meshwright.cost.sources import learned_shares
from meshwright.cost.step import Choice, StepCost
from meshwright.cost.table import CostTable
from meshwright.errors import PlannerError, PlanRefused
from meshwright.graph.analyzed import AnalyzedGraph, analyze_graph
from meshwright.graph.opgraph import OpGraph
from meshwright.graph.simplify import with_explicit_factories
from meshwright.plans.plan import GraphReference, JobSpec, ParallelPlan, Precision, Recompute
from meshwright.spmd.layout import MICRO

__all__ = ["Predictor", "PricedRun", "RunPrediction"]

_BATCH = 4
_MAX_GRAPHS = 64
_MAX_MODELS = 48

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPrediction:
    """What is predicted of a run."""

    run_id: str
    step_time_s: float
    step_time_interval_s: tuple[float, float]
    peak_memory_bytes: int
    memory_capacity_bytes: int
    fits: bool
    fullness: float
    """What the fullest device needs over what it may use."""
    breakdown: Mapping[str, float]
    """Seconds by cause; they sum to ``step_time_s``."""
    memory_breakdown: Mapping[str, int]
    """Bytes by cause of the device whose peak was measured: the fullest, or the last rank's."""
    num_parameters: int
    assumptions: tuple[str, ...]
    """What the row does not tell and was filled in."""
    source: tuple[str, ...]
    """``analytic``, ``learned``, ``measured``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedRun:
    """A run ready to be priced: the plan on the graph, and the model that prices it."""

    run: MeasuredRun
    model: StepCostModel
    table: CostTable
    plan: ParallelPlan
    reports_last_rank: bool
    """The peak that was measured is the last rank's."""
    batch_scale: float
    """Samples of a rank over those the shared graph would give it."""
    graph: OpGraph
    assumptions: tuple[str, ...]

    @property
    def choice(self) -> Choice:
        """The plan as the cost model takes it."""
        choice = choice_of(self.plan, self.model.segment_classes)
        return replace(choice, split=replace(choice.split, batch_scale=self.batch_scale))

    def cost(self) -> StepCost:
        """Time and memory of the step, the sum of its parts."""
        return self.model.pricer.price(self.table, self.choice)

    def shape(self, cost: StepCost) -> StepShape:
        """What the step of ``cost`` is made of."""
        return step_shape(self.model.pricer, self.table, self.choice, cost)

    def prediction(self) -> RunPrediction:
        """Time, as measured steps correct it, and memory."""
        tables = [self.table] * len(self.plan.stages)
        pricer, choice = self.model.pricer, self.choice
        cost = corrected(pricer, tables, choice, self.cost())
        return _prediction(self, cost, learned_shares(pricer, tables, choice, cost.breakdown_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    graph: OpGraph
    analyzed: AnalyzedGraph


class Predictor:
    """Predicts runs with one pricing; remembers graphs and tables for the next run."""

    def __init__(self, pricing: Pricing = ANALYTIC) -> None:
        self.pricing = pricing
        self.batch = _BATCH
        """Samples of a shared graph: a multiple of 4, 2 ranks times 2 micro-batches."""
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._models: OrderedDict[Hashable, StepCostModel] = OrderedDict()
        self._selective: OrderedDict[Hashable, CostTable] = OrderedDict()

    def beside(self, pricing: Pricing) -> Predictor:
        """The same with another pricing; graphs are captured once for both."""
        other = Predictor(pricing)
        other._captured = self._captured
        return other

    def predict(self, run: MeasuredRun) -> RunPrediction | Skipped:
        """The prediction of a run, or why there is none; raises nothing."""
        return self._guarded(run, PricedRun.prediction)

    def shaped(self, run: MeasuredRun) -> tuple[StepCost, StepShape] | Skipped:
        """What a run's step costs and is made of, or why that is not known; raises nothing."""

        def ask(priced: PricedRun) -> tuple[StepCost, StepShape]:
            cost = priced.cost()
            return cost, priced.shape(cost)

        return self._guarded(run, ask)

    def _guarded(self, run: MeasuredRun, ask: Callable[[PricedRun], _Value]) -> _Value | Skipped:
        try:
            return ask(self.priced(run))
        except PlannerError as error:
            return Skipped(run_id=run.run_id, reason=str(error))
        except Exception as error:
            # One row of a stranger's table must not take the others along.
            reason = f"cannot be modeled: {type(error).__name__}: {str(error)[:200]}"
            return Skipped(run_id=run.run_id, reason=reason)

    def priced(self, run: MeasuredRun) -> PricedRun:
        """The run's plan on its graph, with its table.

        Raises:
            PlannerError: the run cannot be modeled.
        """
        run = with_family(run)
        software = software_of(run)
        degrees, of_degrees = degrees_of(run)
        cluster, of_cluster = cluster_of(run)
        software, of_units = _with_units(software, cluster)
        built, of_model = model_of(run, software)
        job = JobSpec(
            global_batch=run.global_batch or 1,
            seq_len=built.seq_len or None,
            precision=software.precision,
        )
        said = (*software.assumptions, *of_degrees, *of_cluster, *of_units, *of_model)
        exact_batch = degrees.dp * degrees.num_microbatches * max(round(degrees.micro_batch), 1)
        for batch in (self.batch, exact_batch) if degrees.ep == 1 else (exact_batch,):
            try:
                return self._on_graph(run, built, software, degrees, cluster, job, batch, said)
            except PlanRefused:
                if batch == exact_batch:
                    raise
        raise AssertionError("the last batch returns or raises")

    def _on_graph(
        self,
        run: MeasuredRun,
        built: RunModel,
        software: Software,
        degrees: Degrees,
        cluster: Cluster,
        job: JobSpec,
        batch: int,
        said: tuple[str, ...],
    ) -> PricedRun:
        """Priced on a graph of ``batch`` samples: shared where that is ``self.batch``."""
        captured = self._capture(built, software.precision, batch)
        found = captured.analyzed
        model = self._model(built, captured, cluster, job, software, batch)
        shards = shards_of(
            found.segmentation,
            found.labels.by_segment,
            degrees,
            sequence_parallel=software.sequence_parallel and degrees.tp > 1,
            sizes=found.analysis.class_size,
        )
        plan, of_plan = given_plan(
            run,
            degrees,
            software,
            found.segmentation,
            shards,
            graph=GraphReference(
                reference=run.model_name or run.arch or "model",
                graph_sha256="",
                num_parameters=captured.graph.num_parameters,
                num_segments=len(found.segmentation.segments),
            ),
            job=job,
        )
        sizes = degrees.inner_sizes
        is_shared = batch == self.batch and degrees.ep == 1
        if is_shared:
            by_segment = [_all_in_dp_shard(shards[number]) for number in model.segment_classes]
            table = model.table_of_segments(by_segment, {**sizes, "dp_shard": 2, MICRO: 2})
        else:
            table = model.table_of_plan(plan)
        if is_shared and not table.columns.is_scaled:
            raise PlanRefused("the graph's amounts do not scale with the batch")
        table = self._as_software_does(table, software, degrees, built)
        samples = degrees.micro_batch * degrees.dp * degrees.num_microbatches
        return PricedRun(
            run=run,
            model=model,
            table=table,
            plan=plan,
            reports_last_rank=software.reports_last_rank,
            batch_scale=samples / batch if table.columns.is_scaled else 1.0,
            graph=captured.graph,
            assumptions=(*said, *of_plan, *unlike_told(run, captured.graph.num_parameters)),
        )

    def _as_software_does(
        self, table: CostTable, software: Software, degrees: Degrees, built: RunModel
    ) -> CostTable:
        """The table with what the software does in ways of its own."""
        if degrees.cp > 1:
            if software.balances_context:
                table = self._with_balanced_rings(table, degrees.cp)
            table = self._with_ring_share(table, built.ring_share(degrees.tp))
        if software.dropout > 0 and not software.fused_attention:
            table = self._with_masks(table)
        is_selective = software.recompute is Recompute.SELECTIVE
        if is_selective and software.selective is not Selective.POINTWISE:
            table = self._with_selective(table, software.selective)
        return table

    def _with_balanced_rings(self, table: CostTable, ways: int) -> CostTable:
        key = (table, "rings")
        found = _recall(self._selective, key)
        if found is None:
            found = table.with_balanced_rings(ways)
            _remember(self._selective, key, found, _MAX_MODELS)
        return found

    def _with_ring_share(self, table: CostTable, share: float) -> CostTable:
        key = (table, "ring share", share)
        found = table if share == 1.0 else _recall(self._selective, key)
        if found is None:
            found = table.with_ring_share(share)
            _remember(self._selective, key, found, _MAX_MODELS)
        return found

    def _with_masks(self, table: CostTable) -> CostTable:
        key = (table, "masks")
        found = _recall(self._selective, key)
        if found is None:
            found = table.with_value_bytes(bytes_with_masks(table.columns, table.item_bytes))
            _remember(self._selective, key, found, _MAX_MODELS)
        return found

    def _with_selective(self, table: CostTable, selective: Selective) -> CostTable:
        key = (table, selective)
        found = _recall(self._selective, key)
        if found is None:
            found = table.with_kept(kept_nodes(table.columns.nodes, selective))
            _remember(self._selective, key, found, _MAX_MODELS)
        return found

    def _capture(self, built: RunModel, precision: Precision, batch: int) -> _Captured:
        key = (built.key, precision, batch)
        found = _recall(self._captured, key)
        if found is None:
            dtype = getattr(torch, TORCH_DTYPE[precision])
            inputs = built.inputs(batch, dtype)
            graph = capture(built.build(dtype), (), inputs, name=built.key).graph
            analyzed = analyze_graph(with_explicit_factories(graph))
            found = _Captured(graph=graph, analyzed=analyzed)
            _remember(self._captured, key, found, _MAX_GRAPHS)
        return found

    def _model(
        self,
        built: RunModel,
        captured: _Captured,
        cluster: Cluster,
        job: JobSpec,
        software: Software,
        batch: int,
    ) -> StepCostModel:
        calibration = calibration_for(software, self.pricing.calibration)
        key = (built.key, job.precision, batch, calibration, cluster.hosts, cluster.levels)
        model = _recall(self._models, key)
        if model is None:
            found = captured.analyzed
            model = StepCostModel(
                found.analysis,
                found.segmentation,
                found.labels,
                cluster=cluster,
                job=job,
                periods=found.periods,
                pricing=replace(self.pricing, calibration=calibration),
            )
            _remember(self._models, key, model, _MAX_MODELS)
        return model


def _all_in_dp_shard(shard: dict[str, list[str]]) -> dict[str, list[str]]:
    """Labels of each axis, with ``dp_shard`` for both axes of data parallelism."""
    rest = {axis: labels for axis, labels in shard.items() if axis != "dp_replicate"}
    return {**rest, "dp_shard": shard.get("dp_shard", [])}


def _with_units(software: Software, cluster: Cluster) -> tuple[Software, tuple[str, ...]]:
    """``software`` with products in a type all devices have units for."""
    wanted = software.matmul_dtype
    usual = TORCH_DTYPE[software.precision]
    for dtype in dict.fromkeys((wanted, FP8 if wanted == "nvfp4" else usual, usual)):
        if all(dtype in device.flop_per_s for device in cluster.devices):
            said = () if dtype == wanted else (f"no units for {wanted}: {dtype}",)
            return replace(software, matmul_dtype=dtype), said
    return software, ()


def _recall(known: OrderedDict[Hashable, _Value], key: Hashable) -> _Value | None:
    if key in known:
        known.move_to_end(key)
        return known[key]
    return None


def _remember(
    known: OrderedDict[Hashable, _Value], key: Hashable, value: _Value, most: int
) -> None:
    known[key] = value
    while len(known) > most:
        known.popitem(last=False)


def _measured_stage(priced: PricedRun, cost: StepCost) -> int:
    """The stage whose peak was measured: the fullest one, or the fullest of the last rank."""
    if not priced.reports_last_rank:
        return cost.fullest_stage
    groups = priced.plan.mesh.pp
    last = np.arange(groups - 1, len(cost.memory.peak_bytes), groups)
    return int(last[np.argmax(cost.memory.peak_bytes[last])])


def _prediction(priced: PricedRun, cost: StepCost, learned: Mapping[str, float]) -> RunPrediction:
    stage = _measured_stage(priced, cost)
    memory = {cause: int(cost.memory.by_cause[cause][stage]) for cause in CAUSES}
    prediction = priced.model.prediction(cost, priced.model.cluster.num_devices, learned=learned)
    return RunPrediction(
        run_id=priced.run.run_id,
        step_time_s=cost.time_s,
        step_time_interval_s=prediction.step_time_interval_s,
        peak_memory_bytes=sum(memory.values()),
        memory_capacity_bytes=int(cost.capacity_bytes[stage]),
        fits=cost.fits,
        fullness=float((cost.memory.peak_bytes / np.maximum(cost.capacity_bytes, 1)).max()),
        breakdown=dict(cost.breakdown_s),
        memory_breakdown=memory,
        num_parameters=priced.graph.num_parameters,
        assumptions=priced.assumptions,
        source=tuple(prediction.source),
    )
