"""The collectives' part: tables and Records in, a model that prices out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meshwright.cluster import parse_cluster
from meshwright.errors import BadRequest
from meshwright.gnn_cost.collectives import load_collectives
from meshwright.gnn_cost.fitting import FitData, FitSettings, fit
from meshwright.gnn_cost.fitting.collectives import CollectivesPart, collectives_of_records
from meshwright.records import Kind, Record, record_of_timing, timing_of
from meshwright.tracking import LocalTracker, read_lines


def record(*, size: int, num_bytes: int, hosts: int | None = None) -> Record:
    extra = {"bytes": num_bytes, "group_size": size, "dtype": "bf16"}
    return record_of_timing(
        timing_of([1e-5 + num_bytes / 2e11]),
        kind=Kind.COLLECTIVE,
        name="all_reduce",
        device="a100-sxm-80gb",
        verb="test",
        method="by formula",
        extra=extra if hosts is None else {**extra, "hosts": hosts},
    )


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [
        {
            "source": "ours",
            "gpu": gpu,
            "fabric": "nvlink",
            "collective": kind,
            "group_size": size,
            "ranks_per_host": size,
            "hosts": 1,
            "bytes": float(2**power),
            "dtype": "fp16",
            "time_s": 2e-5 + 2**power / rate,
            "extra": None,
        }
        for gpu, rate in (("a100_sxm_80gb", 1.2e11), ("h100_sxm_80gb", 2e11))
        for kind in ("all_reduce", "all_gather")
        for size in (2, 8)
        for power in range(12, 30, 2)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "collectives.parquet")
    return tmp_path / "collectives.parquet"


def test_a_fit_of_a_table_gives_prices_and_the_error_of_every_split(
    tmp_path: Path, table: Path
) -> None:
    result = fit(
        [CollectivesPart()],
        FitData(collectives=(table,)),
        FitSettings(),
        folder=tmp_path / "fit",
        tracker=LocalTracker(tmp_path / "fit"),
        reproduce="meshwright fit --tables collectives.parquet",
    )
    model = load_collectives(tmp_path / "fit" / "collectives.json")
    splits = {item.split: item for item in result.parts["collectives"].splits}
    index, _ = read_lines(tmp_path / "fit" / "index.jsonl")

    assert "meshwright fit --tables collectives.parquet" == model.card["reproduce"]
    assert {"system: a100", "system: h100", "size: octaves 0 of 3", "group_size: 8 ranks"} <= {
        *splits
    }
    assert splits["size: octaves 1 of 3"].mape < 0.1
    assert ["collectives/splits", "collectives/worst"] == [
        line["name"] for line in index if line["event"] == "table"
    ]


def test_a_budget_that_is_spent_leaves_the_part_out(tmp_path: Path, table: Path) -> None:
    result = fit(
        [CollectivesPart()],
        FitData(collectives=(table,)),
        FitSettings(),
        folder=tmp_path / "fit",
        tracker=LocalTracker(tmp_path / "fit"),
        reproduce="",
        budget_s=0.0,
    )

    assert result.is_cut
    assert not (tmp_path / "fit" / "collectives.json").exists()


def test_groups_of_records_are_found_on_the_cluster() -> None:
    """A group of 4 on 1 host, one of 4 on 2 hosts, and one that the cluster has no room for."""
    records = (
        record(size=4, num_bytes=2**20),
        record(size=4, num_bytes=2**20, hosts=2),
        record(size=64, num_bytes=2**20),
    )
    found = collectives_of_records(records, parse_cluster("2x4xa100-80gb"))

    assert [1, 2] == [len(group.levels) for group in found.groups]
    assert [4, 4] == [group.num_ranks for group in found.groups]
    assert np.allclose(1e-5 + 2**20 / 2e11, found.time_s)


def test_records_without_their_cluster_are_left_out_with_the_reason() -> None:
    data = FitData(records=(record(size=4, num_bytes=2**20),))

    assert "give --cluster" in CollectivesPart().reason_to_skip(data)


def test_a_cluster_of_two_kinds_cannot_say_what_was_measured_where(tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.toml"
    mixed.write_text(
        '[[hosts]]\ndevice = "a100-sxm-80gb"\nnum_devices = 4\n'
        '[[hosts]]\ndevice = "h100-sxm-80gb"\nnum_devices = 4\n'
        '[[levels]]\nhosts_per_group = 2\nlink = "infiniband-ndr"\n'
    )

    with pytest.raises(BadRequest, match="several types of device"):
        collectives_of_records((record(size=4, num_bytes=8),), parse_cluster(str(mixed)))
