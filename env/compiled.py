"""Instances as flat arrays that thousands of episodes walk by gathers.

Rows form a tree: a node for each beginning of a row that occurs, its children one decision longer
and next to one another. A node at depth D is a row; there the tables of its room begin: for each
group, and at last the cut, the least time of all plans that agree with the choices so far and the
next one. A time is infinite where none fits, so the same tables are the masks.

I instances, N nodes, R rows, G groups, S variants, C cuts, D = len(ROW_DECISIONS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.env.instance import (
    MAX_CANDIDATES,
    MAX_GROUPS,
    ROW_DECISIONS,
    ROW_FEATURES,
    Float32Array,
    FloatArray,
    Instance,
    IntArray,
)
from meshwright.env.observation import (
    NUM_CANDIDATE,
    cut_candidates,
    kinds_of,
    log_host_size,
    row_candidates,
    variant_candidates,
)
from meshwright.env.rooms import StoredRooms
from meshwright.errors import BadRequest

__all__ = ["Compiled", "compile_instances"]

NUM_DECIDED = len(ROW_DECISIONS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compiled:
    """See the module docstring."""

    instances: tuple[Instance, ...]
    """Those given; their rooms look into ``tables``, so that the ones given may be dropped."""
    root: IntArray
    """(I,) where episodes begin: decisions without a choice are taken."""
    num_groups: IntArray
    """(I,)"""
    num_variants: IntArray
    """(I,)"""
    num_cuts: IntArray
    """(I,)"""
    num_rows: IntArray
    """(I,)"""
    reference_s: FloatArray
    """(I,)"""
    kinds: Float32Array
    """(I, max S, kinds) ``observation.kinds_of``"""
    room_candidates: Float32Array
    """(I, MAX_GROUPS + 1, max S or C, F_C) variants of each group, and last the cuts."""
    depth: IntArray
    """(N,) decisions made"""
    first_child: IntArray
    """(N,)"""
    num_children: IntArray
    """(N,)"""
    slot: IntArray
    """(N,) the node's value among those of its decision."""
    target: IntArray
    """(N,) where one comes to: the first node below with a choice, or a row."""
    first_row: IntArray
    """(N,) first row, numbered through all instances."""
    rows_below: IntArray
    """(N,)"""
    best_s: Float32Array
    """(N,) least time of all plans below."""
    candidates: Float32Array
    """(N, F_C) of the node as a candidate of its parent."""
    least: Float32Array
    """(N, FR) of the rows below."""
    values: IntArray
    """(R, D)"""
    row_in_instance: IntArray
    """(R,)"""
    tables: Float32Array
    """All rooms' tables, one after the other."""
    offset: IntArray
    """(R, MAX_GROUPS + 1) where the table of each group, then that of the cut, begins; at
    ``num_groups`` is the cut's."""

    @property
    def max_decisions(self) -> int:
        """No episode asks more."""
        return NUM_DECIDED + int(self.num_groups.max()) + 1


def compile_instances(instances: Sequence[Instance]) -> Compiled:
    """Flat arrays of instances; every room is opened.

    Raises:
        BadRequest: there is none, nothing fits in one, or it has too many candidates.
    """
    if not instances:
        raise BadRequest("no instances to compile; give at least one")
    found: list[dict[str, NDArray[Any]]] = []
    num_nodes = num_rows = num_amounts = 0
    for instance in instances:
        part = _compiled(instance)
        part["root"] += num_nodes
        part["first_child"] += num_nodes
        part["target"] += num_nodes
        part["first_row"] += num_rows
        part["offset"] += num_amounts
        num_nodes += len(part["depth"])
        num_rows += len(part["values"])
        num_amounts += len(part["tables"])
        found.append(part)
    joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    widest = max(len(instance.variants) for instance in instances)
    kinds = [kinds_of(instance.variants) for instance in instances]
    return Compiled(
        instances=_looking_in(instances, joined["tables"], joined["offset"]),
        num_groups=np.array([instance.num_groups for instance in instances]),
        num_variants=np.array([len(instance.variants) for instance in instances]),
        num_cuts=np.array([instance.num_cuts for instance in instances]),
        num_rows=np.array([len(instance.rows) for instance in instances]),
        reference_s=np.array([instance.reference_s for instance in instances]),
        kinds=np.stack([np.pad(kind, ((0, widest - len(kind)), (0, 0))) for kind in kinds]),
        room_candidates=_room_candidates(instances),
        **joined,
    )


def _looking_in(
    instances: Sequence[Instance], tables: Float32Array, offset: IntArray
) -> tuple[Instance, ...]:
    """The instances with rooms that are views of the tables."""
    found = []
    first_row = 0
    for instance in instances:
        shape = instance.room_shape
        nothing = np.full(shape, np.inf, dtype=np.float32)
        times = []
        for row in range(len(instance.rows)):
            begin = int(offset[first_row + row, instance.num_groups])
            fits = instance.rooms.fits(row)
            table = tables[begin : begin + nothing.size]
            times.append(table.reshape(shape) if fits else nothing)
        found.append(replace(instance, rooms=StoredRooms(times)))
        first_row += len(instance.rows)
    return tuple(found)


