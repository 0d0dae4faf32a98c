"""Traces far larger than what is kept of them: memory, speed, and the answers of a small one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.profiling.traces.large_import import import_in_a_process, write_large_trace

MIB = 2**20

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="peak memory is read from /proc"
)


def _imported(folder: Path, num_bytes: int) -> tuple[int, dict[str, Any], dict[str, Any]]:
    path = folder / "large.json"
    size = write_large_trace(path, num_bytes)
    found = import_in_a_process(path)
    path.unlink()
    ((one,),) = ([rank for rank in summary["ranks"]] for summary in found["summaries"])
    return size, found, one


def _check_answers(rank: dict[str, Any]) -> None:
    """Each iteration: 9.99 ms, 100 kernels of 60 us, one all-reduce of 4 MiB that takes 1 ms."""
    count = rank["num_iterations"]
    (device,) = rank["devices"]
    (reduction,) = rank["collectives"]
    assert (101 * count, 100 * count) == (
        device["num_kernels"],
        sum(one["num_calls"] for one in rank["operators"]["dearest"]),
    )
    assert (0, count, 4 * MIB, "all_reduce") == (
        rank["operators"]["num_unassigned"],
        reduction["num_calls"],
        reduction["bytes"],
        reduction["name"],
    )
    for share in device["iterations"]:
        assert [9.99e-3, 6e-3, 1e-3, 0.0, 2.99e-3] == pytest.approx(
            [
                share[key]
                for key in ("span_s", "compute_s", "communication_s", "overlap_s", "idle_s")
            ],
            abs=2e-9,
        )


def test_a_trace_of_24_megabytes(tmp_path: Path) -> None:
    """What is kept must stay far below the file: 24 MB add less than 60 MiB to a small one's."""
    _, small, _ = _imported(tmp_path, 100_000)
    size, large, rank = _imported(tmp_path, 24_000_000)

    assert size >= 24_000_000
    assert large["peak_rss_bytes"] - small["peak_rss_bytes"] < 60 * MIB
    _check_answers(rank)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trace_of_two_gigabytes_fits_one_and_is_read_fast_enough(tmp_path: Path) -> None:
    """The bar: 1 GiB of memory and 50 MB/s of one core."""
    size, found, rank = _imported(tmp_path, 2_000_000_000)

    assert size >= 2_000_000_000
    assert found["peak_rss_bytes"] <= 1024 * MIB
    assert size / found["cpu_s"] >= 50e6
    _check_answers(rank)
