"""Tiny instances whose best plan is known, and random ones of any shape, without a model.

The rooms of the first are written by hand; those of ``random_instance`` are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from meshwright.env.decode import Placed
from meshwright.env.graph import NODE_FEATURES, NUM_NODE_FEATURES
from meshwright.env.instance import (
    ROW_DECISIONS,
    ROW_FEATURES,
    EdgeType,
    Float32Array,
    Instance,
    InstanceGraph,
    NodeType,
    Variant,
    checked_rows,
)
from meshwright.env.rooms import StoredRooms
from meshwright.plans.plan import Recompute, ScheduleName

__all__ = ["Toy", "random_instance", "toy_instances", "toys"]

Toy = tuple[Instance, Placed]
"""An instance and its one best plan."""

_1F1B = tuple(ScheduleName).index(ScheduleName.ONE_F_ONE_B)


def toys() -> tuple[Toy, ...]:
    """The toys with their optima."""
    return (_pipeline_or_tensor(), _narrow_memory(), _trap())


def toy_instances() -> tuple[Instance, ...]:
    """The toys alone."""
    return tuple(instance for instance, _ in toys())


def _pipeline_or_tensor() -> Toy:
    """Two devices: tensor parallelism takes 3 s, a pipeline 2 s if cut by memory, data 4 s."""
    rows = [_row(dp=2), _row(pp=2, num_microbatches=4), _row(tp=2)]
    none = np.inf
    times = {
        rows[0]: [[4.0, none], [5.0, none]],
        rows[1]: [[2.5, 2.0], [3.0, 2.9]],
        rows[2]: [[3.0, none], [3.5, none]],
    }
    toy = _toy("pipeline-or-tensor", times, (Recompute.NONE, Recompute.FULL), reference_s=4.0)
    return toy, Placed(row=_number(toy, rows[1]), variants=(0,), cut=1)


def _narrow_memory() -> Toy:
    """Only what recomputes fits without ZeRO; with ZeRO 3 nothing need be recomputed."""
    rows = [_row(dp=4), _row(dp=4, dp_shard=4, zero_stage=3), _row(dp=4, num_microbatches=2)]
    none = np.inf
    times = {
        rows[0]: [[[none], [none]], [[none], [2.0]]],
        rows[1]: [[[1.0], [1.2]], [[1.3], [1.5]]],
        rows[2]: [[[none], [none]], [[none], [none]]],
    }
    toy = _toy("narrow-memory", times, (Recompute.NONE, Recompute.FULL), reference_s=2.0)
    return toy, Placed(row=_number(toy, rows[1]), variants=(0, 0), cut=0)


def _trap() -> Toy:
    """The better half of the space begins with what looks worst: tp 4 is best or useless."""
    rows = [_row(tp=1, dp=4), _row(tp=2, dp=2), _row(tp=4), _row(tp=4, num_microbatches=2)]
    times = {
        rows[0]: [[2.0], [2.1], [2.2]],
        rows[1]: [[1.9], [2.0], [2.1]],
        rows[2]: [[9.0], [8.0], [7.0]],
        rows[3]: [[9.0], [1.0], [8.0]],
    }
    toy = _toy("trap", times, tuple(Recompute), reference_s=2.0)
    return toy, Placed(row=_number(toy, rows[3]), variants=(1,), cut=0)


def _row(
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    dp_shard: int = 1,
    zero_stage: int = 0,
    num_microbatches: int = 1,
) -> tuple[int, ...]:
    return (tp, 1, 1, pp, dp, dp_shard, zero_stage, num_microbatches, _1F1B)


def _number(instance: Instance, row: tuple[int, ...]) -> int:
    return int(np.flatnonzero((instance.rows == row).all(axis=1))[0])


def _toy(
    name: str,
    times: Mapping[tuple[int, ...], object],
    recomputes: Sequence[Recompute],
    *,
    reference_s: float,
) -> Instance:
    rows = checked_rows(list(times))
    rooms = [np.array(times[tuple(row)], dtype=np.float32) for row in rows.tolist()]
    return Instance(
        name=name,
        rows=rows,
        row_features=_features(rooms),
        variants=tuple(Variant(sharding="tensor", recompute=how) for how in recomputes),
        group_classes=tuple((group,) for group in range(rooms[0].ndim - 1)),
        num_cuts=rooms[0].shape[-1],
        graph=_graph(rooms[0].ndim - 1),
        reference_s=reference_s,
        rooms=StoredRooms(rooms),
    )


def _features(rooms: Sequence[Float32Array]) -> Float32Array:
    """A glance that says the mean time of what fits, and how much does not."""
    found = np.zeros((len(rooms), len(ROW_FEATURES)), dtype=np.float32)
    for row, time_s in enumerate(rooms):
        fits = np.isfinite(time_s)
        mean_s = float(time_s[fits].mean()) if fits.any() else 10.0
        found[row, ROW_FEATURES.index("log_step_s")] = np.log(mean_s)
        found[row, ROW_FEATURES.index("log_fullest")] = float((~fits).mean())
    return found


def _graph(num_groups: int) -> InstanceGraph:
    """Groups in a chain, one type of device, one level."""
    device, level = num_groups, num_groups + 1
    edges = [(group, group + 1, EdgeType.NEXT) for group in range(num_groups - 1)]
    edges += [(group + 1, group, EdgeType.PREVIOUS) for group in range(num_groups - 1)]
    edges += [(group, device, EdgeType.RUNS_ON) for group in range(num_groups)]
    edges += [(device, group, EdgeType.RUNS) for group in range(num_groups)]
    edges += [(device, level, EdgeType.WITHIN), (level, device, EdgeType.AROUND)]
    features = np.zeros((num_groups + 2, NUM_NODE_FEATURES), dtype=np.float32)
    features[:num_groups, NODE_FEATURES.index("work_share")] = 1 / num_groups
    features[device, NODE_FEATURES.index("device_share")] = 1.0
    return InstanceGraph(
        node_type=np.array([NodeType.GROUP] * num_groups + [NodeType.DEVICE, NodeType.LEVEL]),
        node_features=features,
        edge_index=np.array([edge[:2] for edge in edges], dtype=np.int64).T,
        edge_type=np.array([edge[2] for edge in edges], dtype=np.int64),
    )


def random_instance(
    rng: np.random.Generator,
    *,
    num_rows: int = 30,
    num_groups: int = 2,
    num_variants: int = 3,
    num_cuts: int = 2,
    fitting_share: float = 0.5,
) -> Instance:
    """An instance with drawn times; at least one plan fits.

    Args:
        rng: draws.
        num_rows: at most; equal ones fall together.
        num_groups: G
        num_variants: S, at most 6.
        num_cuts: C
        fitting_share: of all plans; every third row or so has none.
    """
    sizes = 2 ** rng.integers(0, 3, size=(num_rows, len(ROW_DECISIONS)))
    sizes[:, ROW_DECISIONS.index("zero_stage")] = rng.integers(0, 4, size=num_rows)
    sizes[:, ROW_DECISIONS.index("schedule")] = rng.integers(0, 2, size=num_rows)
    rows = checked_rows(sizes.tolist())
    shape = (num_variants,) * num_groups + (num_cuts,)
    rooms = []
    for _ in range(len(rows)):
        time_s = rng.uniform(0.5, 2.0, size=shape).astype(np.float32)
        time_s[rng.random(shape) >= fitting_share * (rng.random() > 0.3)] = np.inf
        rooms.append(time_s)
    if not any(np.isfinite(time_s).any() for time_s in rooms):
        rooms[0].flat[0] = 1.0
    kinds = [(name, how) for name in ("tensor", "tensor+sequence") for how in Recompute]
    return Instance(
        name=f"random-{len(rows)}",
        rows=rows,
        row_features=_features(rooms),
        variants=tuple(Variant(sharding=s, recompute=how) for s, how in kinds[:num_variants]),
        group_classes=tuple((group,) for group in range(num_groups)),
        num_cuts=num_cuts,
        graph=_graph(num_groups),
        reference_s=2.0,
        rooms=StoredRooms(rooms),
    )
