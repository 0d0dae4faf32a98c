"""The graph network's forward pass in numpy, for all members of an ensemble at once.

What ``meshwright plan`` needs: no torch. The formulas stand in ``gnn_cost.network``; the tensors
are those of its ``numpy_tensors``, stacked over the M members.

N = operators, P = sizes, K = kinds, H = hidden width, M = members, E = edges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.work import EdgeKind, components
from meshwright.gnn_cost.features import FEATURE_NAMES, MAX_FLOOR_S

__all__ = [
    "GATE_RANGE",
    "KIND_NAMES",
    "LARGEST_UNIT",
    "LOG_MAX_SLOWDOWN",
    "LOG_MAX_START_S",
    "MAX_FACTOR",
    "NUM_DIRECTED_KINDS",
    "NUM_SIZES",
    "TIME_UNIT_LOG_S",
    "kind_columns",
    "log_times",
    "size_columns",
]

GATE_RANGE = 2.5
"""A kind of operator scales a unit's slopes by up to exp of this, or down."""

LARGEST_UNIT = 1e4
"""Of what enters a layer's bend, so that any weights give finite answers."""

LOG_MAX_SLOWDOWN = math.log(2000.0)
"""Of an operator against its ideal time, its start apart."""

LOG_MAX_START_S = math.log(4 * MAX_FLOOR_S)
"""What an operator may take beside ``LOG_MAX_SLOWDOWN``."""

TIME_UNIT_LOG_S = math.log(1.6e-5)
"""Where the network's answers begin: 16 microseconds."""

MAX_FACTOR = 1.5
"""Of a graph against the sum of its operators, and by which it may be faster."""

NUM_DIRECTED_KINDS = 2 * len(EdgeKind)

KIND_NAMES = tuple(
    name
    for name in FEATURE_NAMES
    if name.startswith("is_") or "device" in name or name == "log_matrix_to_vector_peak"
)
"""Features that do not change when an operator grows."""

_PLACE = {name: place for place, name in enumerate(FEATURE_NAMES)}
_KIND_PLACES = np.array([_PLACE[name] for name in KIND_NAMES])
_GROWING = (
    *("log_ideal_us", "log_compute_us", "log_memory_us", "log_usual_us", "log_bytes_to_cache"),
    *("log_blocks_to_units", "log_small_blocks_to_units"),
    *("log_b_to_units", "log_m_to_tile", "log_n_to_tile", "log_k_to_tile"),
)
_ROUNDED_UP = (
    ("log_blocks_to_units", "last_wave_fill"),
    ("log_small_blocks_to_units", "last_small_wave_fill"),
    ("log_m_to_tile", "fill_of_tile_m"),
    ("log_n_to_tile", "fill_of_tile_n"),
    ("log_k_to_tile", "fill_of_tile_k"),
)
"""A size over the share of it that is used is the size rounded up: whole waves, whole tiles."""

NUM_SIZES = len(_GROWING) + len(_ROUNDED_UP)
_GROWING_PLACES = np.array([_PLACE[name] for name in _GROWING])
_SIZE_PLACES = np.array([_PLACE[size] for size, _ in _ROUNDED_UP])
_FILL_PLACES = np.array([_PLACE[fill] for _, fill in _ROUNDED_UP])
_CHUNK_ROWS = 4096

Array32 = NDArray[np.float32]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def size_columns(features_NF: Array32) -> Array32:
    """(N, P) logarithms of what grows, or stays, when an operator's sizes, flop or bytes grow."""
    growing = features_NF[:, _GROWING_PLACES]
    rounded_up = features_NF[:, _SIZE_PLACES] - np.log(features_NF[:, _FILL_PLACES])
    return np.column_stack([growing, rounded_up]).astype(np.float32)


def kind_columns(features_NF: Array32) -> Array32:
    """(N, K) ``KIND_NAMES``: equal for all operators of one family and dtype on one device."""
    return np.asarray(features_NF[:, _KIND_PLACES])


