"""Measured collectives beside predictions: groups of ranks by columns, priced in one go each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.collectives import alternatives
from meshwright.cost.pricing import Pricing
from meshwright.errors import PlannerError
from meshwright.gnn_cost.collectives.samples import MeasuredGroup
from meshwright.gnn_cost.collectives.systems import Row, placed, reason_to_leave_out
from meshwright.spmd.program import CollectiveKind
from meshwright.strict_json import one_line

__all__ = ["CollectiveRows", "collective_rows", "price_collectives"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_TEXT_KEYS = ("source", "gpu", "fabric", "collective", "dtype", "extra")
_NUMBER_KEYS = ("group_size", "hosts")
_MOST_RANKS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveRows:
    """R rows of a table."""

    groups: Sequence[MeasuredGroup]
    group: IntArray
    """(R,) place in ``groups``; -1 for rows of none."""
    labels: Mapping[str, NDArray[np.str_]]
    """(R,) each."""
    reasons: NDArray[np.object_]
    """(R,) why a row is left out; empty where it is not."""


def collective_rows(columns: Mapping[str, NDArray[np.str_] | FloatArray]) -> CollectiveRows:
    """Rows by the group of ranks they were measured on.

    Args:
        columns: (R,) each; text with "" and numbers with NaN where a cell is empty.
    """
    num_rows = len(columns["time_s"])
    texts = {
        key: np.asarray(columns.get(key, np.full(num_rows, "")), dtype=np.str_)
        for key in _TEXT_KEYS
    }
    numbers = {
        key: np.asarray(columns.get(key, np.full(num_rows, np.nan)), dtype=np.float64)
        for key in _NUMBER_KEYS
    }
    codes = np.zeros(num_rows, dtype=np.int64)
    for values in (*texts.values(), *numbers.values()):
        _, part = np.unique(values, return_inverse=True)
        _, codes = np.unique(codes * (part.max(initial=0) + 1) + part, return_inverse=True)
    _, first, codes = np.unique(codes, return_index=True, return_inverse=True)
    groups: list[MeasuredGroup] = []
    place, why = np.full(len(first), -1), np.full(len(first), "", dtype=object)
    for number, row in enumerate(first.tolist()):
        found = _group(
            {key: str(values[row]) for key, values in texts.items()},
            {key: float(values[row]) for key, values in numbers.items()},
        )
        if isinstance(found, str):
            why[number] = found
        else:
            place[number] = len(groups)
            groups.append(found)
    reasons = why[codes]
    num_bytes = np.asarray(columns["bytes"], dtype=np.float64)
    reasons[~(np.isfinite(num_bytes) & (num_bytes > 0))] = "no bytes"
    sizes = np.nan_to_num(numbers["group_size"], posinf=0, neginf=0).astype(np.int64).astype(str)
    labels = {
        "op": texts["collective"], "gpu": texts["gpu"], "source": texts["source"],
        "dtype": texts["dtype"], "fabric": texts["fabric"], "group_size": sizes,
    }  # fmt: skip
    return CollectiveRows(groups=groups, group=place[codes], labels=labels, reasons=reasons)


def _group(texts: Mapping[str, str], numbers: Mapping[str, float]) -> MeasuredGroup | str:
    """The group of some rows, or why there is none."""
    for key, value in numbers.items():
        if key == "hosts" and np.isnan(value):
            continue
        if not (1 <= value <= _MOST_RANKS and value == int(value)):
            return f"{key} is no whole number of 1 or more"
    if numbers["group_size"] == 1:
        return "group_size is 1: nothing is exchanged"
    try:
        extra = json.loads(texts["extra"] or "{}")
    except (ValueError, RecursionError):
        extra = {}
    hosts = numbers["hosts"]
    row = Row.of(
        {
            **texts,
            "group_size": int(numbers["group_size"]),
            "hosts": int(np.nan_to_num(hosts) or 1),
        },
        extra if isinstance(extra, dict) else {},
    )
    if row.hosts > row.group_size:
        return "more hosts than ranks"
    reason = reason_to_leave_out(row)
    if reason:
        return reason
    try:
        return placed(row, MeasuredGroup)
    except PlannerError as error:
        return one_line(str(error))


def price_collectives(
    groups: Sequence[MeasuredGroup], group: IntArray, num_bytes: FloatArray, pricing: Pricing
) -> tuple[FloatArray, FloatArray]:
    """(N,) seconds of collectives of ``num_bytes``, and (N,) trust.

    A message between two ranks is priced as the core prices sends of a pipeline.
    """
    time_s, trust = np.zeros(len(group)), np.zeros(len(group))
    for number, one in enumerate(groups):
        mine = np.flatnonzero(group == number)
        if not len(mine):
            continue
        kind = CollectiveKind.HALO if one.kind == "send_recv" else CollectiveKind(one.kind)
        payload = num_bytes[mine]
        if pricing.collectives is None:
            ways = alternatives(
                kind, one.levels, one.num_ranks,
                link_efficiency=pricing.calibration.link_efficiency,
            )  # fmt: skip
            costs = [fixed_s + payload * each for fixed_s, each in ways]
            time_s[mine] = np.minimum.reduce(costs) if costs else np.nan
        else:
            found = pricing.collectives.collectives(
                kind, payload, levels=one.levels, num_ranks=one.num_ranks, device=one.device
            )
            time_s[mine], trust[mine] = found.time_s, found.trust
    return time_s, trust
