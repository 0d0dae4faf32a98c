"""Killed writers, writers at once and full disks: nothing stored is lost, nothing comes by half."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright.errors import BadRequest
from meshwright.records import Record, RecordStore
from tests.house.tree import ROOT
from tests.records.examples import record
from tests.records.writers import batch


def run_writers(*arguments: object) -> dict[str, Any]:
    words = [sys.executable, "-m", "tests.records.writers", *map(str, arguments)]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert 0 == ran.returncode, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def check_all_there(store: RecordStore, stored: list[list[int]], *, may_have_more: int) -> None:
    """Every append of which a writer was told, and of each writer at most so many others."""
    found, problems = store.read()
    assert [] == problems
    by_append: dict[tuple[int, int], list[Record]] = {}
    for item in found:
        key = int(item.name.split()[1]), int(str(item.extra["m"]))
        by_append.setdefault(key, []).append(item)
    expected = {(writer, number) for writer, told in enumerate(stored) for number in told}
    others = set(by_append) - expected

    assert set() == expected - set(by_append)
    assert [] == [key for key, items in by_append.items() if items != batch(*key)]
    assert set(range(len(stored))) >= {writer for writer, _ in others}
    assert all(number == len(stored[writer]) for writer, number in others)
    assert len(others) <= may_have_more * len(stored)


@pytest.mark.dist
@pytest.mark.parametrize("num_rounds", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_writers_killed_while_they_write(tmp_path: Path, num_rounds: int) -> None:
    """They append, join their files and (one in three) compact; SIGKILL comes at any moment."""
    stored = run_writers("killed", tmp_path, num_rounds, 1)["stored"]
    store = RecordStore(tmp_path)

    assert num_rounds == len(stored)
    assert sum(map(len, stored)) >= num_rounds
    check_all_there(store, stored, may_have_more=1)
    store.compact()
    check_all_there(store, stored, may_have_more=1)
    assert 0 == store.verify().num_repeated_rows


@pytest.mark.dist
@pytest.mark.parametrize("num_writers", [2, 4])
def test_writers_at_once(tmp_path: Path, num_writers: int) -> None:
    """While they append, join and compact, a reader sees every Record once and never loses one."""
    answer = run_writers("together", tmp_path, num_writers, 20)

    assert [] == answer["wrong"]
    assert answer["num_reads"] >= 2
    assert [list(range(20))] * num_writers == answer["stored"]
    check_all_there(RecordStore(tmp_path), answer["stored"], may_have_more=0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("this user may not mount a tmpfs; the test with RLIMIT_FSIZE stands in")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def numbered(number: int, num_records: int = 1) -> list[Record]:
    return [
        record(extra=record().extra | {"m": number, "n": part}, num_repeats=99, samples=(2.0,) * 99)
        for part in range(num_records)
    ]


def fill(store: RecordStore, batch_size: int) -> list[Record]:
    """Append until the disk is full; what was stored."""
    stored: list[Record] = []
    said = ""
    while not said and len(stored) < 10_000:
        more = numbered(len(stored), batch_size)
        try:
            store.append(more)
        except BadRequest as error:
            said = str(error)
        else:
            stored += more
    assert f"{store.path}: cannot add records: No space left on device" == said
    return stored


@pytest.mark.parametrize("batch_size", [1, 100])
def test_a_full_disk(small_disk: Path, batch_size: int) -> None:
    store = RecordStore(small_disk / "store", compact_after=16)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(50_000))
    stored = fill(store, batch_size)

    assert len(stored) >= batch_size
    assert (stored, []) == store.read()
    assert 0 == store.verify().num_temporary_files
    assert (stored, []) == store.query(name="linear")
    filler.unlink()
    store.append(numbered(-1))
    assert (stored + numbered(-1), []) == store.read()


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """RLIMIT_FSIZE cuts a write short, as a disk that fills up meanwhile does."""
    store = RecordStore(tmp_path)
    store.append(numbered(0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(BadRequest, match="cannot add records: File too large"):
            store.append(numbered(1, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert (numbered(0), []) == store.read()
    assert ["records", "store"] == sorted(
        path.name.partition("-")[0].partition(".")[0] for path in tmp_path.iterdir()
    )


@pytest.mark.parametrize("step", ["fsync of the file", "rename", "fsync of the folder"])
def test_whatever_step_fails_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store = RecordStore(tmp_path)
    store.append(numbered(0))
    before = sorted(tmp_path.iterdir())
    calls: list[int] = []

    def failing(wanted: Callable[[int], bool]) -> Callable[..., None]:
        def fail(*_: object) -> None:
            calls.append(1)
            if wanted(len(calls)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return fail

    if step == "rename":
        monkeypatch.setattr(Path, "rename", failing(lambda _: True))
    else:
        which = 1 if "file" in step else 2
        monkeypatch.setattr(os, "fsync", failing(lambda number: number == which))
    with pytest.raises(BadRequest, match="No space left on device"):
        store.append(numbered(1))
    monkeypatch.undo()

    assert calls
    assert before == sorted(tmp_path.iterdir())
    assert (numbered(0), []) == store.read()


def test_compacting_a_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RecordStore(tmp_path)
    for number in range(5):
        store.append(numbered(number) * 2)
    before = store.read()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(BadRequest, match="cannot compact records: No space left on device"):
        store.compact()
    with pytest.raises(BadRequest, match="cannot prune records: No space left on device"):
        store.prune(duplicates=True)
    monkeypatch.undo()

    assert before == store.read()
    assert 5 == store.verify().num_files
