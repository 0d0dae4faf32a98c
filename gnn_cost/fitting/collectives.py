"""The collectives' part of a fit: constants of the formulas, and errors on every split.

Measured collectives of Records say how many ranks took part and on how many hosts, and nothing of
the links between them: they are learned from where the cluster is told.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.model import Cluster, GroupLevel
from meshwright.errors import BadRequest
from meshwright.gnn_cost.collectives import CollectiveModel
from meshwright.gnn_cost.collectives.fit import fit_constants, predicted_time_s
from meshwright.gnn_cost.collectives.samples import (
    CollectiveSamples,
    joined,
    samples_from_records,
    samples_from_table,
    thinned,
)
from meshwright.gnn_cost.collectives.splits import splits
from meshwright.gnn_cost.collectives.training import fit_collectives
from meshwright.gnn_cost.fitting.cards import part_card
from meshwright.gnn_cost.fitting.parts import (
    FitData,
    PartContext,
    PartResult,
    SplitError,
    WorstCases,
)
from meshwright.gnn_cost.held_out import Split
from meshwright.records import Kind, Record
from meshwright.strict_json import JsonValue

__all__ = ["CollectivesPart", "collectives_of_records", "read_collectives"]

FloatArray = NDArray[np.float64]

_NUM_WORST = 50
_JUDGED_FRACTION = 0.25
"""Of the time that judging takes; the rest is the fit."""


class _OutOfTime(Exception):
    """The budget is spent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivesPart:
    """Fits ``gnn_cost.collectives``; all of it or, where the budget ends before, nothing."""

    name: str = "collectives"
    budget_weight: float = 2.0
    uses_others: bool = False
    file: str = "collectives.json"

    def reason_to_skip(self, data: FitData) -> str:
        """See ``Part``."""
        records = any(record.kind == Kind.COLLECTIVE for record in data.records)
        if data.collectives or (records and data.cluster is not None):
            return ""
        if records:
            return "measured collectives in the records, but of which cluster? give --cluster"
        return "no measured collectives; give --tables or --records with some"

    def fit(self, data: FitData, context: PartContext) -> PartResult:
        """See ``Part``."""
        samples, dropped = read_collectives(data)
        figures: dict[str, JsonValue] = {
            "num_measured": samples.count,
            "left_out_rows": dict(dropped),
        }

        def progress(fraction: float, text: str) -> None:
            if context.left_s() <= 0:
                raise _OutOfTime
            context.progress(fraction * (1 - _JUDGED_FRACTION), text)

        judged = _Judged()
        try:
            model = fit_collectives(
                samples, seed=context.settings.seed, progress=progress, on_split=judged.add
            )
        except _OutOfTime:
            return PartResult(tensors={}, settings={}, figures=figures, is_cut=True)
        _judge_others(thinned(samples), judged, context)
        errors, worst = judged.errors, judged.worst
        result = PartResult(
            tensors={}, settings={}, splits=tuple(errors), worst=worst, figures=figures
        )
        card = part_card(result, data=data, settings=context.settings, reproduce=context.reproduce)
        whole: CollectiveModel = msgspec.structs.replace(model, card=card)
        return PartResult(
            tensors={},
            settings={},
            documents={self.file: msgspec.to_builtins(whole)},
            splits=result.splits,
            worst=worst,
            figures=figures,
        )


def read_collectives(data: FitData) -> tuple[CollectiveSamples, dict[str, int]]:
    """Measured collectives of all tables and Records, and how many rows were left out, by reason.

    Raises:
        BadRequest: a table cannot be read.
    """
    parts: list[CollectiveSamples] = []
    dropped: dict[str, int] = {}
    for path in data.collectives:
        samples, reasons = samples_from_table(path)
        parts.append(samples)
        for reason, count in reasons.items():
            dropped[reason] = dropped.get(reason, 0) + count
    if data.cluster is not None:
        parts.append(collectives_of_records(data.records, data.cluster))
    return joined(parts), dropped


