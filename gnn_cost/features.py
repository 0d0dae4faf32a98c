"""What is known of an operator before it runs, as numbers that mean the same on every device.

All features are ratios to what the device's data sheet says, logarithms of such ratios, or flags,
so that a device never measured is described as well as a measured one. Nothing depends on names, on
the order of rows or on the units of anything.

The least time (``ideal_time_s``) of an operator on a device is::

    max(flop / peak, cached / cache_rate + (bytes - cached) / memory_rate)
    cached = min(bytes, cache)

with ``peak`` of the matrix units for products, attention and convolutions in its dtype, and of the
vector units (the ``float32`` rate, twice that for 2-byte types) for all else. ``cache_rate`` is
``96e9`` bytes/s for each compute unit (64 bytes a clock at 1.5 GHz, the width of the path from
second-level cache on NVIDIA GPUs since Volta) and never below the memory's. Without a known cache
everything comes from memory.

A *device-only time* is how long the device is busy with an operator's kernels while the queue of
launches runs ahead, as under a CUDA graph::

    t = floor_s + ideal_time_s / efficiency,   0 < efficiency <= 1

``floor_s`` is the start and drain of the kernels, between ``MIN_FLOOR_S`` and ``MAX_FLOOR_S`` for
each; it is not the time the host needs to launch (that is ``Device.launch_latency_s``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.model import Device
from meshwright.cost.work import DTYPES, Family, OperatorWork

__all__ = [
    "DEVICE_FEATURES",
    "ELEMENT_BYTES",
    "FEATURES_VERSION",
    "FEATURE_NAMES",
    "MATRIX_FAMILIES",
    "MAX_FLOOR_S",
    "MIN_FLOOR_S",
    "arithmetic_and_traffic_s",
    "ideal_time_s",
    "operator_features",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FEATURES_VERSION = 2
"""Grows with every change that gives other numbers; weights are only good for their version."""

MIN_FLOOR_S = 1e-6
MAX_FLOOR_S = 2e-5
"""Bounds of the fixed part of one operator's device-only time."""

MATRIX_FAMILIES = (
    Family.MATMUL,
    Family.BATCHED_MATMUL,
    Family.GROUPED_MATMUL,
    Family.ATTENTION,
    Family.ATTENTION_BACKWARD,
    Family.CONVOLUTION,
    Family.CONVOLUTION_BACKWARD,
)
"""Families that run on the matrix units where the device has them for the dtype."""

ELEMENT_BYTES = np.array([8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.5])
"""By place in ``DTYPES``."""

_CACHE_BYTES_PER_S_OF_UNIT = 96e9
_USUAL_CACHE_BYTES_PER_S_OF_UNIT = 10e9
_BACKWARD = (
    Family.ATTENTION_BACKWARD,
    Family.CONVOLUTION_BACKWARD,
    Family.NORM_BACKWARD,
    Family.SOFTMAX_BACKWARD,
    Family.EMBEDDING_BACKWARD,
)
_ATTENTION = (Family.ATTENTION, Family.ATTENTION_BACKWARD)
_WIDTHS = ("64bit", "32bit", "tf32", "16bit", "8bit", "4bit")
_WIDTH_OF_DTYPE = np.array([0, 1, 2, 3, 3, 4, 4, 5])
_FALLBACKS = {
    "float64": (("float32", 1 / 32),),
    "tf32": (("float32", 1.0),),
    "bfloat16": (("float16", 1.0), ("float32", 1.0)),
    "float16": (("bfloat16", 1.0), ("float32", 1.0)),
    "float8_e4m3fn": (("int8", 1.0), ("bfloat16", 1.0), ("float16", 1.0), ("float32", 1.0)),
    "int8": (("float8_e4m3fn", 1.0), ("float32", 1.0)),
    "nvfp4": (("float8_e4m3fn", 2.0), ("bfloat16", 1.0), ("float16", 1.0), ("float32", 1.0)),
}
"""Where a device lacks a rate: which stands for it, times what. Eight and four bits without units
of their own are unpacked and multiplied in 16."""

_SCALARS = (
    "log_ideal_us",
    "log_compute_us",
    "log_memory_us",
    "log_usual_us",
    "log_intensity_to_ridge",
    "log_bytes_to_cache",
    "cached_fraction",
    "log_blocks_to_units",
    "last_wave_fill",
    "log_small_blocks_to_units",
    "last_small_wave_fill",
    "fill_of_tile_m",
    "fill_of_tile_n",
    "fill_of_tile_k",
    "log_b_to_units",
    "log_m_to_tile",
    "log_n_to_tile",
    "log_k_to_tile",
    "log_flop_to_dense",
    "log_bytes_to_dense",
    "alignment_m",
    "alignment_n",
    "alignment_k",
    "log_matrix_to_vector_peak",
    "is_backward",
)
DEVICE_FEATURES = (
    "log_device_peak",
    "log_device_vector_peak",
    "log_device_bandwidth",
    "log_device_ridge",
    "log_device_units",
    "log_device_cache_to_bandwidth_us",
    "log_device_peak_of_unit",
    "log_device_bandwidth_of_unit",
    "is_cache_known",
    "is_units_known",
)
"""Those that are equal for all operators of one dtype on one device; a model that leaves them out
cannot tell devices apart but by what its operators do to them."""

