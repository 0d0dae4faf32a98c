"""Measured runs as graphs to learn from: one graph a run, of the operators of its step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.bench.predict import Predictor
from meshwright.bench.runs import MeasuredRun, Skipped
from meshwright.cluster.model import Device
from meshwright.cost.step_graph import StepGraph, graph_of_choice
from meshwright.cost.work import OperatorWork
from meshwright.errors import PlannerError
from meshwright.gnn_cost.operators.splits import take
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.gnn_cost.steps.correction import STEP_FEATURES, step_features

__all__ = ["LABELS", "RunGraphs", "run_graphs"]

LABELS = (
    "run_id", "source", "arch", "model", "gpu", "gpus", "layers", "hidden", "tp", "pp", "dp",
    "micro_batch", "precision", "job", "plan",
)  # fmt: skip
"""Of each graph, for splits and reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunGraphs:
    """Measured runs as graphs, and those that have none."""

    runs: tuple[MeasuredRun, ...]
    """Of each graph."""
    graphs: MeasuredGraphs
    """G graphs."""
    launch_s: np.ndarray
    """(G,) part of ``graphs.rest_s`` in which the device waits for launches."""
    row_s: np.ndarray
    """(N,) of each row of ``graphs``, as it is priced."""
    breakdown_s: Mapping[str, np.ndarray]
    """(G,) predicted seconds by cause; they sum to the predicted step."""
    features: np.ndarray
    """(G, F) ``step_correction.STEP_FEATURES``."""
    num_microbatches: np.ndarray
    """(G,)"""
    skipped: tuple[Skipped, ...]

    @property
    def predicted_s(self) -> np.ndarray:
        """(G,) step times as the predictor prices them."""
        return np.asarray(sum(self.breakdown_s.values(), np.zeros(self.graphs.count)))

    def where(self, chosen: np.ndarray) -> RunGraphs:
        """Those of a (G,) mask; what was skipped stays told."""
        return replace(
            self,
            runs=tuple(self.runs[place] for place in np.flatnonzero(chosen)),
            graphs=take(self.graphs, chosen),
            launch_s=self.launch_s[chosen],
            row_s=self.row_s[chosen[self.graphs.graph]],
            breakdown_s={cause: one[chosen] for cause, one in self.breakdown_s.items()},
            features=self.features[chosen],
            num_microbatches=self.num_microbatches[chosen],
        )


def run_graphs(runs: Iterable[MeasuredRun], predictor: Predictor | None = None) -> RunGraphs:
    """The graphs of runs with a measured time.

    ``graphs.rest_s`` is what the predictor's pricing says of all but operators; by default the
    analytic one.
    """
    predictor = predictor or Predictor()
    kept: list[MeasuredRun] = []
    found: list[StepGraph] = []
    causes: list[Mapping[str, float]] = []
    features: list[np.ndarray] = []
    microbatches: list[int] = []
    skipped: list[Skipped] = []
    for run in runs:
        if run.measured_s is None:
            reason = "out of memory" if run.oom else "no step time is told"
            skipped.append(Skipped(run_id=run.run_id, reason=reason))
            continue
        try:
            priced = predictor.priced(run)
            graph = graph_of_choice(priced.model, priced.table, priced.choice)
            cost = priced.cost()
        except PlannerError as error:
            skipped.append(Skipped(run_id=run.run_id, reason=str(error)))
            continue
        features.append(step_features(priced.shape(cost)))
        kept.append(run)
        found.append(graph)
        causes.append(cost.breakdown_s)
        microbatches.append(priced.choice.split.num_microbatches)
    return RunGraphs(
        runs=tuple(kept),
        graphs=_measured(kept, found),
        launch_s=np.array([graph.launch_s for graph in found], dtype=np.float64),
        row_s=_concatenated([graph.time_s for graph in found]),
        breakdown_s={
            cause: np.array([one[cause] for one in causes], dtype=np.float64)
            for cause in (causes[0] if causes else ())
        },
        features=np.array(features, dtype=np.float64).reshape(len(found), len(STEP_FEATURES)),
        num_microbatches=np.array(microbatches, dtype=np.float64),
        skipped=tuple(skipped),
    )


def _measured(runs: Sequence[MeasuredRun], found: Sequence[StepGraph]) -> MeasuredGraphs:
    devices: list[Device] = []
    for graph in found:
        if graph.device not in devices:
            devices.append(graph.device)
    counts = np.array([graph.work.count for graph in found], dtype=np.int64)
    return MeasuredGraphs(
        work=_joined([graph.work for graph in found]),
        graph=np.repeat(np.arange(len(found)), counts),
        weight=_concatenated([graph.weight for graph in found]),
        devices=tuple(devices),
        device=np.array([devices.index(graph.device) for graph in found], dtype=np.int64),
        time_s=np.array([run.measured_s for run in runs], dtype=np.float64),
        rest_s=np.array([graph.rest_s for graph in found], dtype=np.float64),
        labels={
            name: np.array([_label(run, name) for run in runs], dtype=np.str_) for name in LABELS
        },
    )


def _label(run: MeasuredRun, name: str) -> str:
    key = {"model": "model_name", "job": "job_key", "plan": "plan_key"}.get(name, name)
    value = getattr(run, key)
    return "" if value is None else str(value)


def _joined(works: Sequence[OperatorWork]) -> OperatorWork:
    """All rows of ``works``, one after the other."""
    first = np.cumsum([0, *(work.count for work in works)])
    return OperatorWork(
        family=_concatenated([work.family for work in works], np.int64),
        dtype=_concatenated([work.dtype for work in works], np.int64),
        dims=np.concatenate([np.zeros((0, 4)), *(work.dims for work in works)]),
        flop=_concatenated([work.flop for work in works]),
        num_bytes=_concatenated([work.num_bytes for work in works]),
        edges=np.concatenate(
            [
                np.zeros((2, 0), dtype=np.int64),
                *(work.edges + start for work, start in zip(works, first, strict=False)),
            ],
            axis=1,
        ),
        edge_kind=_concatenated([work.edge_kind for work in works], np.int64),
    )


def _concatenated(arrays: Sequence[np.ndarray], dtype: type = np.float64) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=dtype), *arrays])
