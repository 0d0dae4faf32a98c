"""What the agent sees of a decision: one schema for both environments.

Decisions on rows have a candidate for each of ``Instance.values``, those on groups one for each
variant, that on stages one for each cut. Nothing in it needs a price: what is known of rows is the
glance of ``env.estimates``, over all rows that agree with a candidate, whether they fit or not.

n candidates or B states, G groups, FR = len(ROW_FEATURES), F_C = NUM_CANDIDATE, F_S = NUM_STATE.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meshwright.env.graph import NODE_FEATURES
from meshwright.env.instance import (
    CUTS,
    MAX_GROUPS,
    ROW_DECISIONS,
    ROW_FEATURES,
    Float32Array,
    FloatArray,
    InstanceGraph,
    IntArray,
    NodeType,
    Variant,
)
from meshwright.plans.plan import Recompute, ScheduleName

__all__ = [
    "CANDIDATE_FEATURES",
    "NUM_CANDIDATE",
    "NUM_STATE",
    "STATE_FEATURES",
    "cut_candidates",
    "kinds_of",
    "log_host_size",
    "row_candidates",
    "states",
    "variant_candidates",
]

_SHARDINGS = ("tensor", "tensor+sequence", "tensor+ring")
_RECOMPUTES = tuple(Recompute)
_KINDS = (*_SHARDINGS, *_RECOMPUTES)
_ZERO_STAGE = ROW_DECISIONS.index("zero_stage")
_SCHEDULE = ROW_DECISIONS.index("schedule")

CANDIDATE_FEATURES = (
    "value",
    "over_host",
    "row_share",
    *(f"least_{name}" for name in ROW_FEATURES),
    *(f"mean_{name}" for name in ROW_FEATURES),
    *(f"schedule_{name}" for name in ScheduleName),
    *(f"does_{name}" for name in _KINDS),
    *(f"of_group_{number}" for number in range(MAX_GROUPS)),
    *(f"cut_{name}" for name in CUTS),
)
"""Columns of a candidate. ``value``: a quarter of the size's logarithm to base 2, a ZeRO stage over
4; ``over_host``: the same of the size over the devices of a host; ``row_share``: of the rows left,
how many agree; least and mean of ``ROW_FEATURES`` over these."""

STATE_FEATURES = (
    *(f"is_decided_{name}" for name in ROW_DECISIONS),
    *(f"value_{name}" for name in ROW_DECISIONS),
    *(f"schedule_{name}" for name in ScheduleName),
    "row_share",
    *(f"least_{name}" for name in ROW_FEATURES),
    "num_groups",
    *(f"is_decided_group_{number}" for number in range(MAX_GROUPS)),
    *(f"group_{number}_does_{name}" for number in range(MAX_GROUPS) for name in _KINDS),
)
"""Columns of a state: what is decided, the share of the instance's rows left and the least of their
features, and what the groups do."""

NUM_CANDIDATE = len(CANDIDATE_FEATURES)
NUM_STATE = len(STATE_FEATURES)

_FIRST_KIND = CANDIDATE_FEATURES.index(f"does_{_KINDS[0]}")
_FIRST_GROUP = CANDIDATE_FEATURES.index("of_group_0")
_FIRST_CUT = CANDIDATE_FEATURES.index(f"cut_{CUTS[0]}")


def row_candidates(
    decision: int,
    values: IntArray,
    *,
    row_share: FloatArray,
    least: Float32Array,
    mean: Float32Array,
    log_host: float,
) -> Float32Array:
    """(n, F_C) of sizes (n,) of one of ``ROW_DECISIONS``.

    Args:
        decision: its place.
        values: the sizes.
        row_share: (n,) rows with the size over rows left.
        least: (n, FR) over these rows.
        mean: (n, FR) over these rows.
        log_host: ``log_host_size`` of the instance.
    """
    found = np.zeros((len(values), NUM_CANDIDATE), dtype=np.float32)
    found[:, 0] = _scaled(values[:, None], decision)[:, 0]
    if decision not in (_ZERO_STAGE, _SCHEDULE):
        found[:, 1] = found[:, 0] - log_host / 4
    found[:, 2] = row_share
    width = len(ROW_FEATURES)
    found[:, 3 : 3 + width] = least
    found[:, 3 + width : 3 + 2 * width] = mean
    if decision == _SCHEDULE:
        found[np.arange(len(values)), 3 + 2 * width + values] = 1.0
    return found


def _scaled(values: IntArray, first: int = 0) -> Float32Array:
    """(n, columns) sizes of successive decisions as numbers of about one."""
    found = np.log2(np.maximum(values, 1)) / 4
    for place in range(values.shape[1]):
        if place + first == _ZERO_STAGE:
            found[:, place] = values[:, place] / 4
        elif place + first == _SCHEDULE:
            found[:, place] = 0.0
    return found.astype(np.float32)


def kinds_of(variants: Sequence[Variant]) -> Float32Array:
    """(S, kinds) one-hot of sharding and of recompute."""
    rows = [
        [
            *(variant.sharding == name for name in _SHARDINGS),
            *(variant.recompute is how for how in _RECOMPUTES),
        ]
        for variant in variants
    ]
    return np.array(rows, dtype=np.float32).reshape(len(variants), len(_KINDS))


def variant_candidates(variants: Sequence[Variant], group: int) -> Float32Array:
    """(S, F_C) of the variants of a group."""
    found = np.zeros((len(variants), NUM_CANDIDATE), dtype=np.float32)
    found[:, _FIRST_KIND : _FIRST_KIND + len(_KINDS)] = kinds_of(variants)
    found[:, _FIRST_GROUP + group] = 1.0
    return found


def cut_candidates(num_cuts: int) -> Float32Array:
    """(C, F_C) of the cuts."""
    found = np.zeros((num_cuts, NUM_CANDIDATE), dtype=np.float32)
    found[np.arange(num_cuts), _FIRST_CUT + np.arange(num_cuts)] = 1.0
    return found


def states(
    *,
    num_decided: IntArray,
    values: IntArray,
    row_share: FloatArray,
    least: Float32Array,
    num_groups: IntArray,
    group_kinds: Float32Array,
    groups_decided: IntArray,
) -> Float32Array:
    """(B, F_S) of the states.

    Args:
        num_decided: (B,) how many of ``ROW_DECISIONS`` are.
        values: (B, D) sizes of some row that agrees with them.
        row_share: (B,) rows that agree over all rows.
        least: (B, FR) over the rows that agree.
        num_groups: (B,)
        group_kinds: (B, MAX_GROUPS, kinds) of decided groups, else 0.
        groups_decided: (B,) how many are.
    """
    count = len(num_decided)
    decided = np.arange(len(ROW_DECISIONS)) < num_decided[:, None]
    schedule = np.zeros((count, len(ScheduleName)), dtype=np.float32)
    done = np.flatnonzero(decided[:, _SCHEDULE])
    schedule[done, values[done, _SCHEDULE]] = 1.0
    parts = (
        decided,
        _scaled(values) * decided,
        schedule,
        row_share[:, None],
        least,
        num_groups[:, None] / MAX_GROUPS,
        np.arange(MAX_GROUPS) < groups_decided[:, None],
        group_kinds.reshape(count, -1),
    )
    return np.concatenate(parts, axis=1, dtype=np.float32)


def log_host_size(graph: InstanceGraph) -> float:
    """Logarithm to base 2 of the devices of a host, as the graph has it."""
    levels = np.flatnonzero(graph.node_type == NodeType.LEVEL)
    if not len(levels):
        return 0.0
    span = float(graph.node_features[levels[0], NODE_FEATURES.index("log_span")])
    return 3.0 + 4.0 * span / float(np.log(2.0))