FEATURE_NAMES = (
    *_SCALARS,
    *DEVICE_FEATURES,
    *(f"is_{width}" for width in _WIDTHS),
    *(f"is_{family.name.lower()}" for family in Family),
)
"""In the order of the columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sheet:
    """Data sheets by row of operators, (N,) each."""

    peak: FloatArray
    vector_peak: FloatArray
    bandwidth: FloatArray
    cache_bandwidth: FloatArray
    cache_bytes: FloatArray
    """0 where unknown."""
    units: FloatArray
    """Of compute; a guess by the vector peak where unknown."""
    is_units_known: FloatArray


def operator_features(
    work: OperatorWork, devices: Sequence[Device], device_rows: IntArray
) -> NDArray[np.float32]:
    """Features of every row; (N, F) in the order of ``FEATURE_NAMES``, all finite.

    Args:
        work: N operators.
        devices: types of device.
        device_rows: (N,) place in ``devices`` of the device that runs each operator.
    """
    sheet = _sheet_of(work, devices, device_rows)
    compute_s, memory_s = _bounds_s(work, sheet)
    columns = [
        *_time_columns(work, sheet, compute_s, memory_s, np.add(*_usual_bounds_s(work, sheet))),
        *_shape_columns(work, sheet),
        *_device_columns(sheet),
    ]
    width = _WIDTH_OF_DTYPE[work.dtype]
    columns += [width == index for index in range(len(_WIDTHS))]
    columns += [work.family == family for family in Family]
    return np.stack([np.asarray(column, np.float32) for column in columns], axis=1)


def ideal_time_s(
    work: OperatorWork, devices: Sequence[Device], device_rows: IntArray
) -> FloatArray:
    """Least time of every row by the data sheet (module docstring); (N,), without the floor."""
    return np.maximum(*_bounds_s(work, _sheet_of(work, devices, device_rows)))


def arithmetic_and_traffic_s(
    work: OperatorWork, devices: Sequence[Device], device_rows: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Usual times of every row's arithmetic and of its traffic at full rates; (N,) each.

    No bounds, but what measured times follow more closely than ``ideal_time_s``. Near the ridge it
    is their sum, as kernels hide traffic behind arithmetic only in part. From cache come ``10e9``
    bytes/s for each unit: products whose data would fit run at the memory's rate on A100, H100 and
    B200, and at 1.3 times that on an L40S, whose cache is large and memory slow.
    """
    return _usual_bounds_s(work, _sheet_of(work, devices, device_rows))


def _usual_bounds_s(work: OperatorWork, sheet: _Sheet) -> tuple[FloatArray, FloatArray]:
    rate = np.maximum(sheet.units * _USUAL_CACHE_BYTES_PER_S_OF_UNIT, sheet.bandwidth)
    return _bounds_s(work, replace(sheet, cache_bandwidth=rate))


def _bounds_s(work: OperatorWork, sheet: _Sheet) -> tuple[FloatArray, FloatArray]:
    """Least times of arithmetic and of traffic; both positive."""
    cached_bytes = np.minimum(work.num_bytes, sheet.cache_bytes)
    memory_s = cached_bytes / sheet.cache_bandwidth
    memory_s = memory_s + (work.num_bytes - cached_bytes) / sheet.bandwidth
    return work.flop / sheet.peak, memory_s


def _sheet_of(work: OperatorWork, devices: Sequence[Device], device_rows: IntArray) -> _Sheet:
    rates = np.array([[_peak_flop_per_s(one, dtype) for dtype in DTYPES] for one in devices])
    vector = np.array([one.flop_per_s["float32"] for one in devices])
    bandwidth = np.array([one.memory_bytes_per_s for one in devices])
    known_units = np.array([float(one.num_units) for one in devices])
    units = np.where(known_units > 0, known_units, np.maximum(vector / 200e9, 1.0))
    cache_rate = np.maximum(units * _CACHE_BYTES_PER_S_OF_UNIT, bandwidth)
    cache = np.array([float(one.cache_bytes) for one in devices])
    is_matrix = np.isin(work.family, MATRIX_FAMILIES)
    doubled = np.where(ELEMENT_BYTES[work.dtype] <= 2, 2.0, 1.0)
    vector_peak = vector[device_rows]
    return _Sheet(
        peak=np.where(is_matrix, rates[device_rows, work.dtype], vector_peak * doubled),
        vector_peak=vector_peak,
        bandwidth=bandwidth[device_rows],
        cache_bandwidth=cache_rate[device_rows],
        cache_bytes=cache[device_rows],
        units=units[device_rows],
        is_units_known=(known_units > 0)[device_rows].astype(np.float64),
    )


