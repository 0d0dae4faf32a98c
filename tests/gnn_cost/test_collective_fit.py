"""Fitting collectives: samples and their traps, recovery of known constants, robustness."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meshwright.cluster.catalog import find_device, find_link
from meshwright.cluster.model import GroupLevel
from meshwright.errors import BadRequest
from meshwright.gnn_cost.collectives.fit import fit_constants, predicted_time_s
from meshwright.gnn_cost.collectives.model import KINDS
from meshwright.gnn_cost.collectives.samples import (
    CollectiveSamples,
    MeasuredGroup,
    joined,
    samples_from_records,
    samples_from_table,
    thinned,
)
from meshwright.gnn_cost.collectives.splits import analytic_time_s, splits
from meshwright.gnn_cost.collectives.terms import PRIORS, CollectiveConstants
from meshwright.gnn_cost.collectives.training import fit_collectives, half_width
from meshwright.records import Machine, Record, Software

TRUTH = CollectiveConstants(
    values={name: mean for name, (mean, _) in PRIORS.items()}
    | {"start.all_gather": np.log(4e-6), "hop.all_gather": np.log(2e-6)}
    | {"efficiency.all_gather": 0.2}
)


def on_nvlink(gpu: str, device: str, kind: str, ranks: int) -> MeasuredGroup:
    entry = find_device(device, where="test")
    level = GroupLevel(level_index=0, link=entry.host_link, group_sizes=(ranks,))
    return MeasuredGroup(
        kind=kind,
        levels=(level,),
        num_ranks=ranks,
        device=entry.device,
        source="aiconfigurator_nccl",
        gpu=gpu,
    )


def measured(*, noise: float = 0.0, seed: int = 0) -> CollectiveSamples:
    """Three GPUs whose collectives follow ``TRUTH``, over sizes and group sizes."""
    gpus = {
        "a100_sxm_80gb": "a100-sxm-80gb",
        "h100_sxm_80gb": "h100-sxm-80gb",
        "b200": "b200-sxm-180gb",
    }
    groups = tuple(
        on_nvlink(gpu, device, kind, ranks)
        for gpu, device in gpus.items()
        for kind in KINDS[:4]
        for ranks in (2, 4, 8)
    )
    sizes = 2.0 ** np.arange(10, 30)
    samples = CollectiveSamples(
        groups=groups,
        group=np.repeat(np.arange(len(groups)), len(sizes)),
        num_bytes=np.tile(sizes, len(groups)),
        time_s=np.ones(len(groups) * len(sizes)),
    )
    rng = np.random.default_rng(seed)
    time_s = predicted_time_s(TRUTH, samples) * np.exp(noise * rng.standard_normal(samples.count))
    return replace(samples, time_s=time_s)


def worst(constants: CollectiveConstants, samples: CollectiveSamples) -> float:
    return float(np.abs(predicted_time_s(constants, samples) / samples.time_s - 1).max())


def test_known_constants_are_found_again() -> None:
    samples = measured()

    assert worst(fit_constants(samples), samples) < 0.03


def test_a_gpu_that_was_left_out_follows_from_its_data_sheet() -> None:
    samples = measured()
    is_out = samples.labels("gpu") == "h100_sxm_80gb"
    constants = fit_constants(samples.where(~is_out))

    assert worst(constants, samples.where(is_out)) < 0.1


def test_rows_that_are_off_by_much_change_little() -> None:
    clean, samples = measured(), measured(noise=0.02)
    time_s = samples.time_s.copy()
    time_s[::17] *= 50
    constants = fit_constants(replace(samples, time_s=time_s))

    assert worst(constants, clean) < 0.1


def test_equal_seeds_give_equal_constants() -> None:
    samples = measured(noise=0.05).where(np.arange(720) % 4 == 0)

    assert fit_constants(samples, seed=3) == fit_constants(samples, seed=3)


def test_launches_of_a_source_are_no_part_of_a_price() -> None:
    """30 us around every call of one source are found; other sources keep their times."""
    plain = measured()
    slow_groups = tuple(replace(group, source="eager") for group in plain.groups)
    slow = replace(plain, groups=slow_groups, time_s=plain.time_s + 30e-6)
    constants = fit_constants(joined([plain, slow]))

    assert pytest.approx(30e-6, rel=0.1) == constants.launch_s["eager|all_gather"]
    assert worst(constants, plain) < 0.05


def test_model_trusts_what_leaving_out_has_shown() -> None:
    model = fit_collectives(measured(noise=0.02), seed=0)

    assert {"nvlink"} == set(model.unseen_trust)
    assert 0.9 < model.unseen_trust["nvlink"] <= 1.0
    assert 0.02 < model.seen_half_width < 0.06
    assert 3 == len(model.effects)
    assert 8 == model.ranges["nvlink"].most_ranks


def test_too_little_is_said() -> None:
    few = measured().where(np.arange(720) < 5)

    with pytest.raises(BadRequest, match="5 measured collectives are too few"):
        fit_collectives(few)


def test_half_width_counts_every_split_alike() -> None:
    """Ten errors of 0.1 and one split of a thousand errors of 0.01: the first is half of all."""
    width = half_width([np.full(10, 0.1), np.full(1000, 0.01)])

    assert 0.1 == width


def test_splits_hold_out_whole_gpus_and_never_share_rows() -> None:
    samples = measured()
    found = list(splits(samples))

    assert ["a100", "h100", "b200", "blackwell"] == [s.name for s in found if s.kind == "system"]
    assert all(not (split.test & split.train).any() for split in found)
    sizes = [split for split in found if split.kind == "size"]
    assert (np.sum([split.test for split in sizes], axis=0) == 1).all()


def test_analytic_baseline_by_hand() -> None:
    """Two A100: 3.4 us and half of 240 GB at 300 GB/s times 0.8 is half a second."""
    samples = CollectiveSamples(
        groups=(on_nvlink("a100_sxm_80gb", "a100-sxm-80gb", "all_gather", 2),),
        group=np.zeros(1, dtype=np.int64),
        num_bytes=np.array([240e9]),
        time_s=np.ones(1),
    )

    assert pytest.approx(0.5000034) == analytic_time_s(samples)[0]


def test_thinned_takes_medians_of_each_half_octave() -> None:
    one = replace(
        measured().where(np.arange(720) < 3),
        num_bytes=np.array([1000.0, 1010.0, 1020.0]),
        time_s=np.array([1.0, 5.0, 2.0]),
    )
    found = thinned(one)

    assert [1010.0] == found.num_bytes.tolist()
    assert [2.0] == found.time_s.tolist()


# Tables and Records ------------------------------------------------------------------------------


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    row = {
        "source": "mine", "gpu": "a100_sxm_80gb", "fabric": "nvlink", "collective": "all_reduce",
        "group_size": 8, "hosts": 1, "bytes": 1e6, "dtype": "fp16", "time_s": 1e-4, "extra": "{}",
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row | changed for changed in rows]), path)


def test_traps_of_tables_are_counted_and_left_out(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {},
        {"time_s": 1e6},
        {"bytes": None},
        {"dtype": "int8"},
        {"gpu": "abacus"},
        {"fabric": "unknown"},
        {"source": "aiconfigurator_custom_allreduce"},
        {"collective": "all_reduce", "source": "vidur", "bytes": 4096.0},
    ]
    write_table(tmp_path / "table.parquet", rows)
    samples, left_out = samples_from_table(tmp_path / "table.parquet")

    assert 1 == samples.count
    assert "nvlink3" == samples.groups[0].levels[0].link.name
    assert 7 == sum(left_out.values())
    assert 1 == left_out["failed: no time, or about 1e6 s"]
    assert 1 == left_out["GPU not in the catalog"]


def test_groups_lie_on_the_links_assumed_for_their_source(tmp_path: Path) -> None:
    """vidur: one 100 Gb/s port for the 8 GPUs of a host. Others: the catalog's network."""
    two_hosts: dict[str, object] = {"group_size": 16, "hosts": 2, "fabric": "mixed"}
    write_table(
        tmp_path / "table.parquet",
        [two_hosts, two_hosts | {"source": "vidur"}, {"fabric": "pcie"}],
    )
    samples, _ = samples_from_table(tmp_path / "table.parquet")
    found = {
        (group.source, len(group.levels)): group.levels[-1].link.bytes_per_s
        for group in samples.groups
    }

    assert {("mine", 2): 25e9, ("vidur", 2): 12.5e9 / 8, ("mine", 1): 32e9} == found