def collectives_of_records(records: tuple[Record, ...], cluster: Cluster) -> CollectiveSamples:
    """Those that were measured on ``cluster``: groups of its first ranks, or of each host's first.

    Raises:
        BadRequest: the cluster has devices of several types.
    """
    if not cluster.is_homogeneous:
        raise BadRequest(
            f"--cluster: {cluster.name} has several types of device; give one for each type, with "
            f"the records measured on it"
        )
    levels: dict[tuple[int, int], tuple[GroupLevel, ...]] = {}
    for record in records:
        size, hosts = record.extra.get("group_size"), record.extra.get("hosts") or 1
        if (
            record.kind != Kind.COLLECTIVE
            or not isinstance(size, int)
            or not isinstance(hosts, int)
        ):
            continue
        ranks = _ranks(cluster, size, hosts)
        if ranks:
            levels[size, hosts] = cluster.group_levels(ranks)
    return samples_from_records(records, levels, cluster.devices[0])


def _ranks(cluster: Cluster, size: int, hosts: int) -> list[int]:
    """Ranks of a group of ``size`` on ``hosts`` hosts; empty where the cluster has none such."""
    if hosts < 1 or size % hosts or hosts > cluster.num_hosts:
        return []
    each = size // hosts
    found = [list(cluster.devices_of_host(host))[:each] for host in range(hosts)]
    return [rank for ranks in found for rank in ranks] if all(len(r) == each for r in found) else []


class _Judged:
    """Errors of constants fitted without each split's test."""

    def __init__(self) -> None:
        self.errors: list[SplitError] = []
        self.names: set[str] = set()
        self._rows: list[tuple[float, tuple[JsonValue, ...]]] = []

    def add(self, split: Split, test: CollectiveSamples, predicted_s: FloatArray) -> None:
        """One more split."""
        name = f"{split.kind}: {split.name}"
        self.names.add(name)
        kinds, gpus = test.labels("kind"), test.labels("gpu")
        ratio = predicted_s / test.time_s
        for group in ("all", *np.unique(kinds)):
            here = np.ones(len(kinds), np.bool_) if group == "all" else kinds == group
            self.errors.append(
                SplitError(
                    split=name,
                    group=str(group),
                    num_samples=int(here.sum()),
                    mape=float(np.mean(np.abs(ratio[here] - 1))),
                    bias=float(np.mean(ratio[here] - 1)),
                )
            )
        for place in np.argsort(-np.abs(np.log(ratio)), kind="stable")[:_NUM_WORST]:
            row: tuple[JsonValue, ...] = (
                name,
                str(gpus[place]),
                str(kinds[place]),
                test.groups[test.group[place]].num_ranks,
                float(test.num_bytes[place]),
                float(test.time_s[place]),
                float(predicted_s[place]),
            )
            self._rows.append((-abs(float(np.log(ratio[place]))), row))

    @property
    def worst(self) -> WorstCases:
        """Of all splits."""
        columns = ("split", "gpu", "kind", "group_size", "bytes", "measured_s", "predicted_s")
        chosen = sorted(self._rows, key=lambda row: row[0])[:_NUM_WORST]
        return WorstCases(columns=columns, rows=tuple(row for _, row in chosen))


def _judge_others(samples: CollectiveSamples, judged: _Judged, context: PartContext) -> None:
    """The splits that the fit itself did not need, as far as the budget goes."""
    planned = [
        split for split in splits(samples) if f"{split.kind}: {split.name}" not in judged.names
    ]
    for done, split in enumerate(planned):
        if context.left_s() <= 0:
            break
        fraction = 1 - _JUDGED_FRACTION * (1 - done / len(planned))
        context.progress(fraction, f"judging without {split.name}")
        constants = fit_constants(samples.where(split.train), seed=context.settings.seed)
        test = samples.where(split.test)
        judged.add(split, test, predicted_time_s(constants, test))
