"""``meshwright traces import`` and ``show``: what is kept, what is refused, what is printed."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.cli.main import main
from meshwright.records import RecordStore
from tests.profiling.traces.made_traces import TraceMaker


def _maker() -> TraceMaker:
    """Two steps of 100 us with a matmul of 40 us in each."""
    maker = TraceMaker(distributedInfo={"backend": "nccl", "rank": 0, "world_size": 1})
    for step in range(2):
        at = 1.7e15 + 100 * step
        dims = {"Input Dims": [[8, 32], [32, 64]], "Input type": ["float", "float"]}
        maker.note(f"ProfilerStep#{step}", at, 100).op("aten::mm", at, 20, **dims)
        maker.launch(step, at + 10).kernel("gemm", at + 30, 40, correlation=step)
    return maker


def test_import_keeps_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, store = _maker().write(tmp_path / "trace.json.gz"), tmp_path / "store"

    status = main(["traces", "import", str(path), "--store", str(store), "--model", "m1", "--json"])

    document = json.loads(capsys.readouterr().out)
    records, problems = RecordStore(store).read()
    assert (0, []) == (status, problems)
    assert (3, 3) == (document["num_records"], len(records))
    assert {"step_time": "m1", "operator": "linear"} == {one.kind: one.name for one in records}
    (linear,) = (one for one in records if one.kind == "operator")
    assert (40e-6, 2) == (pytest.approx(linear.median), linear.num_repeats)
    assert linear.source.startswith("trace.json.gz sha256:")
    (one,) = document["imports"]
    assert "kineto" == one["format"]
    assert [0.4, 0.6] == pytest.approx(
        [
            one["ranks"][0]["devices"][0]["iterations"][1][key] / 100e-6
            for key in ("compute_s", "idle_s")
        ]
    )


def test_show_keeps_nothing_and_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _maker().write(tmp_path / "trace.json")

    status = main(["traces", "show", str(path)])

    said = capsys.readouterr().out
    assert 0 == status
    assert "2 iterations (ProfilerStep marks), median 100 us" in said
    assert "compute 40.0%, communication 0.0%, overlap 0.0%, idle 60.0%" in said
    assert "not in the trace: the model" in said
    assert ["trace.json"] == [one.name for one in tmp_path.iterdir()]


def _cut_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(_maker().text())[:-40])


def _cut_json(path: Path) -> None:
    path.write_bytes(_maker().text()[:-300])


def _wrong_json(path: Path) -> None:
    path.write_bytes(_maker().text().replace(b'"kernel"', b'"kernel', 1))


def _no_trace(path: Path) -> None:
    path.write_text("hello\n")


def _blanks(path: Path) -> None:
    path.write_bytes(gzip.compress(b" " * 10**8, 9))


def _one_endless_event(path: Path) -> None:
    head = b'{"schemaVersion": 1, "traceEvents": [{"name": "'
    path.write_bytes(gzip.compress(head + b"x" * (60 * 2**20), 9))


def _second_member_is_damaged(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (("good.json", _maker().text()), ("bad.json", _maker().text()[:-50])):
            info = tarfile.TarInfo(f"../\x1b[2J{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    "make",
    [
        _cut_gzip, _cut_json, _wrong_json, _no_trace, _blanks, _one_endless_event,
        _second_member_is_damaged,
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_and_nothing_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None]
) -> None:
    """A good file before it does not help."""
    good, bad, store = tmp_path / "good.json", tmp_path / "bad\n.gz", tmp_path / "store"
    _maker().write(good)
    make(bad)

    status = main(["traces", "import", str(good), str(bad), "--store", str(store)])

    said = capsys.readouterr()
    assert (1, "") == (status, said.out)
    assert said.err.startswith("meshwright: ")
    assert 1 == said.err.count("\n")
    assert "\x1b" not in said.err
    assert "internal error" not in said.err
    assert ([], []) == RecordStore(store).read()


def test_names_in_a_trace_cannot_harm_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names with control characters, a megabyte of name, half a surrogate pair in a shape."""
    maker = TraceMaker().note("ProfilerStep#1", 0, 100)
    for number, name in enumerate(("\x1b[2J\nred", "n" * 10**6, "\u202egnp", "ncclX\x07")):
        maker.op(name, 10 * number, 9, **{"Input Dims": [[2, 2]], "Input type": ["float"]})
        maker.launch(number, 10 * number + 1).kernel(name, 50 + number, 1, correlation=number)
    path, store = maker.write(tmp_path / "trace.json"), tmp_path / "store"

    statuses = [
        main(["traces", "import", str(path), "--store", str(store)]),
        main(["traces", "show", str(path), "--json"]),
    ]

    said = capsys.readouterr().out
    records, problems = RecordStore(store).read()
    assert ([0, 0], []) == (statuses, problems)
    assert not {"\x1b", "\x07"} & set(said)
    assert all(len(one.name) <= 200 for one in records)
    assert len(said) < 100_000


def test_a_limit_of_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _maker().write(tmp_path / "trace.json.gz")

    status = main(["traces", "show", str(path), "--max-bytes", "1000"])

    assert 1 == status
    assert "holds more than 1000 B; raise --max-bytes" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", '{"traceEvents": []}'])
def test_a_trace_without_any_event_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)

    assert 1 == main(["traces", "show", str(path)])
    assert "trace.json: holds no event" in capsys.readouterr().err


def test_importing_without_a_store_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 1 == main(["traces", "import", str(_maker().write(tmp_path / "trace.json"))])
    assert "give --store DIR" in capsys.readouterr().err


def test_a_file_that_is_imported_again_adds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its content, under another name too; another file is added."""
    store, text = tmp_path / "store", _maker().text()
    first, again, other = (tmp_path / f"{name}.json" for name in ("first", "again", "other"))
    for path in (first, again, other):
        path.write_bytes(text)
    _maker().note("ProfilerStep#2", 1.7e15 + 200, 100).write(other)

    statuses = [
        main(["traces", "import", *map(str, paths), "--store", str(store)])
        for paths in ([first], [again], [again, other])
    ]

    said = capsys.readouterr().out
    records, _ = RecordStore(store).read()
    assert [0, 0, 0] == statuses
    assert ["first.json"] * 3 + ["other.json"] * 4 == [one.source.split()[0] for one in records]
    assert 2 == said.count("3 records left out")
    assert "0 records added" in said


def test_texts_beside_traces_in_an_archive_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "traces.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (("README.txt", b"Two steps.\n"), ("rank0.json", _maker().text())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

    assert 0 == main(["traces", "show", str(path)])

    said = capsys.readouterr().out
    assert "left out of the archive: traces.tar:README.txt (no trace)" in said
    assert "2 iterations (ProfilerStep marks)" in said


def test_negative_lengths_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maker = _maker().op("never ended", 1.7e15 + 60, -1)

    assert 0 == main(["traces", "show", str(maker.write(tmp_path / "trace.json"))])
    assert "the length of 1 events, which is negative and counts as 0" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("verb", ["show", "diagnose"])
def test_a_pipe_is_refused_and_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    os.mkfifo(tmp_path / "pipe")

    assert 1 == main(["traces", verb, str(tmp_path / "pipe")])
    assert "pipe: not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        '[{"ph": "X", "cat": "kernel", "name": "a", "ts": 5, "dur": 0}]',
        '[{"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#1", "ts": 5, "dur": 0}]',
    ],
)
def test_traces_with_next_to_nothing_are_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)

    statuses = [main(["traces", "show", str(path)]), main(["traces", "show", str(path), "--json"])]

    assert [0, 0] == statuses
    assert "not in the trace" in capsys.readouterr().out
