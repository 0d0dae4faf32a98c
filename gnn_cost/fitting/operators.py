"""The operators' part of a fit: an ensemble of graph networks, and its errors on what was held out.

Of each combination of source, device, operator, direction and dtype at most ``rows_per_cell``
measurements are learned from, drawn by the seed. Groups of shapes that no member was trained on are
the split ``"held-out shapes"``; for each device of ``left_out`` another ensemble is trained without
it, from the beginning, and judged on it alone (``"without device: NAME"``). The weights kept are
those of the ensemble that saw all devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from meshwright.cluster.model import Cluster, Device
from meshwright.cost.work import OperatorWork
from meshwright.errors import BadRequest
from meshwright.gnn_cost.ensemble import EnsembleSettings, FittedEnsemble, fit_ensemble
from meshwright.gnn_cost.fitting.parts import (
    FitData,
    FitSettings,
    PartContext,
    PartResult,
    SplitError,
    WorstCases,
)
from meshwright.gnn_cost.intervals import half_widths
from meshwright.gnn_cost.operators.overheads import host_overhead_s
from meshwright.gnn_cost.operators.samples import (
    OperatorSamples,
    catalog_device,
    measured_operators,
    operators_of_records,
    read_operator_table,
)
from meshwright.gnn_cost.operators.splits import subsample, take, with_rest
from meshwright.gnn_cost.predictor import WEIGHTS_KIND, LearnedOperators
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.gnn_cost.training import EpochMetrics, TrainingSettings
from meshwright.records import Kind
from meshwright.strict_json import JsonValue

__all__ = ["OperatorsPart", "graphs_of", "joined_graphs", "read_graphs", "split_errors"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_CELL = ("source", "device_name", "op", "direction", "dtype")
_NUM_WORST = 50
_MAX_SHOWN_REASONS = 8
_ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorsPart:
    """Trains ``gnn_cost.ensemble``."""

    name: str = WEIGHTS_KIND
    budget_weight: float = 8.0
    uses_others: bool = False
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def reason_to_skip(self, data: FitData) -> str:
        """See ``Part``."""
        if data.operators or any(record.kind == Kind.OPERATOR for record in data.records):
            return ""
        return "no measured operators; give --tables or --records with some"

    def fit(self, data: FitData, context: PartContext) -> PartResult:
        """See ``Part``."""
        context.progress(0.0, "reading")
        torch.set_num_threads(context.settings.num_threads)
        graphs, dropped = read_graphs(data)
        settings = context.settings
        left_out = _devices_named(graphs, settings.left_out)
        fits = _Fits(self.training, context, num_fits=1 + len(left_out))
        seen = np.ones(graphs.count, np.bool_)
        chosen = _prepared(graphs, seen, settings)
        fitted = fits.run(chosen, "ensemble")
        held = take(chosen, fitted.is_held_out)
        splits = split_errors("held-out shapes", fitted.model, held) if held.count else []
        worst = [("held-out shapes", fitted.model, held)]
        for name in left_out:
            test = graphs.labels["device_name"] == name
            other = fits.run(_prepared(graphs, ~test, settings), f"without-{name}")
            judged = with_rest(graphs, host_overhead_s(graphs, seen=~test))
            judged = _thinned(take(judged, test), settings)
            splits += split_errors(f"without device: {name}", other.model, judged)
            worst.append((f"without device: {name}", other.model, judged))
        return PartResult(
            tensors=fitted.tensors,
            settings=dict(fitted.card),
            splits=tuple(splits),
            worst=_worst(worst),
            figures={
                "num_measured": graphs.count,
                "num_learned_from": chosen.count,
                "left_out_rows": dict(list(dropped.items())[:_MAX_SHOWN_REASONS]),
                "epochs": [len(history) for history in fitted.histories],
                "devices": [*sorted(device.name for device in graphs.devices)],
            },
            is_cut=fits.is_cut,
        )


class _Fits:
    """Trains ensembles one after another, telling how far all of them are."""

    def __init__(self, training: TrainingSettings, context: PartContext, *, num_fits: int) -> None:
        self._context = context
        self._num_fits = num_fits
        self._num_done = 0
        own = context.settings
        epochs = own.max_epochs or training.max_epochs
        self._settings = EnsembleSettings(
            num_members=own.num_members,
            training=replace(training, seed=own.seed, max_epochs=epochs),
        )
        self.is_cut = False

    def run(self, graphs: MeasuredGraphs, name: str) -> FittedEnsemble:
        """One ensemble; its checkpoints stand under ``name``."""
        folder: Path = self._context.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        fitted = fit_ensemble(
            self._settings,
            graphs,
            checkpoints=folder,
            on_epoch=self._teller(name),
            is_stopped=self._is_stopped(),
        )
        self._num_done += 1
        self.is_cut = self.is_cut or fitted.is_cut
        return fitted

    def _is_stopped(self) -> Callable[[], bool]:
        """Leaves time for what comes after training, about as long as two epochs."""
        last_s, longest_s = [time.monotonic()], [0.0]

        def is_stopped() -> bool:
            now_s = time.monotonic()
            longest_s[0] = max(longest_s[0], now_s - last_s[0])
            last_s[0] = now_s
            return self._context.left_s() < 2 * longest_s[0]

        return is_stopped

    def _teller(self, name: str) -> Callable[[int, EpochMetrics], None]:
        num_members = self._settings.num_members

        def tell(member: int, metrics: EpochMetrics) -> None:
            self._context.tracker.metrics(
                f"operators/{name}/{member}",
                {"loss": metrics.loss, "held_out_error": metrics.held_out_error},
                step=metrics.epoch,
            )
            of_member = (metrics.epoch + 1) / metrics.num_epochs
            of_fit = (member + of_member) / num_members
            self._context.progress(
                min((self._num_done + of_fit) / self._num_fits, 1.0),
                f"{name}, network {member + 1} of {num_members}, epoch {metrics.epoch + 1}, "
                f"held-out error {metrics.held_out_error:.1%}",
            )

        return tell


def read_graphs(data: FitData) -> tuple[MeasuredGraphs, dict[str, int]]:
    """Measured operators of all tables and Records, and how many rows taught nothing, by reason.

    Raises:
        BadRequest: a table cannot be read, or no row is left.
    """
    graphs, dropped = graphs_of(data)
    if graphs is None:
        said = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
        hint = "; say by --cluster what the records were measured on" if data.records else ""
        raise BadRequest(
            f"operators: no row teaches anything: {said or 'the tables are empty'}{hint}"
        )
    return graphs, dropped


def graphs_of(data: FitData) -> tuple[MeasuredGraphs | None, dict[str, int]]:
    """As ``read_graphs``, with None where no row is left.

    Raises:
        BadRequest: a table cannot be read.
    """
    found: list[OperatorSamples] = []
    for path in data.operators:
        found.append(measured_operators(read_operator_table(path)))
    records = [record for record in data.records if record.kind == Kind.OPERATOR]
    if records:
        found.append(operators_of_records(records, find=_finder(data.cluster)))
    dropped: dict[str, int] = {}
    for samples in found:
        for reason, count in samples.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    return joined_graphs([samples.graphs for samples in found if samples.graphs.count]), dropped


def _finder(cluster: Cluster | None) -> Callable[[str], Device | None]:
    """Devices by name: the cluster's own first, for it may describe one the catalog lacks."""
    own = {} if cluster is None else {device.name: device for device in cluster.devices}
    return lambda name: own.get(name) or catalog_device(name)


