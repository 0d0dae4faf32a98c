"""The index of a record store: which kinds of rows each file holds.

``index.json`` is one line with the SHA-256 of the rest, then JSON. It only spares reading files
that hold nothing wanted. A file's name holds the checksum of its content, so an entry can be
stale only by naming a file that is gone. A damaged or missing index is built again from the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec

from meshwright.records.files import MAX_FILE_BYTES, read_file, write_synced
from meshwright.records.layout import Group

__all__ = ["INDEX_NAME", "read_index", "summary_of", "write_index"]

INDEX_NAME = "index.json"
_VERSION = 1
_MAX_GROUPS = 4096
"""Of one file; the entry of a file with more says nothing and so never spares reading it."""

Summary = dict[Group, int]
"""Number of rows of each group."""


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    file: str
    groups: list[tuple[str, str, str, str, int, int]]
    """Kind, name, device, dtype, number of the machine, number of rows."""


class _Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    machines: list[str]
    files: list[_Entry]


def summary_of(groups: Iterable[Group]) -> Summary | None:
    """Rows of each group; None where there are too many groups to be worth an entry."""
    counted = Counter(groups)
    return dict(counted) if len(counted) <= _MAX_GROUPS else None


def read_index(folder: Path) -> dict[str, Summary] | None:
    """Summary by file name; None where there is no index or it is damaged."""
    try:
        head, _, body = read_file(folder / INDEX_NAME).partition(b"\n")
        if head != hashlib.sha256(body).hexdigest().encode():
            return None
        index = msgspec.json.decode(body, type=_Index)
        if index.version != _VERSION:
            return None
        return {
            entry.file: {
                (kind, name, device, dtype, index.machines[machine]): num_rows
                for kind, name, device, dtype, machine, num_rows in entry.groups
            }
            for entry in index.files
        }
    except (OSError, ValueError, IndexError, RecursionError):
        return None


def write_index(folder: Path, summaries: dict[str, Summary]) -> bool:
    """Replace the index; whether it could be (a data set may be read only, a disk full)."""
    machines: dict[str, int] = {}
    files = [
        _Entry(
            file,
            [
                (*group[:4], machines.setdefault(group[4], len(machines)), num_rows)
                for group, num_rows in groups.items()
            ],
        )
        for file, groups in sorted(summaries.items())
    ]
    body = msgspec.json.encode(_Index(_VERSION, list(machines), files))
    data = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    if len(data) > MAX_FILE_BYTES:
        return False
    temporary = folder / f".writing-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        write_synced(temporary, data)
        temporary.replace(folder / INDEX_NAME)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True