def _peak_flop_per_s(device: Device, dtype: str) -> float:
    rate = device.flop_per_s.get(dtype)
    if rate is not None:
        return rate
    for other, factor in _FALLBACKS.get(dtype, ()):
        if other in device.flop_per_s:
            return device.flop_per_s[other] * factor
    return device.flop_per_s["float32"]


def _time_columns(
    work: OperatorWork,
    sheet: _Sheet,
    compute_s: FloatArray,
    memory_s: FloatArray,
    usual_s: FloatArray,
) -> list[FloatArray]:
    cache_known = sheet.cache_bytes > 0
    cache = np.where(cache_known, sheet.cache_bytes, 1.0)
    to_cache = np.where(cache_known, _log(work.num_bytes / cache), 0.0)
    cached = np.minimum(sheet.cache_bytes / np.maximum(work.num_bytes, 1.0), 1.0)
    return [
        _log(np.maximum(compute_s, memory_s) / 1e-6),
        _log(compute_s / 1e-6),
        _log(memory_s / 1e-6),
        _log(usual_s / 1e-6),
        np.clip(_log(compute_s) - _log(memory_s), -10.0, 10.0),
        np.clip(to_cache, -10.0, 10.0),
        cached,
    ]


def _shape_columns(work: OperatorWork, sheet: _Sheet) -> list[FloatArray]:
    b, m, n, k = work.dims.T
    is_matrix = np.isin(work.family, MATRIX_FAMILIES)
    is_attention = np.isin(work.family, _ATTENTION)
    large = _blocks(b, m, n, is_matrix, is_attention, tile=128.0)
    small = _blocks(b, m, n, is_matrix, is_attention, tile=64.0)
    element_bytes = ELEMENT_BYTES[work.dtype]
    dense_flop = np.where(is_matrix, 2 * b * m * n * k, b * m * n)
    operands = np.where(is_attention, 2 * b * k * (m + n), b * (m * k + k * n + m * n))
    dense_bytes = element_bytes * np.where(is_matrix, operands, b * m * n)
    tile_m, tile_n, tile_k = (
        np.where(is_matrix, size, other)
        for size, other in ((128.0, 1.0), (128.0, 1024.0), (64.0, 1.0))
    )
    return [
        _log(large / sheet.units),
        _last_wave_fill(large, sheet.units),
        _log(small / sheet.units),
        _last_wave_fill(small, sheet.units),
        _tile_fill(m, tile_m),
        _tile_fill(n, tile_n),
        _tile_fill(k, tile_k),
        _log(b / sheet.units),
        _log(m / tile_m),
        _log(n / tile_n),
        _log(k / tile_k),
        np.clip(_log(work.flop / dense_flop), -10.0, 10.0),
        np.clip(_log(work.num_bytes / dense_bytes), -10.0, 10.0),
        _alignment(m),
        _alignment(n),
        _alignment(k),
        _log(sheet.peak / sheet.vector_peak),
        np.isin(work.family, _BACKWARD).astype(np.float64),
    ]


def _blocks(
    b: FloatArray,
    m: FloatArray,
    n: FloatArray,
    is_matrix: NDArray[np.bool_],
    is_attention: NDArray[np.bool_],
    *,
    tile: float,
) -> FloatArray:
    """Thread blocks the work falls into.

    Tiles of the result for products, tiles of queries for attention, runs of 16 x ``tile`` elements
    for all else.
    """
    rows = np.ceil(m / tile)
    columns = np.where(is_attention, 1.0, np.ceil(n / tile))
    return np.where(is_matrix, b * rows * columns, np.ceil(b * m * n / (16 * tile)))


def _last_wave_fill(blocks: FloatArray, units: FloatArray) -> FloatArray:
    """Share of all waves' places that are taken, when ``units`` blocks run at a time."""
    return blocks / (np.ceil(blocks / units) * units)


def _tile_fill(size: FloatArray, tile: FloatArray) -> FloatArray:
    """Share of the tiles along one dim that holds work."""
    return size / (np.ceil(size / tile) * tile)


def _alignment(size: FloatArray) -> FloatArray:
    """How often 2 divides a dim, up to seven times, over seven."""
    return np.sum([size % 2**power == 0 for power in range(1, 8)], axis=0) / 7.0


def _device_columns(sheet: _Sheet) -> list[FloatArray]:
    cache = np.maximum(sheet.cache_bytes, 1.0)
    return [
        _log(sheet.peak / 1e14),
        _log(sheet.vector_peak / 1e13),
        _log(sheet.bandwidth / 1e12),
        _log(sheet.peak / sheet.bandwidth / 100.0),
        _log(sheet.units / 100.0),
        np.where(sheet.cache_bytes > 0, _log(cache / sheet.bandwidth / 1e-6), 0.0),
        _log(sheet.peak / sheet.units / 1e12),
        _log(sheet.bandwidth / sheet.units / 1e10),
        (sheet.cache_bytes > 0).astype(np.float64),
        sheet.is_units_known,
    ]


def _log(ratio: FloatArray) -> FloatArray:
    """Natural logarithm, of at least 1e-6."""
    return np.log(np.maximum(ratio, 1e-6))
