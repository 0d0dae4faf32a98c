"""More instances out of stored ones: the same model and cluster with some rows left out.

What is best changes with the rows, so that a planner learns to judge rows and not to remember
instances. Where a few hundred instances are learned from, this counts for more than any setting.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from meshwright.env.instance import ROW_DECISIONS, ROW_FEATURES, Instance
from meshwright.env.rooms import StoredRooms

__all__ = ["thinned"]

_STEP = ROW_FEATURES.index("log_step_s")
_RELATIVE = [place for place, name in enumerate(ROW_FEATURES) if name.endswith("_s")]
"""Features over the step time of the fastest row."""

_LEAST_ROWS = 8
_LEAST_PLANS = 16
"""Fewer leave nothing to learn."""


def thinned(instance: Instance, rng: np.random.Generator) -> Instance | None:
    """The instance without some sizes and some other rows; ``None`` where too little is left.

    Args:
        instance: whose rooms open cheaply.
        rng: draws what is left out: up to two sizes of decisions, then up to 70 % of the rows.
    """
    is_kept = np.ones(len(instance.rows), np.bool_)
    for _ in range(int(rng.integers(3))):
        decision = int(rng.integers(len(ROW_DECISIONS)))
        sizes = np.unique(instance.rows[is_kept, decision])
        without = is_kept & (instance.rows[:, decision] != rng.choice(sizes))
        if without.sum() >= _LEAST_ROWS:
            is_kept = without
    rows = np.flatnonzero(is_kept)
    count = max(_LEAST_ROWS, round(len(rows) * rng.uniform(0.3, 1.0)))
    if count < len(rows):
        rows = np.sort(rng.choice(rows, count, replace=False))
    times = [instance.rooms.open(int(row)).time_s for row in rows]
    num_plans = sum(int(np.isfinite(time_s).sum()) for time_s in times)
    if len(rows) == len(instance.rows) or num_plans < _LEAST_PLANS:
        return None
    features = instance.row_features[rows].copy()
    features[:, _RELATIVE] -= features[:, _STEP].min()
    return replace(
        instance,
        name=f"{instance.name}, {len(rows)} rows",
        rows=instance.rows[rows],
        row_features=features,
        rooms=StoredRooms(times),
    )
