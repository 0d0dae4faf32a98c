"""How far operators are from those a model was fitted on, as a trust from 0 to 1.

For each family (and element width) the training operators' features are summed up by centers
(k-means). An operator's distance is that to the nearest center, over the 99th percentile of the
distances of training operators; up to 1 it is trusted wholly, then ever less::

    trust = 1 / (1 + (max(distance - 1, 0) / _FADE) ** 2)

Families with too few measurements have trust 0. Only features that tell size and device count;
flags of one family or dtype are constant within it.

How far a *device* is from those measured, with a family and dtype, is asked apart
(``device_trust``): it is the same for all sizes, so that what is shrunk by it still never falls as
sizes grow. A device measured in one element width only is as far in another as the nearest device
that was measured in that one: times in single precision say nothing on its matrix units. Devices of
a maker of which none was measured are far from all others, for their data sheet says nothing of
their libraries.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.work import EdgeKind, Family, OperatorWork
from meshwright.gnn_cost.features import FEATURE_NAMES

__all__ = [
    "device_distance",
    "device_trust",
    "edges_seen",
    "fit_trust",
    "is_measured",
    "is_seen",
    "trust_of",
]

Array32 = NDArray[np.float32]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_FADE = 1.5
"""Distance beyond 1 at which half of the trust is left."""

_NUM_CENTERS = 48
_LEAST_ROWS = 24
_MAX_ROWS = 6000
_NUM_ROUNDS = 8
_CHUNK_ROWS = 4096

_COUNTED = (
    *("log_compute_us", "log_memory_us", "log_blocks_to_units", "log_bytes_to_cache"),
    *("log_b_to_units", "log_m_to_tile", "log_n_to_tile", "log_k_to_tile"),
    *("log_device_peak", "log_device_bandwidth", "log_device_units", "log_device_ridge"),
    *("log_matrix_to_vector_peak",),
)
_WIDTHS = tuple(name for name in FEATURE_NAMES if name.endswith("bit") or name == "is_tf32")
_DEVICE_COLUMNS = np.array(
    [
        FEATURE_NAMES.index(name)
        for name in (*(name for name in _COUNTED if "device" in name), *_WIDTHS)
    ]
)
_DEVICE_REACH = 0.5
"""Up to here a device is as good as measured: root of the sum of squares of logarithms, and of 2
where the elements' widths differ."""
_SAME_DEVICE = 1e-3
_OTHER_MAKER = 4.0
"""How far a device is from those of another maker; leaves a trust below 0.05."""
_COLUMNS = np.array([FEATURE_NAMES.index(name) for name in _COUNTED])