@pytest.mark.parametrize(
    ("fabric", "group_size", "hosts", "parts"),
    [
        ("nvlink", 72, 18, [("nvlink5", (72,))]),
        ("", 72, 18, [("nvlink5", (72,))]),
        ("nvlink", 144, 36, [("nvlink5", (72, 72)), ("infiniband-ndr", (2,))]),
        ("ib", 8, 2, [("nvlink5", (4, 4)), ("infiniband-ndr", (2,))]),
    ],
)
def test_racks_that_nvlink_joins_are_one_level(
    fabric: str, group_size: int, hosts: int, parts: list[object], tmp_path: Path
) -> None:
    """NVL72, unless the fabric between its hosts is said to be another."""
    row: dict[str, object] = {"gpu": "gb200", "fabric": fabric}
    write_table(tmp_path / "table.parquet", [row | {"group_size": group_size, "hosts": hosts}])
    samples, _ = samples_from_table(tmp_path / "table.parquet")

    levels = samples.groups[0].levels
    assert parts == [(level.link.name, level.group_sizes) for level in levels]


def test_csv_is_read_alike_and_columns_may_lack(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(
        "gpu,collective,group_size,bytes,time_s\nh100_sxm_80gb,all_gather,4,1048576,2e-5\n"
    )
    samples, left_out = samples_from_table(path)

    assert {} == left_out
    assert [1048576.0] == samples.num_bytes.tolist()
    assert 4 == samples.groups[0].num_ranks


@pytest.mark.parametrize(
    "text", ["", "gpu,bytes\na,1\n", "gpu,collective,group_size,bytes,time_s\na,b,c,d,e\n"]
)
def test_what_is_no_table_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)

    with pytest.raises(BadRequest, match="it needs the columns gpu, collective") as caught:
        samples_from_table(path)
    assert "\n" not in str(caught.value)


