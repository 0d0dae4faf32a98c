"""The record store: what is appended is read back, whatever order, files and writers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwright.errors import BadRequest
from meshwright.records import KINDS, Kind, Machine, Query, Record, RecordStore, Software
from meshwright.records.files import clean_temporaries
from tests.records.examples import MACHINE, record


def names(store: RecordStore) -> list[str]:
    """Names of the Records of a store without problems."""
    found, problems = store.read()
    assert [] == problems
    return [item.name for item in found]


def parquet_files(store: RecordStore) -> list[Path]:
    return sorted(store.path.glob("*.parquet"))


def test_records_come_back_in_order(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "a" / "store")
    assert ([], []) == store.read()

    store.append([record(name="a\nb"), record(name="é")])
    store.append(iter([record(name="c")]))
    store.append([])

    assert ([record(name="a\nb"), record(name="é"), record(name="c")], []) == store.read()
    assert 2 == len(parquet_files(store))


def test_equal_records_are_two_measurements(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.append([record(), record()])
    store.append([record()])

    assert 3 == len(store.read()[0])


def test_an_append_that_fails_adds_nothing(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "store")
    with pytest.raises(BadRequest, match=r"record linear: cannot be stored: extra\['m'\] is bey"):
        store.append([record(), record(extra=record().extra | {"m": 2**63})])
    with pytest.raises(BadRequest, match=r"extra\['m'\] is a list"):
        store.append([record(extra=record().extra | {"m": [1]})])
    with pytest.raises(BadRequest, match="exceed 1048576 bytes"):
        store.append([record(extra=record().extra | {"role": "x" * 2**20})])
    with pytest.raises(BadRequest, match="surrogates not allowed"):
        store.append([record(name="\ud800")])
    with pytest.raises(BadRequest, match="cannot be stored"):
        store.append([record(device=3)])

    assert ([], []) == store.read()


def test_a_store_that_is_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(BadRequest, match="file: cannot add records: "):
        RecordStore(tmp_path / "file").append([record()])
    with pytest.raises(BadRequest, match="file: cannot read records: Not a directory"):
        RecordStore(tmp_path / "file").read()


def test_queries(tmp_path: Path) -> None:
    """By every condition, alone and together; the second time by the index."""
    store = RecordStore(tmp_path)
    other = Machine(
        processor="q", num_cores=1, memory_bytes=1, accelerators=("NVIDIA H100",), system="Linux"
    )
    store.append([record(name="a"), record(name="b", device="h100", machine=other)])
    memory = record(kind="memory", unit="bytes", extra={"cause": "gradient", "precision": "bf16"})
    store.append([memory])
    queries = [
        (["a"], {"name": "a"}),
        (["b"], {"device": "h100"}),
        (["b"], {"machine": "nvidia h1"}),
        (["a", "b"], {"dtype": "fp32"}),
        (["linear"], {"dtype": "bf16"}),
        (["a", "b"], {"kind": Kind.OPERATOR}),
        ([], {"kind": Kind.OPERATOR, "name": "linear"}),
        (["b"], {"kind": Kind.OPERATOR, "machine": "H100", "device": "h100"}),
        (["a", "b", "linear"], {}),
    ]
    for _ in range(2):
        found = [[item.name for item in store.query(**query)[0]] for _, query in queries]

        assert [expected for expected, _ in queries] == found
        assert (tmp_path / "index.json").is_file()


@pytest.mark.parametrize("damage", [b"", b"{}", b"0" * 64 + b"\n{}", "flip"])
def test_a_damaged_index_changes_no_answer(tmp_path: Path, damage: bytes | str) -> None:
    store = RecordStore(tmp_path)
    store.append([record(name="a")])
    store.append([record(name="b")])
    store.query(name="a")
    index = tmp_path / "index.json"
    whole = index.read_bytes()
    changed = whole.replace(b'"a"', b'"z"') if isinstance(damage, str) else damage
    assert whole != changed
    index.write_bytes(changed)

    assert "damaged" == store.verify().index
    assert ["a"] == [item.name for item in store.query(name="a")[0]]
    assert "whole" == store.verify().index


def test_the_index_spares_reading(tmp_path: Path) -> None:
    """A file that holds nothing wanted is not opened: its damage goes unseen until it is."""
    store = RecordStore(tmp_path)
    store.append([record(name="a")])
    store.append([record(name="b")])
    assert 1 == len(store.query(name="a")[0])
    parquet_files(store)[1].write_bytes(b"gone")

    assert ([record(name="a")], []) == store.query(name="a")
    assert 1 == len(store.query(name="b")[1])


def test_a_writer_of_single_records_joins_its_files(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, compact_after=4)
    for number in range(10):
        store.append([record(name=str(number))])

    assert 4 == len(parquet_files(store))  # two of four Records, two of one
    assert [str(number) for number in range(10)] == names(store)


def test_what_others_removed_is_not_brought_back_by_joining(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, compact_after=3)
    old = record(name="old", measured_utc="2020-01-01")
    store.append([old])
    store.append([record(name="a")])
    RecordStore(tmp_path).prune(before_utc="2021-01-01")
    store.append([record(name="b")])

    assert ["a", "b"] == names(store)
    assert 1 == len(parquet_files(store))


def test_compacting_keeps_records_and_order(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for number in range(5):
        store.append([record(name=str(number)), record(name=f"{number}'")])
    before = store.read()
    done = store.compact()

    assert (5, 1, 0, 0) == (
        done.num_files_before,
        done.num_files_after,
        done.num_repeated_rows,
        done.num_temporary_files,
    )
    assert before == store.read()
    assert 1 == store.compact().num_files_after


def test_a_crash_between_the_steps_of_compacting_gives_no_record_twice(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for number in range(5):
        store.append([record(name=str(number))])
    old = {path: path.read_bytes() for path in parquet_files(store)}
    store.compact()
    for path, data in old.items():
        path.write_bytes(data)

    assert ["0", "1", "2", "3", "4"] == sorted(names(store))
    assert 5 == sum(store.count()[0].values())
    checked = store.verify()
    assert (5, 5) == (checked.num_records, checked.num_repeated_rows)
    assert 5 == store.compact().num_repeated_rows
    assert 0 == store.verify().num_repeated_rows
    assert 5 == len(names(store))


def test_merging_adds_what_is_new(tmp_path: Path) -> None:
    here, there = RecordStore(tmp_path / "here"), RecordStore(tmp_path / "there")
    there.append([record(name="a"), record(name="b")])
    first = here.merge(there)
    there.append([record(name="c")])
    here.append([record(name="d")])
    second = here.merge(there)

    assert (2, 0) == (first.num_added, first.num_known)
    assert (1, 2) == (second.num_added, second.num_known)
    assert ["a", "b", "c", "d"] == sorted(names(here))
    assert ["a", "b", "c"] == names(there)
    with pytest.raises(BadRequest, match="cannot be merged into itself"):
        here.merge(RecordStore(tmp_path / "there" / ".." / "here"))
    with pytest.raises(BadRequest, match="no such record store"):
        here.merge(RecordStore(tmp_path / "nowhere"))


def test_pruning_to_the_newest(tmp_path: Path) -> None:
    """Of three of one size two stay, by time of measuring; the one of another size stays."""
    store = RecordStore(tmp_path)
    large = record().extra | {"m": 8}
    for day, extra in ((3, None), (1, None), (2, None), (1, large)):
        when = f"2026-01-0{day}T00:00:00+00:00"
        changes = {} if extra is None else {"extra": extra}
        store.append([record(name="x", measured_utc=when, **changes)])
    done = store.prune(keep_newest=2)

    assert (1, 3) == (done.num_removed, done.num_kept)
    assert ["2026-01-03", "2026-01-02", "2026-01-01"] == [
        item.measured_utc[:10] for item in store.read()[0]
    ]
    assert large == store.read()[0][2].extra


def test_pruning_by_time_and_of_duplicates(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.append([record(name="a", measured_utc=""), record(name="b", measured_utc="2026-01-01")])
    store.append([record(name="c", measured_utc="2026-01-01T01:00:00+02:00"), record(name="a")])
    store.append([record(name="a", measured_utc="")])

    assert 1 == store.prune(before_utc="2026-01-01").num_removed  # c: 23 h of the day before
    assert ["a", "b", "a", "a"] == names(store)
    assert 1 == store.prune(duplicates=True).num_removed
    assert ["a", "b", "a"] == names(store)
    assert 0 == store.prune().num_removed
    with pytest.raises(BadRequest, match="'soon' is no time"):
        store.prune(before_utc="soon")
    with pytest.raises(BadRequest, match="keep at least 1"):
        store.prune(keep_newest=0)


def test_what_interrupted_writers_left_is_ignored_and_cleaned(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.append([record()])
    old = tmp_path / ".writing-1-0123456789abcdef"
    young = tmp_path / ".writing-2-0123456789abcdef"
    for path in (old, young):
        path.write_bytes(b"PAR1 half")
    os.utime(old, (0, 0))

    assert ["linear"] == names(store)
    assert 2 == store.verify().num_temporary_files
    assert 1 == store.prune().num_temporary_files
    assert not old.exists()
    assert young.exists()


def test_a_temporary_file_of_a_living_writer_stays(tmp_path: Path) -> None:
    import fcntl

    path = tmp_path / ".writing-1-0123456789abcdef"
    path.write_bytes(b"PAR1 half")
    os.utime(path, (0, 0))
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        assert 0 == clean_temporaries(tmp_path)
    assert 1 == clean_temporaries(tmp_path)


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)
SCALAR = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | FLOAT | TEXT
MACHINES = st.builds(
    Machine,
    processor=TEXT,
    num_cores=st.integers(1, 2**31),
    memory_bytes=st.integers(0, 2**63 - 1),
    accelerators=st.lists(TEXT, max_size=2).map(tuple),
    system=TEXT,
    driver=TEXT,
    clocks_hz=st.dictionaries(TEXT, FLOAT, max_size=2),
)


@st.composite
def any_record(draw: st.DrawFn) -> Record:
    kind = draw(st.sampled_from(list(Kind)))
    keys = KINDS[kind]
    extra = {key: draw(SCALAR.filter(lambda value: value is not None)) for key in keys.required}
    if keys.optional:
        extra |= draw(st.dictionaries(st.sampled_from(keys.optional), SCALAR, max_size=4))
    extra |= {key: draw(st.sampled_from(keys.values[key])) for key in extra if key in keys.values}
    if kind == Kind.COLLECTIVE:
        extra["group_size"] = draw(st.integers(2, 2**40))
    p10, median, p90 = sorted(draw(st.tuples(FLOAT, FLOAT, FLOAT)))
    samples = draw(st.lists(FLOAT, max_size=4))
    return Record(
        kind=str(kind),
        name=draw(st.sampled_from(keys.names) if keys.names else TEXT),
        device=draw(TEXT),
        writer=draw(TEXT),
        source=draw(TEXT),
        machine=draw(st.just(MACHINE) | MACHINES),
        software=Software(python=draw(TEXT), packages=draw(st.dictionaries(TEXT, TEXT))),
        method=draw(TEXT),
        num_repeats=max(1, len(samples)),
        median=median,
        p10=p10,
        p90=p90,
        unit=draw(st.sampled_from(keys.units)),
        samples=tuple(samples),
        measured_utc=draw(TEXT),
        extra=extra,
    )


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batches=st.lists(st.lists(any_record(), max_size=3), max_size=3))
def test_every_record_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Record]]
) -> None:
    """The types of scalars too: True is not 1, 1 is not 1.0, -0.0 is not 0.0."""
    store = RecordStore(tmp_path_factory.mktemp("store"))
    for batch in batches:
        store.append(batch)
    given_records = [item for batch in batches for item in batch]
    for _ in range(2):
        found, problems = store.read()

        assert [] == problems
        assert given_records == found
        assert list(map(exactly, given_records)) == list(map(exactly, found))
        if batches and any(batches):
            store.compact()


def exactly(item: Record) -> list[tuple[str, str]]:
    values = {**item.extra, "median": item.median, "p10": item.p10, "p90": item.p90}
    return sorted((key, f"{type(value).__name__} {value!r}") for key, value in values.items())


def test_a_query_that_wants_everything_is_open() -> None:
    assert Query().is_open
    assert not Query(name="a").is_open


def test_a_store_proves_that_it_can_be_written(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "new" / "store")
    store.check_writable()
    assert ["store.lock"] == os.listdir(store.path)
    assert ([], []) == store.read()

    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(BadRequest, match="file: cannot add records: File exists"):
        RecordStore(tmp_path / "file").check_writable()
