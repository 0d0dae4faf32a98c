"""Files of outsiders: compressed, packed, cut short, and made to do harm."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.errors import BadRequest
from meshwright.profiling.traces import sources
from meshwright.profiling.traces.sources import open_members, open_source, printable


def _read(path: Path, *, max_bytes: int = 10**9, piece: int = 777) -> dict[str, bytes]:
    found = {}
    for member in open_members(path, max_bytes=max_bytes):
        parts = []
        while data := member.read(piece):
            parts.append(data)
        found[member.name] = b"".join(parts)
    return found


def _tar(
    path: Path, files: dict[str, bytes], *, mode: str = "w:gz", format_: int | None = None
) -> Path:
    with tarfile.open(path, mode, format=format_ or tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


DATA = os.urandom(5000) + b"x" * 5000


def test_plain_gzip_and_several_gzip_members_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(DATA)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(DATA))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(DATA[:99]) + gzip.compress(DATA[99:]))

    assert {"a.json": DATA} == _read(tmp_path / "a.json")
    assert {"b.json.gz": DATA} == _read(tmp_path / "b.json.gz")
    assert {"c.json.gz": DATA} == _read(tmp_path / "c.json.gz")


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archives_give_their_files_by_the_last_part_of_the_name(
    tmp_path: Path, mode: str, format_: int
) -> None:
    long_name = "d" * 90 + "/" + "n" * 80
    files = {"../../etc/rank0.json": DATA, long_name: b"1", "._rank0.json": b"2", "empty": b""}
    path = _tar(tmp_path / "set.tar", files, mode=mode, format_=format_)

    found = _read(path)

    assert {"set.tar:rank0.json": DATA, f"set.tar:{'n' * 80}": b"1", "set.tar:empty": b""} == found


def test_what_the_reader_leaves_of_a_member_is_skipped(tmp_path: Path) -> None:
    path = _tar(tmp_path / "set.tgz", {"a": DATA, "b": b"second"})

    heads = [member.head(6) for member in open_members(path)]

    assert [DATA[:6], b"second"] == heads


def test_the_hash_is_of_the_file_as_it_lies(tmp_path: Path) -> None:
    import hashlib

    path = _tar(tmp_path / "set.tgz", {"a": DATA, "b": DATA})
    with open_source(path) as source:
        next(source.members())

        assert hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256()


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    path = _tar(tmp_path / "set.tgz", {"../escaped.json": DATA, "/absolute.json": DATA})
    _read(path)

    assert ["inner", "set.tgz"] == sorted(one.name for one in tmp_path.iterdir())
    assert [] == list(inner.iterdir())


def _link(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("link.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)


def _truncated_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(DATA)[:-2000])


def _flipped_gzip(path: Path) -> None:
    data = bytearray(gzip.compress(DATA))
    data[2000] ^= 0xFF
    path.write_bytes(data)


def _truncated_tar(path: Path) -> None:
    _tar(path, {"a": DATA, "b": DATA}, mode="w")
    path.write_bytes(path.read_bytes()[:6000])


def _tar_cut_between_files(path: Path) -> None:
    _tar(path, {"a": b"x" * 512, "b": DATA}, mode="w")
    path.write_bytes(path.read_bytes()[:1024])


def _damaged_tar(path: Path) -> None:
    _tar(path, {"a": b"x" * 512, "b": DATA}, mode="w")
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)


def _zip(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + DATA)


def _huge_header(path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**31
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + DATA)


def _folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (_link, "is a link or a device"),
        (_truncated_gzip, "cut short: it ends inside its compressed data"),
        (_flipped_gzip, "damaged: |cut short: "),
        (_truncated_tar, "cut short: the archive ends inside this file"),
        (_tar_cut_between_files, "the archive is cut short"),
        (_damaged_tar, "the checksum of a header does not match"),
        (_zip, "is a zip archive"),
        (_huge_header, "a header of 2147483648 bytes"),
        (_folder, "not a regular file"),
        (lambda path: None, "cannot read the file: No such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, make: Callable[[Path], None], problem: str
) -> None:
    path = tmp_path / "bad\x1b[31m\n.json"
    make(path)

    with pytest.raises(BadRequest, match=problem) as caught:
        _read(path)

    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def _bomb(num_bytes: int) -> bytes:
    """Blanks: 1,028 times smaller packed."""
    squeeze = zlib.compressobj(9, wbits=31)
    parts = [squeeze.compress(b" " * 2**20) for _ in range(num_bytes // 2**20)]
    return b"".join([*parts, squeeze.flush()])


def test_a_bomb_is_refused_for_its_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_RATIO_COUNTS_FROM_BYTES", 2**20)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(_bomb(64 * 2**20))

    with pytest.raises(BadRequest, match="decompresses to over 200 times its size"):
        _read(path, piece=2**20)


def test_a_bomb_in_a_bomb_is_not_unpacked_twice(tmp_path: Path) -> None:
    path = tmp_path / "bomb.json.gz.gz"
    path.write_bytes(gzip.compress(_bomb(64 * 2**20)))

    (data,) = _read(path).values()

    assert data.startswith(b"\x1f\x8b")


def test_more_than_allowed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(DATA))

    with pytest.raises(BadRequest, match=r"holds more than 9\.8 KiB; raise --max-bytes"):
        _read(tmp_path / "a.json.gz", max_bytes=9999)
    assert {"a.json.gz": DATA} == _read(tmp_path / "a.json.gz", max_bytes=10_000)


def test_names_are_made_fit_to_print() -> None:
    assert "b.json" == printable("/a/b.json")
    assert "\\u001b[31m" in printable("/a/\x1b[31m.json") or "\x1b" not in printable("/a/\x1b[31m")
    assert 120 == len(printable("/a/" + "x" * 5000))