def joined_graphs(parts: Sequence[MeasuredGraphs]) -> MeasuredGraphs | None:
    """All measurements of ``parts``, with the label ``device_name``; None for no parts."""
    if not parts:
        return None
    devices = tuple(dict.fromkeys(device for part in parts for device in part.devices))
    first_row = np.cumsum([0, *(part.work.count for part in parts)])
    first_graph = np.cumsum([0, *(part.count for part in parts)])

    def all_of(get: Callable[[MeasuredGraphs], NDArray[Any]], axis: int = 0) -> NDArray[Any]:
        return np.concatenate([get(part) for part in parts], axis=axis)

    def all_work(name: str) -> NDArray[Any]:
        return all_of(lambda part: getattr(part.work, name))

    device = np.concatenate(
        [
            np.array([devices.index(one) for one in part.devices], np.int64)[part.device]
            for part in parts
        ]
    )
    names = set.intersection(*(set(part.labels) for part in parts))
    labels: Mapping[str, NDArray[np.str_]] = {
        name: all_of(lambda part, name=name: part.labels[name])  # type: ignore[misc]
        for name in sorted(names)
    }
    return MeasuredGraphs(
        work=OperatorWork(
            **{
                name: all_work(name)
                for name in ("family", "dtype", "dims", "flop", "num_bytes", "edge_kind")
            },
            edges=np.concatenate(
                [part.work.edges + row for part, row in zip(parts, first_row, strict=False)], axis=1
            ),
        ),
        graph=np.concatenate(
            [part.graph + graph for part, graph in zip(parts, first_graph, strict=False)]
        ),
        weight=all_of(lambda part: part.weight),
        devices=devices,
        device=device,
        time_s=all_of(lambda part: part.time_s),
        rest_s=all_of(lambda part: part.rest_s),
        labels={**labels, "device_name": np.array([one.name for one in devices])[device]},
    )