def _room_candidates(instances: Sequence[Instance]) -> Float32Array:
    widest = max(max(len(instance.variants), instance.num_cuts) for instance in instances)
    shape = (len(instances), MAX_GROUPS + 1, widest, NUM_CANDIDATE)
    found = np.zeros(shape, dtype=np.float32)
    for number, instance in enumerate(instances):
        for group in range(instance.num_groups):
            found[number, group, : len(instance.variants)] = variant_candidates(
                instance.variants, group
            )
        found[number, MAX_GROUPS, : instance.num_cuts] = cut_candidates(instance.num_cuts)
    return found


def _compiled(instance: Instance) -> dict[str, NDArray[Any]]:
    rows = instance.rows
    tables, offset, best_s = _tables(instance)
    if not np.isfinite(best_s).any():
        raise BadRequest(f"{instance.name}: nothing fits; leave the instance out")
    starts = _starts(rows)
    columns = _nodes(instance, starts, best_s)
    target = np.arange(len(columns["depth"]))
    first, count = columns["first_child"], columns["num_children"]
    fits = np.isfinite(columns["best_s"])
    before = np.concatenate([[0], np.cumsum(fits)])
    for node in range(len(target) - len(rows) - 1, -1, -1):
        inside = fits[first[node] : first[node] + count[node]]
        if before[first[node] + count[node]] - before[first[node]] == 1:
            target[node] = target[first[node] + int(inside.argmax())]
    return {
        **columns,
        "root": target[:1].copy(),
        "target": target,
        "values": rows.copy(),
        "row_in_instance": np.arange(len(rows)),
        "tables": tables,
        "offset": offset,
    }


def _starts(rows: IntArray) -> list[IntArray]:
    """For each depth 0 ... D the first rows of its nodes."""
    differs = np.ones((len(rows), rows.shape[1] + 1), dtype=bool)
    differs[1:, 0] = False
    differs[1:, 1:] = np.logical_or.accumulate(rows[1:] != rows[:-1], axis=1)
    return [np.flatnonzero(differs[:, depth]) for depth in range(rows.shape[1] + 1)]


def _nodes(
    instance: Instance, starts: list[IntArray], best_s: Float32Array
) -> dict[str, NDArray[Any]]:
    """Columns of all nodes, depth by depth."""
    log_host = log_host_size(instance.graph)
    count = len(instance.rows)
    parts: dict[str, list[NDArray[Any]]] = {}
    first_node = np.cumsum([0, *(len(start) for start in starts)])
    for depth, start in enumerate(starts):
        below = np.diff(np.append(start, count))
        least = np.minimum.reduceat(instance.row_features, start, axis=0)
        slot, candidates = np.zeros(1, np.int64), np.zeros((1, NUM_CANDIDATE), np.float32)
        if depth:
            values = instance.rows[start, depth - 1]
            known = instance.values(depth - 1)
            if len(known) > MAX_CANDIDATES:
                raise BadRequest(
                    f"{instance.name}: {len(known)} values of {ROW_DECISIONS[depth - 1]}; an "
                    f"instance may have {MAX_CANDIDATES}"
                )
            slot = np.searchsorted(known, values)
            parent = np.searchsorted(starts[depth - 1], start, side="right") - 1
            around = np.diff(np.append(starts[depth - 1], count))[parent]
            total = np.add.reduceat(instance.row_features, start, axis=0, dtype=np.float64)
            candidates = row_candidates(
                depth - 1,
                values,
                row_share=below / around,
                least=least,
                mean=(total / below[:, None]).astype(np.float32),
                log_host=log_host,
            )
        last = depth == len(starts) - 1
        children = start[:0] if last else starts[depth + 1]
        place = np.searchsorted(children, start) if not last else np.zeros(count, np.int64)
        columns = {
            "depth": np.full(len(start), depth),
            "first_child": place + first_node[depth + 1],
            "num_children": (
                np.zeros(count, np.int64) if last else np.diff(np.append(place, len(children)))
            ),
            "slot": slot,
            "first_row": start,
            "rows_below": below,
            "best_s": np.minimum.reduceat(best_s, start),
            "candidates": candidates,
            "least": least,
        }
        for name, column in columns.items():
            parts.setdefault(name, []).append(column)
    return {name: np.concatenate(column) for name, column in parts.items()}


def _tables(instance: Instance) -> tuple[Float32Array, IntArray, Float32Array]:
    """Tables, (K, MAX_GROUPS + 1) where they begin, and (K,) least times."""
    num_groups = instance.num_groups
    found: list[Float32Array] = []
    offset = np.zeros((len(instance.rows), MAX_GROUPS + 1), dtype=np.int64)
    best_s = np.full(len(instance.rows), np.inf, dtype=np.float32)
    place = 0
    for row in range(len(instance.rows)):
        time_s = instance.rooms.open(row).time_s
        best_s[row] = time_s.min()
        if not np.isfinite(best_s[row]):
            continue
        for group in range(num_groups + 1):
            later = tuple(range(group + 1, num_groups + 1))
            table = time_s.min(axis=later).ravel() if later else time_s.ravel()
            offset[row, group] = place
            place += len(table)
            found.append(table)
    tables = np.concatenate(found) if found else np.zeros(0, np.float32)
    assert len(ROW_FEATURES) == instance.row_features.shape[1], "a column for each feature"
    return tables, offset, best_s
