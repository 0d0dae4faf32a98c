"""Time of measuring that is no operator's: what a host adds where it launches one at a time.

Some tables hold times of kernels, or of many launches that the queue hides. Others clock one
launch from the host, and hold a part of tens of microseconds that has nothing to do with the
work: small operators all take the same time. That part goes to ``rest_s``, found from rows whose
work is small beside their time, for each source, device, operator and direction. A device none of
whose rows may be looked at gets the median of the other devices of its source; a source of which
nothing may be looked at, that of other such sources. Where launches queue, the host adds only what
the device waits for the next one; nothing of it is found from times that may not be looked at.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from meshwright.gnn_cost.features import ideal_time_s
from meshwright.gnn_cost.samples import MeasuredGraphs

__all__ = ["HOST_TIMED_SOURCES", "graph_ideal_time_s", "host_overhead_s"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

HOST_TIMED_SOURCES = ("aceso", "alpa_prof_database", "neusight", "sailor", "sailor_ops")
"""Published tables that clock one launch from the host; their smallest operators take 25 to 50
microseconds on every device, those of the others 1 to 3."""

_QUEUED_SOURCES = ("aceso", "sailor_ops")
"""Sources that time many launches with one wait: the longer of launch and work shows. Else their
large products would run at twice the data sheet's rate."""

_USUAL_EFFICIENCY = 0.7
_KERNEL_FLOOR_S = 3e-6
_LAUNCH_BOUND_FRACTION = 0.35
"""A row tells of overhead where its work at the usual efficiency takes less of its time."""
_FEWEST_ROWS = 5
_LEAST_HOST_TIMED_S = 15e-6
_UNKNOWN_OVERHEAD_S = 25e-6


def graph_ideal_time_s(graphs: MeasuredGraphs) -> FloatArray:
    """Sum of ``ideal_time_s`` of each graph's rows, weighted; (G,)."""
    of_rows = ideal_time_s(graphs.work, graphs.devices, graphs.device[graphs.graph])
    weighted_s: FloatArray = graphs.weight * of_rows
    return np.bincount(graphs.graph, weighted_s, minlength=graphs.count).astype(np.float64)


def host_overhead_s(graphs: MeasuredGraphs, *, seen: BoolArray) -> FloatArray:
    """What the host adds to each measurement; (G,), 0 for sources that do not clock launches.

    Args:
        graphs: with labels ``source``, ``gpu``, ``op`` and ``direction``.
        seen: (G,) whose times may be looked at.
    """
    labels = graphs.labels
    overhead_s = np.zeros(graphs.count)
    timed = _is_host_timed(graphs, seen)
    if not timed.any():
        return overhead_s
    work_s = graph_ideal_time_s(graphs) / _USUAL_EFFICIENCY
    small = seen & timed & (work_s < _LAUNCH_BOUND_FRACTION * graphs.time_s)
    device_s = work_s + _KERNEL_FLOOR_S
    is_queued = np.isin(labels["source"], _QUEUED_SOURCES)
    over_s = graphs.time_s - np.where(is_queued, 0.0, device_s)

    def of_cell(members: FloatArray) -> float:
        return float(np.quantile(members, 0.1)) if len(members) >= _FEWEST_ROWS else np.nan

    def medians(values: FloatArray, where: BoolArray, *names: str) -> FloatArray:
        # One value for each device first, so that a device with many rows does not outweigh others.
        return _by_group(values, where, [labels[name] for name in names], _median)

    cell_names = [labels[name] for name in ("source", "gpu", "op", "direction")]
    cell = _by_group(over_s, small, cell_names, of_cell)
    # Products that run far below their peak look like launches; the fastest rows tell them apart.
    cell = np.minimum(cell, _by_group(graphs.time_s, seen, cell_names, _fastest))
    known = small & np.isfinite(cell)
    chain = (
        cell,
        medians(cell, known, "source", "op", "direction"),
        medians(cell, known, "op", "direction"),
        medians(cell, known, "source"),
        np.full(graphs.count, np.median(cell[known]) if known.any() else _UNKNOWN_OVERHEAD_S),
    )
    found = np.full(graphs.count, np.nan)
    for level in chain:
        found = np.where(np.isfinite(found), found, level)
    # Of a launch in a queue only what the device waits for shows.
    found = np.where(is_queued, found - device_s, found)
    overhead_s[timed] = np.maximum(found[timed], 0.0)
    return overhead_s


def _is_host_timed(graphs: MeasuredGraphs, seen: BoolArray) -> BoolArray:
    """By source: stated for published tables, told from the smallest time for others."""
    source = graphs.labels["source"]
    timed = np.isin(source, HOST_TIMED_SOURCES)
    for name in np.unique(source[~timed]):
        here = seen & (source == name)
        if here.sum() >= _FEWEST_ROWS and graphs.time_s[here].min() > _LEAST_HOST_TIMED_S:
            timed |= source == name
    return np.asarray(timed)


def _fastest(members: FloatArray) -> float:
    return float(np.quantile(members, 0.02)) if len(members) else np.nan


def _median(members: FloatArray) -> float:
    return float(np.median(np.unique(members))) if len(members) else np.nan


def _by_group(
    values: FloatArray,
    where: BoolArray,
    names: list[NDArray[np.str_]],
    summary: Callable[[FloatArray], float],
) -> FloatArray:
    """The summary of those ``where`` holds of each group, at all members of the group; (G,)."""
    keys = names[0]
    for more in names[1:]:
        keys = np.char.add(np.char.add(keys, "|"), more)
    found, inverse = np.unique(keys, return_inverse=True)
    summaries = np.full(len(found), np.nan)
    order = np.argsort(inverse[where], kind="stable")
    members, of_group = values[where][order], inverse[where][order]
    present, starts = np.unique(of_group, return_index=True)
    for group, part in zip(present, np.split(members, starts[1:]), strict=True):
        summaries[group] = summary(part)
    return summaries[inverse]