def log_times(
    tensors: Mapping[str, Array32],
    features_NF: Array32,
    ideal_s_N: FloatArray,
    *,
    edges_2E: IntArray,
    edge_kind_E: IntArray,
    is_pooled_N: NDArray[np.bool_],
) -> FloatArray:
    """(M, N) logarithms of times in seconds, the factor of each operator's graph included."""
    size_NP = (size_columns(features_NF) - tensors["size_mean"][0]) * tensors["size_scale"][0]
    kind_NK = (kind_columns(features_NF) - tensors["kind_mean"][0]) * tensors["kind_scale"][0]
    log_ideal_N = np.log(ideal_s_N)
    found_UK, kind_of_N = _distinct(kind_NK)
    state_MUH = _layer(tensors, "second", _silu(_layer(tensors, "first", found_UK)))
    state_MUH = _silu(state_MUH)
    num_rows = len(size_NP)
    if not edges_2E.shape[1] or "message_weight" not in tensors:
        gates = _Gates(tensors, state_MUH)
        log_time_MN = np.empty((len(state_MUH), num_rows))
        for start in range(0, num_rows, _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            one_MNH = gates.first(size_NP[part], kind_of_N[part])
            log_time_MN[:, part] = gates.log_time(
                size_NP[part], one_MNH, kind_of_N[part], log_ideal_N[part]
            )
        return log_time_MN
    state_MNH = state_MUH[:, kind_of_N]
    means, every_row = _Means(edges_2E, edge_kind_E, num_rows), np.arange(num_rows)
    for number in range(tensors["message_weight"].shape[1]):
        one_MNH = _Gates(tensors, state_MNH).first(size_NP, every_row)
        state_MNH = state_MNH + means.messages(one_MNH, tensors["message_weight"][:, number])
    gates = _Gates(tensors, state_MNH)
    one_MNH = gates.first(size_NP, every_row)
    log_time_MN = gates.log_time(size_NP, one_MNH, every_row, log_ideal_N)
    has_edge_N = np.zeros(num_rows, np.bool_)
    has_edge_N[edges_2E.ravel()] = True
    weight_MN = np.exp(log_time_MN) * is_pooled_N * 1e6
    factor_MN = _log_factors(tensors, one_MNH, weight_MN, components(edges_2E, num_rows))
    return log_time_MN + np.where(has_edge_N, factor_MN, 0.0)


def _distinct(kind_NK: Array32) -> tuple[Array32, IntArray]:
    """The distinct rows, and which of them each row is."""
    if not len(kind_NK):
        return kind_NK, np.zeros(0, np.int64)
    # Rows of equal kinds have equal sums of their columns with fixed odd weights.
    key_N = kind_NK.astype(np.float64) @ np.random.default_rng(0).normal(size=kind_NK.shape[1])
    _, first, inverse = np.unique(key_N, return_index=True, return_inverse=True)
    return kind_NK[first], inverse.astype(np.int64)


def _layer(tensors: Mapping[str, Array32], name: str, x: Array32) -> Array32:
    return np.matmul(x, tensors[f"{name}_weight"]) + tensors[f"{name}_bias"][:, None]


def _silu(h: Array32) -> Array32:
    """Beyond 80 standard exponents float32 has nothing left to say."""
    return np.asarray(h / (1.0 + np.exp(np.minimum(-h, np.float32(80.0)))), np.float32)


def _bend(z: Array32) -> Array32:
    """A third of the units convex, a third concave, a third bounded; all increasing."""
    third = z.shape[-1] // 3
    z = np.clip(z, np.float32(-LARGEST_UNIT), np.float32(LARGEST_UNIT))
    root = np.sqrt(z * z + np.float32(4.0))
    half = np.float32(0.5)
    out = np.empty_like(z)
    out[..., :third] = (z[..., :third] + root[..., :third]) * half
    middle = slice(third, 2 * third)
    out[..., middle] = (z[..., middle] - root[..., middle]) * half
    out[..., 2 * third :] = np.float32(2.0) * z[..., 2 * third :] / root[..., 2 * third :]
    return out


class _Gates:
    """What a kind of operator does to slopes and thresholds; U kinds, or one for each row."""

    def __init__(self, tensors: Mapping[str, Array32], state_MUH: Array32) -> None:
        self._tensors = tensors
        self._size_MUP = self._gate("size_gate", state_MUH)
        self._one_gate_MUH = self._gate("one_gate", state_MUH)
        self._one_bias_MUH = _layer(tensors, "one_shift", state_MUH)
        self._two_gate_MUH = self._gate("two_gate", state_MUH)
        self._two_bias_MUH = _layer(tensors, "two_shift", state_MUH)
        self._out_gate_MUH = self._gate("out_gate", state_MUH)
        self._out_bias_MU = _layer(tensors, "out_shift", state_MUH)[..., 0]

    def first(self, size_NP: Array32, kind_N: IntArray) -> Array32:
        """(M, N, H) first growing layer."""
        size_MNP = size_NP * self._size_MUP[:, kind_N]
        z_MNH = np.matmul(size_MNP, self._tensors["one_weight"])
        return _bend(z_MNH * self._one_gate_MUH[:, kind_N] + self._one_bias_MUH[:, kind_N])

    def log_time(
        self, size_NP: Array32, one_MNH: Array32, kind_N: IntArray, log_ideal_N: FloatArray
    ) -> FloatArray:
        """(M, N) of seconds."""
        z_MNH = np.matmul(one_MNH, self._tensors["two_weight"])
        two_MNH = _bend(z_MNH * self._two_gate_MUH[:, kind_N] + self._two_bias_MUH[:, kind_N])
        two_MNH *= self._out_gate_MUH[:, kind_N]
        size_MNP = size_NP * self._size_MUP[:, kind_N]
        answer_MN = (
            np.matmul(two_MNH, self._tensors["out_weight"])[..., 0]
            + np.matmul(size_MNP, self._tensors["skip_weight"])[..., 0]
            + self._out_bias_MU[:, kind_N]
        ).astype(np.float64)
        most_N = np.logaddexp(log_ideal_N + LOG_MAX_SLOWDOWN, LOG_MAX_START_S)
        log_excess_MN = np.minimum(answer_MN + TIME_UNIT_LOG_S, most_N)
        return np.asarray(np.logaddexp(log_excess_MN, log_ideal_N))

    def _gate(self, name: str, state_MUH: Array32) -> Array32:
        raw = _layer(self._tensors, name, state_MUH)
        return np.exp(np.float32(GATE_RANGE) * np.tanh(raw / np.float32(GATE_RANGE)))


def _log_factors(
    tensors: Mapping[str, Array32], one_MNH: Array32, weight_MN: FloatArray, component_N: IntArray
) -> FloatArray:
    score_MN = np.einsum("mnh,mh->mn", one_MNH, tensors["graph_weight"]).astype(np.float64)
    num_components = int(component_N.max()) + 1
    factors = []
    for score_N, weight_N, bias in zip(score_MN, weight_MN, tensors["graph_bias"], strict=True):
        total_C = np.bincount(component_N, weight_N, num_components)
        sum_C = np.bincount(component_N, weight_N * score_N, num_components)
        mean_C = sum_C / np.maximum(total_C, 1e-6)
        factors.append((math.log(MAX_FACTOR) * np.tanh(mean_C + float(bias)))[component_N])
    return np.stack(factors)


class _Means:
    """Means over neighbors, for each directed kind."""

    def __init__(self, edges_2E: IntArray, edge_kind_E: IntArray, num_rows: int) -> None:
        self._num_rows = num_rows
        self._parts: list[tuple[int, IntArray, IntArray, IntArray, Array32]] = []
        for kind in np.unique(edge_kind_E):
            first, second = edges_2E[:, edge_kind_E == kind]
            self._add(int(kind), first, second)
            self._add(int(kind) + len(EdgeKind), second, first)

    def _add(self, kind: int, source: IntArray, target: IntArray) -> None:
        order = np.argsort(target, kind="stable")
        targets, starts, counts = np.unique(target[order], return_index=True, return_counts=True)
        shares = (1.0 / counts).astype(np.float32)[:, None]
        self._parts.append((kind, source[order], targets, starts, shares))

    def messages(self, h_MNH: Array32, weight_MRHH: Array32) -> Array32:
        """(M, N, H) what arrives at each row."""
        out_MNH = np.zeros((*h_MNH.shape[:2], weight_MRHH.shape[-1]), np.float32)
        for kind, source, targets, starts, shares in self._parts:
            sums = np.add.reduceat(h_MNH[:, source], starts, axis=1)
            out_MNH[:, targets] += np.matmul(sums * shares, weight_MRHH[:, kind])
        return out_MNH
