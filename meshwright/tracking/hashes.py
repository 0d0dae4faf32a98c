"""What an experiment was given, by content: file name, size and SHA-256."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from meshwright.errors import BadRequest
from meshwright.strict_json import one_line

__all__ = ["DataSource", "bytes_sha256", "file_sha256", "source_of"]

_CHUNK_BYTES = 2**20


class DataSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file or folder that was read; no path, for that would name somebody's machine."""

    name: str
    kind: str
    """What it holds: ``operators``, ``collectives``, ``runs``, ``records``..."""
    num_bytes: int
    sha256: str
    num_rows: int


def bytes_sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file.

    Raises:
        BadRequest: it cannot be read.
    """
    return _file_hash(Path(path)).hexdigest()


def source_of(path: str | os.PathLike[str], *, kind: str, num_rows: int) -> DataSource:
    """Name, size and hash of a file, or of all files of a folder.

    The hash of a folder is that of its files' names and hashes, in order of their names. Hidden
    files, indexes and locks (``*.json``, ``*.lock``) do not count: they change without the data.

    Raises:
        BadRequest: something cannot be read.
    """
    where = Path(path)
    if not where.is_dir():
        digest, size = file_sha256(where), _size_bytes(where)
    else:
        files = sorted(
            item
            for item in where.iterdir()
            if item.is_file()
            and not item.name.startswith(".")
            and item.suffix not in (".json", ".lock")
        )
        listed = "".join(f"{item.name} {file_sha256(item)}\n" for item in files)
        digest, size = bytes_sha256(listed.encode()), sum(map(_size_bytes, files))
    name = where.name or where.resolve().name
    return DataSource(name=name, kind=kind, num_bytes=size, sha256=digest, num_rows=num_rows)


def _size_bytes(path: Path) -> int:
    return path.stat().st_size


def _file_hash(path: Path) -> hashlib._Hash:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadRequest(f"{one_line(str(path))}: cannot read the file: {reason}") from error
    return digest
