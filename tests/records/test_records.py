"""Records and reports: what they refuse, and what they are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshwright import __version__, records
from meshwright.errors import BadRequest
from tests.records.examples import MACHINE, SOFTWARE, record


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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "operators"}, "kind is 'operators'; known: operator, collective"),
        ({"unit": "ms"}, "unit is 'ms'; operator is measured in s"),
        ({"extra": {"direction": "fwd"}}, "extra lacks 'dtype', which every operator needs"),
        ({"extra": {"direction": "fwd", "dtype": None}}, "extra lacks 'dtype'"),
        (
            {"extra": {"direction": "fwd", "dtype": "fp32", "width_m": 1}},
            "extra holds 'width_m', which is no key of operator",
        ),
        (
            {"extra": {"direction": "sideways", "dtype": "fp32"}},
            "holds direction 'sideways'; known: fwd, bwd",
        ),
        ({"extra": {"direction": "fwd", "dtype": "fp99"}}, "holds dtype 'fp99'; known: fp64"),
        (
            {"kind": "collective", "name": "teleport", "extra": {"bytes": 1, "group_size": 2}},
            "name is 'teleport'; known: all_reduce",
        ),
        (
            {"kind": "collective", "name": "all_reduce", "extra": {"bytes": 1, "group_size": 1}},
            "holds group_size 1; all_reduce needs 2 or more ranks",
        ),
        ({"num_repeats": 0}, "num_repeats is 0"),
        ({"samples": (1.0, 2.0)}, "samples holds 2 of 3 repeats"),
        ({"samples": (1.0, 2.0, float("inf"))}, "samples holds a value that is not finite"),
        ({"schema_version": 3}, "schema_version is 3, this Meshwright reads 2"),
    ],
)
def test_a_record_follows_its_kind(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        record(**changes)


def test_a_run_may_have_any_column() -> None:
    extra = {"run_id": "r1", "what the authors called it": 3}

    assert extra == record(kind="run", unit="ranks", extra=extra).extra


def test_every_kind_has_its_keys() -> None:
    assert set(records.Kind) == set(records.KINDS)
    assert [] == [
        (kind, key)
        for kind, keys in records.KINDS.items()
        for key in keys.required
        if key in keys.optional or not keys.allows(key)
    ]


def test_a_record_of_a_timing_is_one_call() -> None:
    """The machine, the software, the time and the writer are filled in; None is left out."""
    made = records.record_of_timing(
        records.timing_of([3.0, 1.0, 2.0]),
        kind=records.Kind.OPERATOR,
        name="linear",
        device="cpu",
        verb="profile ops",
        method="perf_counter",
        extra={"direction": "fwd", "dtype": "fp32", "model": None},
    )

    assert ("operator", 2.0, 3, "s") == (made.kind, made.median, made.num_repeats, made.unit)
    assert (3.0, 1.0, 2.0) == made.samples
    assert {"direction": "fwd", "dtype": "fp32"} == made.extra
    assert f"meshwright {__version__} profile ops" == made.writer
    assert records.describe_machine() == made.machine
    assert made.measured_utc.endswith("+00:00")


@pytest.mark.parametrize(
    "changes", [{"median": float("nan")}, {"p10": 2.5}, {"extra": {"flops": float("inf")}}]
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
    store.append(report().to_records())
    (step, *memory), problems = store.read()

    assert [] == problems
    assert ("step_time", 2.0, 3, "s") == (step.kind, step.median, step.num_repeats, step.unit)
    assert 2 == step.extra["mesh_tp"]
    assert "tokens_per_s" not in step.extra
    assert ("cpu", (3.0, 1.0, 2.0)) == (step.device, step.samples)
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
    assert [] == [name for name, clock_hz in machine.clocks_hz.items() if clock_hz < 1e8]
    assert software.python.startswith("3.")
    assert "numpy" in software.packages
