"""Features are ratios to the data sheet, and know no names, order or units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.cluster.model import Device
from meshwright.cost.work import DTYPES, Family, OperatorWork
from meshwright.gnn_cost.features import (
    DEVICE_FEATURES,
    FEATURE_NAMES,
    arithmetic_and_traffic_s,
    ideal_time_s,
    operator_features,
)

_DEVICE = Device(
    name="one",
    memory_bytes=10**10,
    memory_bytes_per_s=1e12,
    flop_per_s={"float32": 1e13, "bfloat16": 1e14},
    launch_latency_s=5e-6,
    source="made up",
    num_units=100,
    cache_bytes=10**7,
)


def _work(*rows: tuple[Family, tuple[float, float, float, float], float, float]) -> OperatorWork:
    return OperatorWork(
        family=np.array([row[0] for row in rows]),
        dtype=np.full(len(rows), DTYPES.index("bfloat16")),
        dims=np.array([row[1] for row in rows], np.float64),
        flop=np.array([row[2] for row in rows], np.float64),
        num_bytes=np.array([row[3] for row in rows], np.float64),
        edges=np.zeros((2, 0), np.int64),
        edge_kind=np.zeros(0, np.int64),
    )


_PRODUCT = (Family.MATMUL, (1, 1280, 1280, 640), 2 * 1280 * 1280 * 640, 2 * 3 * 1280 * 1280)
_SUM = (Family.ELEMENTWISE, (1, 1000, 5000, 3), 5e6, 3e7)
_ATTENDED = (Family.ATTENTION, (32, 512, 512, 64), 32 * 512 * 512 * 64 * 2, 4 * 32 * 512 * 64 * 2)


def _feature(work: OperatorWork, name: str, device: Device = _DEVICE) -> float:
    features = operator_features(work, [device], np.zeros(work.count, np.int64))
    return float(features[0, FEATURE_NAMES.index(name)])


def test_one_column_for_every_name() -> None:
    features = operator_features(_work(_PRODUCT, _SUM), [_DEVICE], np.array([0, 0]))

    assert (2, len(FEATURE_NAMES)) == features.shape
    assert np.float32 == features.dtype
    assert len(set(FEATURE_NAMES)) == len(FEATURE_NAMES)
    assert set(DEVICE_FEATURES) <= set(FEATURE_NAMES)
    assert np.isfinite(features).all()


def test_ideal_time_is_the_slower_of_arithmetic_and_traffic() -> None:
    """1e10 flop at 1e14 takes 100 us; 3e7 bytes are 1e7 at the cache's 96e11 and 2e7 at 1e12."""
    product = (Family.MATMUL, (1, 100, 100, 100), 1e10, 1e6)
    ideal_s = ideal_time_s(_work(product, _SUM), [_DEVICE], np.array([0, 0]))

    assert pytest.approx(1e-4) == ideal_s[0]
    assert pytest.approx(1e7 / 9.6e12 + 2e7 / 1e12) == ideal_s[1]


def test_usual_times_of_arithmetic_and_traffic() -> None:
    """1e14 flop/s; the cache is no faster than the memory, as 100 units of 1e10 make 1e12."""
    product = (Family.MATMUL, (1, 100, 100, 100), 1e10, 1e6)
    arithmetic_s, traffic_s = arithmetic_and_traffic_s(_work(product), [_DEVICE], np.array([0]))

    assert pytest.approx(1e-4) == arithmetic_s[0]
    assert pytest.approx(1e-6) == traffic_s[0]


def test_without_a_known_cache_all_comes_from_memory() -> None:
    plain = replace(_DEVICE, cache_bytes=0, num_units=0)
    ideal_s = ideal_time_s(_work(_SUM), [plain], np.array([0]))

    assert pytest.approx(3e-5) == ideal_s[0]


def test_ten_by_ten_tiles_fill_one_wave_of_a_hundred_units() -> None:
    assert 1.0 == _feature(_work(_PRODUCT), "last_wave_fill")
    assert pytest.approx(0.0) == _feature(_work(_PRODUCT), "log_blocks_to_units")


def test_one_tile_more_opens_a_second_wave() -> None:
    """11 x 10 tiles on 100 units take two waves: 110 of 200 places."""
    wider = (Family.MATMUL, (1, 1281, 1280, 640), 1e9, 1e7)

    assert pytest.approx(0.55) == _feature(_work(wider), "last_wave_fill")
    assert pytest.approx(1281 / 1408) == _feature(_work(wider), "fill_of_tile_m")
    assert 0.0 == _feature(_work(wider), "alignment_m")
    assert 1.0 == _feature(_work(wider), "alignment_n")


def test_causal_attention_shows_as_half_the_dense_arithmetic() -> None:
    """Both products of the full square are 4 b m n k; the causal half 2 b m n k, the dense unit."""
    full = (Family.ATTENTION, _ATTENDED[1], 2 * _ATTENDED[2], _ATTENDED[3])

    assert pytest.approx(0.0, abs=1e-6) == _feature(_work(_ATTENDED), "log_flop_to_dense")
    assert pytest.approx(np.log(2.0)) == _feature(_work(full), "log_flop_to_dense")


def test_order_of_rows_changes_nothing() -> None:
    rows = (_PRODUCT, _SUM, _ATTENDED)
    forth = operator_features(_work(*rows), [_DEVICE], np.zeros(3, np.int64))
    back = operator_features(_work(*rows[::-1]), [_DEVICE], np.zeros(3, np.int64))

    assert np.array_equal(forth, back[::-1])


def test_names_and_places_of_devices_change_nothing() -> None:
    other = replace(_DEVICE, memory_bytes_per_s=2e12)
    renamed = replace(_DEVICE, name="two", memory_bytes=1, source="elsewhere")
    first = operator_features(_work(_PRODUCT, _SUM), [_DEVICE, other], np.array([0, 1]))
    second = operator_features(_work(_PRODUCT, _SUM), [other, renamed], np.array([1, 0]))

    assert np.array_equal(first, second)


def test_a_device_twice_as_fast_at_all_differs_in_time_and_device_columns_only() -> None:
    """Twice the rates with twice the work give equal ratios: the operator has the same time."""
    twice = replace(
        _DEVICE,
        memory_bytes_per_s=2e12,
        flop_per_s={name: 2 * rate for name, rate in _DEVICE.flop_per_s.items()},
    )
    features = operator_features(_work(_PRODUCT, _PRODUCT), [_DEVICE, twice], np.array([0, 1]))
    differing = {
        name
        for name, one, two in zip(FEATURE_NAMES, *features, strict=True)
        if not np.isclose(one, two)
    }

    allowed = {
        *("log_ideal_us", "log_compute_us", "log_memory_us", "log_usual_us"),
        "log_intensity_to_ridge",
    }
    assert differing <= allowed | set(DEVICE_FEATURES)
    assert "log_ideal_us" in differing


def test_a_device_without_the_dtype_is_priced_at_what_stands_for_it() -> None:
    """Eight-bit products on a device without such units run at the 16-bit rate."""
    eight_bits = replace(_work(_PRODUCT), dtype=np.array([DTYPES.index("float8_e4m3fn")]))

    assert (
        ideal_time_s(_work(_PRODUCT), [_DEVICE], np.array([0]))[0]
        == (ideal_time_s(eight_bits, [_DEVICE], np.array([0]))[0])
    )
    assert 1.0 == _feature(eight_bits, "is_8bit")