def record(name: str, **extra: int) -> Record:
    return Record(
        kind="collective",
        name=name,
        device="h100-sxm-80gb",
        writer="test",
        machine=Machine(
            processor="x", num_cores=1, memory_bytes=0, accelerators=(), system="Linux x86_64"
        ),
        software=Software(python="3.11", packages={}),
        method="test",
        num_repeats=1,
        median=2e-5,
        p10=2e-5,
        p90=2e-5,
        unit="s",
        measured_utc="",
        extra=extra,
    )


def test_records_become_samples_of_their_cluster() -> None:
    link = find_link("nvlink4", where="test")
    levels = (GroupLevel(level_index=0, link=link, group_sizes=(8,)),)
    device = find_device("h100", where="test").device
    records = [
        record("all_reduce", bytes=1024, group_size=8, hosts=1),
        record("all_reduce", bytes=2048, group_size=8, hosts=1),
        record("all_reduce", bytes=1024, group_size=4, hosts=1),
        record("broadcast", bytes=1024, group_size=8, hosts=1),
    ]
    samples = samples_from_records(records, {(8, 1): levels}, device)

    assert [1024.0, 2048.0] == samples.num_bytes.tolist()
    assert 1 == len(samples.groups)
    assert [2e-5, 2e-5] == samples.time_s.tolist()
