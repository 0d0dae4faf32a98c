"""Damage and hostile files: no wrong Record is returned, the rest of the store stays usable."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meshwright.records import Record, RecordStore, layout
from meshwright.records.files import store_name
from tests.records.examples import record


def example(number: int) -> Record:
    return record(name=f"op{number % 3}", extra=record().extra | {"m": number, "flops": number / 7})


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordStore:
    """Three files of 24, 1 and 24 Records, in groups of 8."""
    monkeypatch.setattr(layout, "ROWS_PER_GROUP", 8)
    store = RecordStore(tmp_path / "store")
    for low, high in ((0, 24), (24, 25), (25, 49)):
        store.append(map(example, range(low, high)))
    return store


COMMITTED = [example(number) for number in range(49)]


def first_file(store: RecordStore) -> Path:
    return min(store.path.glob("*.parquet"))


def numbers(store: RecordStore) -> tuple[list[Any], list[str]]:
    """``m`` of the Records found, each of which is exactly what was committed; the problems."""
    found, problems = store.read()
    assert [] == [item for item in found if item != example(int(str(item.extra["m"])))]
    assert [] == [problem for problem in problems if "\n" in problem]
    return [item.extra["m"] for item in found], problems


def test_flipped_bytes(store: RecordStore) -> None:
    """At 90 places spread over the file: one flip costs one group at most, no other file a row."""
    path = first_file(store)
    whole = path.read_bytes()
    for number in range(90):
        at = number * len(whole) // 90
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << number % 8]) + whole[at + 1 :])
        found, problems = numbers(store)

        assert 1 == len(problems), at
        assert "damaged: the checksum of the file does not match" in problems[0]
        assert set(range(24, 49)) <= set(found)
        assert len(found) == len(set(found)) >= 49 - layout.ROWS_PER_GROUP


def test_a_flip_in_a_number_costs_one_row(store: RecordStore) -> None:
    path = first_file(store)
    whole = path.read_bytes()
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(11)
    assert "median" == chunk.path_in_schema
    at = chunk.data_page_offset + chunk.total_compressed_size - 3  # in the last of 8 doubles
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    found, problems = numbers(store)

    assert [number for number in range(49) if number != 15] == found
    assert "; 1 of its 24 rows are lost" in problems[0]


def test_truncation(store: RecordStore) -> None:
    """Where it leaves the first of the two footers whole, no row is lost."""
    path = first_file(store)
    whole = path.read_bytes()
    footer = whole[-int.from_bytes(whole[-8:-4], "little") - 8 :]
    assert whole.endswith(footer * 2)
    for number in range(40):
        size = number * len(whole) // 40
        path.write_bytes(whole[:size])
        found, problems = numbers(store)

        assert 1 == len(problems)
        assert list(range(24 if size < len(whole) - len(footer) else 0, 49)) == found


def test_damage_is_counted_verified_and_replaced(store: RecordStore) -> None:
    path = first_file(store)
    whole = path.read_bytes()
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(17)
    assert "extra" == chunk.path_in_schema
    at = chunk.data_page_offset - 20
    path.write_bytes(whole[:at] + b"\xff" * 10 + whole[at + 10 :])
    found, problems = numbers(store)

    assert 1 == len(problems)
    assert 41 <= len(found) < 49
    assert (len(found), tuple(problems)) == (
        store.verify().num_records,
        store.verify().problems,
    )
    assert len(found) == sum(store.count()[0].values())
    wanted = [item.extra["m"] for item in store.query(name="op1")[0]]
    assert [number for number in found if number % 3 == 1] == wanted
    assert tuple(problems) == store.compact().problems
    assert 0 == store.prune(keep_newest=1).num_removed
    assert (found, problems) == numbers(store)
    pruned = store.prune(damaged=True)
    aside = [store.path / name for name in pruned.set_aside]

    assert len(found) == pruned.num_kept
    assert aside
    assert all(path.read_bytes() for path in aside)
    assert (found, []) == numbers(store)


def test_merging_takes_only_what_is_whole(store: RecordStore, tmp_path: Path) -> None:
    first_file(store).write_bytes(b"PAR1")
    into = RecordStore(tmp_path / "into")
    merged = into.merge(store)

    assert (25, 1) == (merged.num_added, len(merged.problems))
    assert (list(range(24, 49)), []) == numbers(into)


def add(store: RecordStore, data: bytes) -> Path:
    """A file whose name proves its content, whatever that is."""
    path = store.path / store_name(data, written_ns=time.time_ns())
    path.write_bytes(data)
    return path


def parquet(table: Any, metadata: dict[bytes, bytes] | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = {"store_schema": False, "compression": "zstd"}
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        writer.write_table(table, row_group_size=10**8)
        writer.add_key_value_metadata(metadata or {VERSION: b"2"})
    return bytes(sink.getvalue())


VERSION = layout.VERSION_KEY


def forged(**columns: Any) -> bytes:
    """A file of one row in which some columns were replaced, its checksum not."""
    table = layout.table_of([example(0)])
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        array = pa.array(values, table.schema.field(name).type)
        table = table.set_column(at, pa.field(name, array.type), array)
    return parquet(table)


def forged_rows(num_rows: int, **texts: str) -> bytes:
    """A file of equal rows in which some texts were replaced; Parquet stores them once."""
    table = layout.table_of([example(0)]).take([0] * num_rows)
    for name, text in texts.items():
        at = table.schema.get_field_index(name)
        indices = pa.array([0] * num_rows, pa.int32())
        array = pa.DictionaryArray.from_arrays(indices, pa.array([text]))
        table = table.set_column(at, pa.field(name, array.type), array)
    return parquet(table)


def pickled() -> bytes:
    class Harm:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, ("harm",)

    return pickle.dumps(Harm())


HOSTILE = {
    "empty": (b"", "not a Parquet file"),
    "text": (b"hello", "not a Parquet file"),
    "pickle": (pickled(), "not a Parquet file"),
    "zeros": (b"PAR1" + bytes(1000) + b"\x10\0\0\0PAR1", "not a Parquet file"),
    "footer longer than the file": (b"PAR1" + b"\xff\xff\xff\x7fPAR1", "not a Parquet file"),
    "another table": (parquet(pa.table({"a": [1]}), {b"a": b"b"}), "but not of a record store"),
    "other columns": (parquet(pa.table({"a": [1]})), "its column 'a' is not one of a record"),
    "newer": (
        parquet(layout.table_of([example(0)]), {VERSION: b"3"}),
        "has schema version 3, this Meshwright reads 2; update Meshwright to read it",
    ),
    "older": (parquet(layout.table_of([example(0)]), {VERSION: b"1"}), "has schema version 1"),
    "version of 5,000 digits": (
        parquet(layout.table_of([example(0)]), {VERSION: b"9" * 5000}),
        "but not of a record store",
    ),
    "changed median": (forged(median=[9.0]), "the checksum does not match"),
    "changed name": (forged(name=["op1"]), "the checksum does not match"),
    "no name": (forged(name=[None]), "1 of its 1 rows are lost"),
    "extra that is no object": (forged(extra=["[1]"]), "the checksum does not match"),
    "a million rows in one group": (
        parquet(pa.concat_tables([layout.table_of([example(0)])] * 70_000)),
        "claims 70000 rows in one group",
    ),
    "a name of 20 MB in 5,000 rows": (
        forged_rows(5000, name="x" * 2 * 10**7),
        "5000 of its 5000 rows are lost",
    ),
    "metadata of 40 MB": (
        parquet(layout.table_of([example(0)]), {VERSION: b"2", b"x": b"x" * 40_000_000}),
        "not a Parquet file or its footer is damaged",
    ),
}


@pytest.mark.parametrize(("data", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_one_line(
    store: RecordStore, monkeypatch: pytest.MonkeyPatch, data: bytes, expected: str
) -> None:
    monkeypatch.chdir(store.path.parent)
    path = add(store, data)
    found, problems = numbers(store)

    assert list(range(49)) == found
    assert 1 == len(problems)
    assert f"{path}: " in problems[0]
    assert expected in problems[0]
    assert not (store.path.parent / "harm").exists()


def test_a_valid_checksum_does_not_make_a_valid_record(store: RecordStore) -> None:
    """Rows that a forger has given their right checksum still must be Records."""
    fields = {name: getattr(record(), name) for name in Record.__struct_fields__}
    for changes in ({"kind": "nonsense"}, {"num_repeats": -1}):
        row: Any = SimpleNamespace(**fields | changes)
        add(store, layout.file_of([layout.table_of([row])]))
    found, problems = store.read()

    assert COMMITTED == found
    assert 2 == len(problems)
    assert "a row is damaged: kind is 'nonsense'" in problems[0]
    assert "a row is damaged: num_repeats is -1" in problems[1]


def test_what_is_no_file_is_one_line(store: RecordStore) -> None:
    (store.path / "loop.parquet").symlink_to(store.path / "loop.parquet")
    (store.path / "nowhere.parquet").symlink_to(store.path / "gone")
    (store.path / "folder.parquet").mkdir()
    os.mkfifo(store.path / "pipe.parquet")
    found, problems = numbers(store)

    assert list(range(49)) == found
    assert [
        ("folder.parquet", "Is a directory"),
        ("loop.parquet", "Too many levels of symbolic links"),
        ("nowhere.parquet", "leads nowhere"),
        ("pipe.parquet", "not a regular file"),
    ] == [
        (name, words)
        for name, words in (
            (problem.split(": ")[0].rsplit("/")[-1], problem.split(": ")[-1].split(";")[0])
            for problem in sorted(problems)
        )
    ]
    store.compact()
    assert 4 == len(store.prune(damaged=True).problems)
    assert (store.path / "loop.parquet").is_symlink()


def test_a_file_of_another_name_is_read_and_named(store: RecordStore) -> None:
    first_file(store).rename(store.path / "mine.parquet")
    found, problems = numbers(store)

    assert set(range(49)) == set(found)
    assert "mine.parquet: its name is not one a record store gives; 0 of its 24" in problems[0]


def test_newer_files_survive_pruning(store: RecordStore) -> None:
    path = add(store, HOSTILE["newer"][0])
    store.prune(damaged=True, duplicates=True)
    store.compact()

    assert path.exists()