def _prepared(graphs: MeasuredGraphs, seen: BoolArray, settings: FitSettings) -> MeasuredGraphs:
    """Those that may be seen, without what their measuring added, and not too many of a kind."""
    known = take(with_rest(graphs, host_overhead_s(graphs, seen=seen)), seen)
    return _thinned(known, settings)


def _thinned(graphs: MeasuredGraphs, settings: FitSettings) -> MeasuredGraphs:
    rng = np.random.default_rng([settings.seed, 7])
    return subsample(graphs, most=settings.rows_per_cell, by=_CELL, rng=rng)


def _devices_named(graphs: MeasuredGraphs, wanted: Sequence[str]) -> list[str]:
    """Raises BadRequest where nothing was measured on one of them."""
    known = sorted({device.name for device in graphs.devices})
    if list(wanted) == [_ALL]:
        return known if len(known) > 1 else []
    for name in wanted:
        if name not in known:
            raise BadRequest(
                f"--leave-out: nothing was measured on {name!r}; known: {', '.join(known)}"
            )
        if len(known) == 1:
            raise BadRequest(f"--leave-out: all was measured on {name}; nothing would be left")
    return list(wanted)


def split_errors(split: str, model: LearnedOperators, graphs: MeasuredGraphs) -> list[SplitError]:
    """Errors of all graphs, of each kind of operator and of each device."""
    ratio = model.predict(graphs) / graphs.time_s
    scale, family = model.graph_scales(graphs)
    inside = np.abs(np.log(ratio)) <= half_widths(model.tensors, scale, family)
    groups: list[tuple[str, BoolArray]] = [(_ALL, np.ones(graphs.count, np.bool_))]
    for label in ("kind", "device_name"):
        values = graphs.labels[label]
        groups += [(str(value), values == value) for value in np.unique(values)]
    return [
        SplitError(
            split=split,
            group=group,
            num_samples=int(here.sum()),
            mape=float(np.mean(np.abs(ratio[here] - 1))),
            bias=float(np.mean(ratio[here] - 1)),
            coverage=float(np.mean(inside[here])),
        )
        for group, here in groups
    ]


def _worst(judged: Sequence[tuple[str, LearnedOperators, MeasuredGraphs]]) -> WorstCases:
    rows: list[tuple[JsonValue, ...]] = []
    labels = ("source", "device_name", "op", "direction", "dtype", "shape")
    for split, model, graphs in judged:
        if not graphs.count:
            continue
        predicted_s = model.predict(graphs)
        error = np.abs(np.log(predicted_s / graphs.time_s))
        for place in np.argsort(-error, kind="stable")[:_NUM_WORST]:
            rows.append(
                (
                    split,
                    *(str(graphs.labels[name][place]) for name in labels),
                    float(graphs.time_s[place]),
                    float(predicted_s[place]),
                )
            )
    return WorstCases(columns=("split", *labels, "measured_s", "predicted_s"), rows=tuple(rows))
