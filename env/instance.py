"""An instance: what a planner decides about one model on one cluster, as arrays.

A plan of an instance is a *row* (mesh, ZeRO stage, micro-batches, schedule), then for each *group*
of segments a *variant* (way of sharding and recompute), and where there is a pipeline a *cut* into
stages. Rows are sorted by the codes of their decisions, so those that agree with the first few
decisions lie in one range. What plans on a row cost is a ``Room``: a table of all its plans.

K rows, D = len(ROW_DECISIONS), G groups, S variants, C cuts, FR = len(ROW_FEATURES), N nodes,
E edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.plans.plan import Recompute

__all__ = [
    "CUTS",
    "DECISIONS",
    "MAX_CANDIDATES",
    "MAX_GROUPS",
    "ROW_DECISIONS",
    "ROW_FEATURES",
    "EdgeType",
    "Instance",
    "InstanceGraph",
    "NodeType",
    "Room",
    "Rooms",
    "Variant",
]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Float32Array = NDArray[np.float32]

ROW_DECISIONS = (
    "tp",
    "cp",
    "ep",
    "pp",
    "dp",
    "dp_shard",
    "zero_stage",
    "num_microbatches",
    "schedule",
)
"""What a row decides, in this order. ``dp`` counts both kinds of data parallel ranks; the code of a
schedule is its place in ``ScheduleName``."""

MAX_GROUPS = 4
"""Segments are decided in so many groups at most; a group is some of the segment classes."""

CUTS = ("time", "memory", "light_first", "light_last")
"""Where stages begin: of equal time; of equal bytes; of equal time but that the first, or the last,
stage takes less, for what else it has to do."""

DECISIONS = (*ROW_DECISIONS, *(f"group_{number}" for number in range(MAX_GROUPS)), "cut")
"""Every kind of decision; what leaves one choice is not asked."""

MAX_CANDIDATES = 48
"""Candidates of one decision at most."""

ROW_FEATURES = (
    "log_compute_s",
    "log_tp_s",
    "log_cp_s",
    "log_ep_s",
    "log_dp_s",
    "log_bubble",
    "log_step_s",
    "log_step_none_s",
    "log_step_full_s",
    "log_state_bytes",
    "log_activation_bytes",
    "log_fullest_none",
    "log_fullest",
    "log_tokens",
    "log_idle",
    "log_imbalance",
)
"""What a glance at a row tells without pricing a plan (``env.estimates``): seconds over those of
the instance's fastest row by the same glance, the step also with nothing and with everything
computed again whether it fits or not; bytes over a device's memory, all of them with nothing
computed again and (``log_fullest``) with everything; the bubble and idle devices as log(1 + share);
tokens of a micro-batch on one rank; the slowest stage over the mean one."""


class NodeType(IntEnum):
    """What a node of an instance's graph stands for."""

    GROUP = 0
    DEVICE = 1
    LEVEL = 2


class EdgeType(IntEnum):
    """How two nodes of an instance's graph hang together; every edge has its reverse."""

    NEXT = 0
    PREVIOUS = 1
    WITHIN = 2
    AROUND = 3
    RUNS_ON = 4
    RUNS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What the segments of a group may do on a row."""

    sharding: str
    """Name of a ``Sharding``: ``plain``, ``tensor``, ``tensor+sequence``, ``batch``..."""
    recompute: Recompute


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InstanceGraph:
    """Model and cluster as one graph; the first nodes are the groups, in order."""

    node_type: IntArray
    """(N,) ``NodeType``"""
    node_features: Float32Array
    """(N, ``env.graph.NUM_NODE_FEATURES``) logarithms and shares; columns of other types are 0."""
    edge_index: IntArray
    """(2, E) source and target"""
    edge_type: IntArray
    """(E,) ``EdgeType``"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Room:
    """All plans of a row."""

    time_s: Float32Array
    """(S,) * G + (C,): step time; infinite where the row has no such plan or it does not fit."""

    @property
    def fits(self) -> bool:
        """Some plan of the row fits."""
        return bool(np.isfinite(self.time_s).any())


class Rooms(Protocol):
    """Where rooms come from: priced on demand, computed, or read from a file; each made once."""

    def open(self, row: int) -> Room:
        """All plans of a row."""
        ...

    def fits(self, row: int) -> bool:
        """Whether some plan of the row fits: what ``open`` says, found sooner where it can be."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Instance:
    """One planning problem."""

    name: str
    """``MODEL:BATCH:CLUSTER`` or as its maker calls it."""
    rows: IntArray
    """(K, D) sizes; lexicographically ascending."""
    row_features: Float32Array
    """(K, FR)"""
    variants: tuple[Variant, ...]
    group_classes: tuple[tuple[int, ...], ...]
    """For each group its segment classes."""
    num_cuts: int
    """C: how many of ``CUTS`` a pipeline may choose from, first ones first."""
    graph: InstanceGraph
    reference_s: float
    """Step time of the best rule of thumb."""
    rooms: Rooms

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.group_classes)

    @property
    def room_shape(self) -> tuple[int, ...]:
        """Of ``Room.time_s``."""
        return (len(self.variants),) * self.num_groups + (self.num_cuts,)

    def values(self, decision: int) -> IntArray:
        """Sizes that rows have for one of ``ROW_DECISIONS``, ascending: its candidates."""
        return np.unique(self.rows[:, decision])


def checked_rows(rows: Sequence[Sequence[int]]) -> IntArray:
    """(K, D) rows, sorted, without repetitions."""
    found: IntArray = np.unique(np.asarray(rows, np.int64).reshape(-1, len(ROW_DECISIONS)), axis=0)
    return found