def fit_trust(
    features_NF: Array32, family_N: IntArray, *, rng: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """Tensors for ``trust_of``: centers of each family that has enough rows, and their scales."""
    x_NC = features_NF[:, _COLUMNS]
    mean, spread = x_NC.mean(axis=0), np.maximum(x_NC.std(axis=0), 0.25)
    centers, families, reach = [], [], []
    for family in np.unique(family_N):
        rows = np.flatnonzero(family_N == family)
        if len(rows) < _LEAST_ROWS:
            continue
        rows = rng.permutation(rows)[:_MAX_ROWS]
        z_RC = (x_NC[rows] - mean) / spread
        found = _centers(z_RC, min(_NUM_CENTERS, len(rows) // 4), rng)
        centers.append(found)
        families.append(np.full(len(found), family))
        far = float(np.quantile(np.sqrt(_nearest(z_RC, found)), 0.99))
        reach.append(np.full(len(found), max(far, 0.1)))
    width = len(_COLUMNS)
    return _device_points(features_NF, family_N) | {
        "trust_mean": mean.astype(np.float32),
        "trust_spread": spread.astype(np.float32),
        "trust_centers": np.concatenate([np.zeros((0, width)), *centers]).astype(np.float32),
        "trust_family": np.concatenate([np.zeros(0), *families]).astype(np.float32),
        "trust_reach": np.concatenate([np.zeros(0), *reach]).astype(np.float32),
    }


def edges_seen(work: OperatorWork) -> dict[str, IntArray]:
    """What ``is_seen`` needs: the distinct (source family, target family, kind) of all edges."""
    source, target = work.family[work.edges]
    every = np.stack([source, target, work.edge_kind], axis=1).astype(np.int64)
    return {"edges_seen": np.unique(every, axis=0)}


def is_seen(edges_T3: IntArray, work: OperatorWork) -> BoolArray:
    """(E,) whether an edge between such operators was fitted on; others carry no messages."""
    base = max(len(Family), len(EdgeKind))
    source, target = work.family[work.edges]
    seen_T = (edges_T3[:, 0] * base + edges_T3[:, 1]) * base + edges_T3[:, 2]
    found: BoolArray = np.isin((source * base + target) * base + work.edge_kind, seen_T)
    return found


def trust_of(
    tensors: Mapping[str, NDArray[np.float32]], features_NF: Array32, family_N: IntArray
) -> FloatArray:
    """(N,) trust in the correction of each operator."""
    z_NC = (features_NF[:, _COLUMNS] - tensors["trust_mean"]) / tensors["trust_spread"]
    trust_N = np.zeros(len(features_NF))
    for family in np.unique(family_N):
        own = tensors["trust_family"] == family
        if not own.any():
            continue
        centers, reach = tensors["trust_centers"][own], float(tensors["trust_reach"][own][0])
        rows = np.flatnonzero(family_N == family)
        for first in range(0, len(rows), _CHUNK_ROWS):
            part = rows[first : first + _CHUNK_ROWS]
            distance = np.sqrt(_nearest(z_NC[part], centers)) / reach
            beyond = np.maximum(distance - 1.0, 0.0) / _FADE
            trust_N[part] = 1.0 / (1.0 + beyond**2)
    return trust_N


def device_trust(apart_N: FloatArray, *, is_other_maker_N: BoolArray) -> FloatArray:
    """(N,) trust by family, device and dtype alone.

    Args:
        apart_N: of ``device_distance``.
        is_other_maker_N: whether no device of its maker was measured.
    """
    other_N = np.where(is_other_maker_N, _OTHER_MAKER, 0.0)
    beyond_N = np.maximum(np.hypot(apart_N, other_N) / _DEVICE_REACH - 1.0, 0.0) / _FADE
    return np.asarray(1.0 / (1.0 + beyond_N**2))


def is_measured(apart_N: FloatArray) -> BoolArray:
    """(N,) whether a device of that data sheet was measured with that family and width.

    Args:
        apart_N: of ``device_distance``.
    """
    return np.asarray(apart_N < _SAME_DEVICE)


def device_distance(
    tensors: Mapping[str, NDArray[np.float32]], features_NF: Array32, family_N: IntArray
) -> FloatArray:
    """(N,) distance to the nearest device that was measured; infinite where none was.

    Args:
        tensors: of ``fit_trust``.
        features_NF: of operators on their devices.
        family_N: of operators.
    """
    apart_N = np.full(len(features_NF), np.inf)
    z_ND = features_NF[:, _DEVICE_COLUMNS]
    for family in np.unique(family_N):
        points = tensors["device_points"][tensors["device_family"] == family]
        if not len(points):
            continue
        rows = np.flatnonzero(family_N == family)
        found, inverse = np.unique(z_ND[rows], axis=0, return_inverse=True)
        squares = ((found[:, None] - points) ** 2).sum(axis=2).min(axis=1)
        apart_N[rows] = np.sqrt(squares)[inverse.reshape(-1)]
    return apart_N


def _device_points(features_NF: Array32, family_N: IntArray) -> dict[str, NDArray[np.float32]]:
    points, families = [np.zeros((0, len(_DEVICE_COLUMNS)))], [np.zeros(0)]
    for family in np.unique(family_N):
        own = features_NF[family_N == family][:, _DEVICE_COLUMNS]
        if len(own) >= _LEAST_ROWS:
            points.append(np.unique(own, axis=0))
            families.append(np.full(len(points[-1]), float(family)))
    return {
        "device_points": np.concatenate(points).astype(np.float32),
        "device_family": np.concatenate(families).astype(np.float32),
    }


def _nearest(z_RC: Array32, centers_KC: Array32) -> FloatArray:
    """(R,) squared distance to the nearest center."""
    squares = (z_RC**2).sum(axis=1)[:, None] + (centers_KC**2).sum(axis=1)
    least = (squares - 2.0 * (z_RC @ centers_KC.T)).min(axis=1)
    return np.maximum(least, 0.0).astype(np.float64)


def _centers(z_RC: Array32, count: int, rng: np.random.Generator) -> Array32:
    """Lloyd's algorithm from ``count`` rows drawn at random."""
    centers = z_RC[rng.choice(len(z_RC), count, replace=False)].copy()
    for _ in range(_NUM_ROUNDS):
        squares = (centers**2).sum(axis=1) - 2.0 * (z_RC @ centers.T)
        nearest = squares.argmin(axis=1)
        counts = np.bincount(nearest, minlength=count)
        sums = np.zeros_like(centers)
        np.add.at(sums, nearest, z_RC)
        centers = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centers)
    return centers.astype(np.float32)
