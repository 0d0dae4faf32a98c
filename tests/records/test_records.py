"""Records: what is appended is read back, and damage is skipped and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshwright import records
from meshwright.errors import BadRequest

MACHINE = records.Machine(
    processor="a cpu", num_cores=2, memory_bytes=8, accelerators=(), system="Linux x86_64"
)
SOFTWARE = records.Software(python="3.11.0", packages={"torch": "2.13.0"})


def record(**changes: Any) -> records.Record:
    fields: dict[str, Any] = {
        "kind": "operator",
        "name": "aten.mm.default",
        "machine": MACHINE,
        "software": SOFTWARE,
        "method": "perf_counter",
        "num_repeats": 3,
        "median": 2.0,
        "p10": 1.0,
        "p90": 3.0,
        "unit": "s",
        "measured_utc": "2026-01-01T00:00:00+00:00",
        "extra": {"rank": 0, "dtype": "float32", "ratio": 1.0, "note": None},
    }
    return records.Record(**fields | changes)


def report(**changes: Any) -> records.StepReport:
    fields: dict[str, Any] = {
        "plan_sha256": "aa",
        "model": "gpt",
        "graph_sha256": "bb",
        "cluster": "cpu:2",
        "mesh": {"pp": 1, "tp": 2},
        "num_microbatches": 1,
        "precision": "fp32",
        "step_time": records.timing_of([3.0, 1.0, 2.0]),
        "method": "perf_counter",
        "memory": [
            records.RankMemory(
                rank=rank,
                parameter_bytes=10,
                gradient_bytes=10,
                optimizer_bytes=20,
                activation_bytes=5 + rank,
            )
            for rank in range(2)
        ],
        "losses": [2.5, None],
        "verified": records.Verified(loss=0.0, gradients=1e-12, parameters=1e-11),
        "samples_per_s": 4.0,
        "machine": MACHINE,
        "software": SOFTWARE,
        "measured_utc": "2026-01-01T00:00:00+00:00",
    }
    return records.StepReport(**fields | changes)


def test_percentiles_are_interpolated() -> None:
    """Of 0, 1, ..., 10 the tenth percentile is 1; of 1, 2 the median lies between them."""
    timing = records.timing_of([float(time_s) for time_s in range(10, -1, -1)])

    assert (5.0, 1.0, 9.0, 11) == (timing.median_s, timing.p10_s, timing.p90_s, timing.num_repeats)
    assert 10.0 == timing.times_s[0]
    assert 1.5 == records.timing_of([1.0, 2.0]).median_s


def test_records_come_back_in_order(tmp_path: Path) -> None:
    store = records.RecordStore(tmp_path / "store")
    assert ([], []) == store.read()

    store.append(record(name="a\nb"), record(name="é"))
    store.append(record(name="c"))

    assert ([record(name="a\nb"), record(name="é"), record(name="c")], []) == store.read()
    assert tmp_path / "store" / "records.jsonl" == store.path


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    store = records.RecordStore(tmp_path / "r.jsonl")
    store.append(record(name="a"), record(name="b"))
    store.path.write_bytes(store.path.read_bytes()[:-20])
    store.append(record(name="c"))
    found, problems = store.read()

    assert ["a", "c"] == [item.name for item in found]
    assert 1 == len(problems)
    assert "line 2: not JSON" in problems[0]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b'"median":2.0', b'"median":2.5', "the checksum does not match"),
        (b'"median":2.0', b'"median":NaN', "$.record.median: NaN is not a number"),
        (b'"kind":', b'"unit":"s","kind":', "$.record.unit: the key stands twice"),
        (b"aten", b"\xff\xfe", "not valid UTF-8"),
        (b'"sha256"', b'"sha"', "not a line of a record store"),
        (b'"aten.', b'"' + b"x" * 2**21 + b".", "longer than 1048576 bytes"),
    ],
)
def test_a_corrupt_line_is_skipped_and_named(
    tmp_path: Path, old: bytes, new: bytes, expected: str
) -> None:
    store = records.RecordStore(tmp_path / "r.jsonl")
    store.append(record())
    damaged = store.path.read_bytes().replace(old, new)
    store.path.write_bytes(damaged)
    store.append(record(name="good"))
    found, problems = store.read()

    assert ["good"] == [item.name for item in found]
    assert 1 == len(problems)
    assert expected in problems[0]
    assert "\n" not in problems[0]


def test_a_reformatted_line_is_still_whole(tmp_path: Path) -> None:
    store = records.RecordStore(tmp_path / "r.jsonl")
    store.append(record())
    store.path.write_text(json.dumps(json.loads(store.path.read_text()), sort_keys=True) + "\n")

    assert ([record()], []) == store.read()


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(BadRequest, match="cannot add records"):
        records.RecordStore(tmp_path / "file").append(record())


@pytest.mark.parametrize(
    "changes", [{"median": float("nan")}, {"p10": 2.5}, {"extra": {"a": float("inf")}}]
)
def test_a_record_holds_only_numbers_that_make_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes)) if "p10" not in changes else "median"):
        record(**changes)


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(report().to_json())

    assert report() == records.read_step_report(tmp_path / "report.json")
    assert {"loss": 0.0, "gradients": 1e-12, "parameters": 1e-11} == json.loads(report().to_json())[
        "verified"
    ]
    assert 46 == report().peak_memory_bytes


def test_a_report_with_a_wrong_key_is_refused() -> None:
    text = report().to_json().replace('"rank": 1', '"rank": "1"')

    with pytest.raises(BadRequest, match=r"\$\.memory\[1\]\.rank: expected int, got str"):
        records.read_step_report(text)


def test_a_report_becomes_records(tmp_path: Path) -> None:
    store = records.RecordStore(tmp_path)
    store.append(*report().to_records())
    (step, *memory), problems = store.read()

    assert [] == problems
    assert ("step_time", 2.0, 3, "s") == (step.kind, step.median, step.num_repeats, step.unit)
    assert 2 == step.extra["mesh_tp"]
    assert [10, 10, 20, 5, 10, 10, 20, 6] == [item.median for item in memory]
    assert (1, "activation") == (memory[-1].extra["rank"], memory[-1].extra["cause"])


def test_what_is_not_finite_never_passes_as_verified() -> None:
    good = records.Verified(loss=0.0, gradients=1e-12, parameters=1e-11)
    bad = msgspec.structs.replace(good, gradients=records.finite_or_none(float("nan")))

    assert good.within(1e-10)
    assert not good.within(1e-12)
    assert not bad.within(1.0)
    with pytest.raises(ValueError, match="not finite"):
        report(losses=[float("inf")])


def test_machine_and_software_are_described() -> None:
    machine = records.describe_machine()
    software = records.describe_software()

    assert machine.processor
    assert machine.num_cores >= 1
    assert "msgspec" not in software.packages
    assert software.python.startswith("3.")
    assert "numpy" in software.packages
