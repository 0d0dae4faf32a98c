"""Made-up measurements, and networks small enough to train in a test."""

from __future__ import annotations

import numpy as np

from meshwright.cluster.catalog import find_device
from meshwright.cost.work import EdgeKind, Family, OperatorWork
from meshwright.gnn_cost.ensemble import EnsembleSettings
from meshwright.gnn_cost.features import ideal_time_s
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.gnn_cost.training import TrainingSettings

FAMILIES = (Family.MATMUL, Family.NORM, Family.ELEMENTWISE, Family.ATTENTION)
DEVICES = tuple(find_device(name, where="test").device for name in ("a100-sxm-80gb", "v100"))


def work_of(
    family: np.ndarray, dims: np.ndarray, edges: np.ndarray | None = None, kind: int = 0
) -> OperatorWork:
    """Half-precision operators of those sizes, with the least arithmetic and traffic."""
    b, m, n, k = dims.T
    is_product = np.isin(family, (Family.MATMUL, Family.BATCHED_MATMUL))
    is_attention = family == Family.ATTENTION
    flop = np.where(is_product, 2 * b * m * n * k, np.where(is_attention, 4 * b * m * n * k, 0))
    elements = np.where(
        is_product,
        b * (m * k + k * n + m * n),
        np.where(is_attention, 2 * b * k * (m + n), 2 * b * m * n),
    )
    joined = np.zeros((2, 0), np.int64) if edges is None else edges
    return OperatorWork(
        family=family.astype(np.int64),
        dtype=np.full(len(family), 4),
        dims=dims.astype(np.float64),
        flop=np.maximum(flop, b * m * n).astype(np.float64),
        num_bytes=2.0 * elements,
        edges=joined,
        edge_kind=np.full(joined.shape[1], kind, np.int64),
    )


def random_work(count: int, rng: np.random.Generator, *, largest: float = 13.0) -> OperatorWork:
    """Operators of mixed families; sizes from 16 up to ``2 ** largest``."""
    family = rng.choice(FAMILIES, count)
    dims = np.round(2.0 ** rng.uniform(4, largest, (count, 4)))
    dims[:, 0] = np.where(family == Family.ATTENTION, np.minimum(dims[:, 0], 512), 1)
    dims[family == Family.ATTENTION, 3] = 64
    rows_only = np.isin(family, (Family.NORM, Family.ELEMENTWISE))
    dims[rows_only, 3] = 2
    return work_of(family, dims)


def measured(
    count: int, *, seed: int = 0, rows_each: int = 1, speedup: float = 1.0
) -> MeasuredGraphs:
    """Chains of ``rows_each`` operators that take 4 us and 1.6 ideal times, over ``speedup``."""
    rng = np.random.default_rng(seed)
    work = random_work(count * rows_each, rng)
    graph = np.repeat(np.arange(count), rows_each)
    if rows_each > 1:
        first = np.flatnonzero(np.diff(graph) == 0)
        edges = np.stack([first, first + 1])
        work = work_of(work.family, work.dims, edges, int(EdgeKind.DATA))
    device = rng.integers(0, len(DEVICES), count)
    row_s = 4e-6 + 1.6 * ideal_time_s(work, DEVICES, device[graph])
    time_s = np.bincount(graph, row_s, count) / speedup
    return MeasuredGraphs(
        work=work,
        graph=graph,
        weight=np.ones(work.count),
        devices=DEVICES,
        device=device,
        time_s=time_s * np.exp(rng.normal(0, 0.02, count)),
        rest_s=np.zeros(count),
        labels={
            "op": np.array([Family(one).name for one in work.family[::rows_each]], np.str_),
            "shape": np.array([f"{one:.0f}" for one in work.dims[::rows_each, 2]], np.str_),
        },
    )


def small_settings(**changes: object) -> TrainingSettings:
    """A network that trains in a second."""
    settings: dict[str, object] = {
        "hidden": 18,
        "num_rounds": 1,
        "max_epochs": 25,
        "batch_graphs": 128,
        "learning_rate": 2e-2,
    }
    return TrainingSettings(**{**settings, **changes})  # type: ignore[arg-type]


def small_ensemble(num_members: int = 2, **changes: object) -> EnsembleSettings:
    """Of ``small_settings``."""
    return EnsembleSettings(num_members=num_members, training=small_settings(**changes))
