"""``meshwright records``: each verb, for a person and as JSON."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest

from meshwright.records import Record, RecordStore
from meshwright.records.export import TABLE_COLUMNS
from tests.cli.conftest import Run
from tests.records.examples import record


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    """Two files in the folder ``kept``."""
    store = RecordStore(tmp_path / "kept")
    store.append([record(), record(name="=bmm", measured_utc="2026-02-01")])
    memory = record(kind="memory", unit="bytes", name="gpt", extra={"cause": "gradient"})
    store.append([memory])
    return store


VERBS = ("list", "show", "verify", "merge", "prune", "export", "compact")


def test_help_of_every_verb_shows_an_example_and_json(meshwright: Run) -> None:
    bare = meshwright("records")

    assert (1, "") == (bare.status, bare.out)
    assert bare.err == meshwright("records", "--help").out
    assert [] == [verb for verb in VERBS if f"\n  {verb} " not in bare.err]
    for verb in VERBS:
        answer = meshwright("records", verb, "--help")

        assert 0 == answer.status
        assert f"Example: meshwright records {verb}" in answer.out
        assert "--json" in answer.out


@pytest.mark.usefixtures("store")
def test_list(meshwright: Run) -> None:
    answer = meshwright("records", "list", "kept")
    document = meshwright("records", "list", "kept", "--dtype", "fp32", "--json").document

    assert 0 == answer.status
    assert "3 records of 1 machines" in answer.out
    assert ["memory", "gpt", "cpu", "1"] == answer.out.splitlines()[1].split()
    assert (2, []) == (document["num_records"], document["problems"])
    assert ["=bmm", "linear"] == [group["name"] for group in document["groups"]]
    assert {"operator"} == {group["kind"] for group in document["groups"]}


def test_show(meshwright: Run, store: RecordStore) -> None:
    answer = meshwright("records", "show", "kept", "--limit", "2")
    alone = meshwright("records", "show", "kept", "--name", "gpt")
    document = meshwright("records", "show", "kept", "--kind", "operator", "--json").document

    assert "2 s [1 s, 3 s]" in answer.out
    assert "2 of 3 records" in answer.out
    assert "processor" in alone.out
    assert "extra: {'cause': 'gradient'}" in alone.out
    assert store.read()[0][:2] == msgspec.convert(document["records"], list[Record])


def test_verify_names_damage_and_prune_replaces_it(meshwright: Run, store: RecordStore) -> None:
    assert 0 == meshwright("records", "verify", "kept").status
    min(store.path.glob("*.parquet")).write_bytes(b"PAR1 gone PAR1")
    answer = meshwright("records", "verify", "kept", "--json")
    pruned = meshwright("records", "prune", "kept", "--damaged", "--json").document

    assert 1 == answer.status
    assert 1 == answer.document["num_records"] == len(answer.document["problems"])
    assert [
        "meshwright: kept: 1 of 2 files have problems; `meshwright records prune kept --damaged` "
        "keeps what is whole of them"
    ] == answer.lines_of_error
    assert (0, 1) == (pruned["num_removed"], pruned["num_kept"])
    assert 0 == meshwright("records", "verify", "kept").status


@pytest.mark.usefixtures("store")
def test_merge_compact_prune(meshwright: Run, tmp_path: Path) -> None:
    RecordStore(tmp_path / "other").append([record(name="x", measured_utc="2020-01-01")])
    merged = meshwright("records", "merge", "all", "kept", "other", "--json").document["merged"]
    compacted = meshwright("records", "compact", "all", "--json").document
    pruned = meshwright("records", "prune", "all", "--older-than", "2021-01-01", "--json").document

    assert [3, 1] == [merged[name]["num_added"] for name in ("kept", "other")]
    assert (3, 1) == (compacted["num_files_before"], compacted["num_files_after"])
    assert (1, 3) == (pruned["num_removed"], pruned["num_kept"])
    assert 0 == meshwright("records", "prune", "all", "--older-than", "99999d").status
    assert "3 records removed" in meshwright("records", "prune", "all", "--older-than", "0d").out


def test_export_of_whole_records(meshwright: Run, store: RecordStore, tmp_path: Path) -> None:
    lines = meshwright("records", "export", "kept").out.splitlines()
    answer = meshwright("records", "export", "kept", "-o", "all.json", "--json")
    expected = store.read()[0]

    assert expected == [msgspec.json.decode(line, type=Record) for line in lines]
    assert expected == msgspec.json.decode((tmp_path / "all.json").read_bytes(), type=list[Record])
    assert 3 == answer.document["num_records"]


@pytest.mark.usefixtures("store")
def test_export_of_tables(meshwright: Run, tmp_path: Path) -> None:
    for name in ("all.csv", "all.parquet"):
        assert 0 == meshwright("records", "export", "kept", "-o", name).status
    rows = list(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text())))
    table = pq.read_table(tmp_path / "all.parquet")
    keys = ["causal", "cause", "direction", "dtype", "flops", "m"]

    assert [*TABLE_COLUMNS, *(f"extra.{key}" for key in keys)] == list(rows[0])
    assert list(rows[0]) == table.column_names
    assert ("linear", "4", "2.0", "") == tuple(
        rows[0][name] for name in ("name", "extra.m", "median", "extra.cause")
    )
    assert [4, 4, None] == table.column("extra.m").to_pylist()
    assert [True, True, None] == table.column("extra.causal").to_pylist()
    assert {"torch": "2.13.0"} == json.loads(rows[2]["software.packages"])


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("list", "nowhere"), "nowhere: no such record store; check the path"),
        (("merge", "all", "nowhere"), "nowhere: no such record store"),
        (("merge", "kept", "kept"), "kept: a store cannot be merged into itself"),
        (("export", "kept", "-o", "a.xls"), "no format is called 'xls'; give --format"),
        (("export", "kept", "--json"), "give a file with -o"),
        (("export", "kept", "-o", "no/a.csv"), "no/a.csv: cannot write the file"),
        (("prune", "kept", "--older-than", "soon"), "'soon' is no time"),
        (("prune", "kept", "--keep", "0"), "Invalid value for '--keep'"),
    ],
)
def test_mistakes_are_one_line(meshwright: Run, words: tuple[str, ...], expected: str) -> None:
    answer = meshwright("records", *words)

    assert 1 == answer.status
    assert "" == answer.out
    assert 1 == len(answer.err.splitlines()) == len(answer.lines_of_error)
    assert expected in answer.err
