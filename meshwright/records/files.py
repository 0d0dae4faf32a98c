"""Files of a record store: each is written whole or not at all, and its name proves its content.

``records-20260102T030405.678901Z-<pid>-<random>-<sha256>.parquet``: UTC time of writing, process,
four random bytes, and the first 32 digits of the SHA-256 of the file. A file is written under a
temporary name in the same directory, flushed to the disk, renamed, and the directory is flushed;
what fails on the way leaves nothing behind. ``store.lock`` is held shared while files are read and
alone while files are replaced; appending needs no lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

__all__ = [
    "LOCK_NAME",
    "MAX_FILE_BYTES",
    "clean_temporaries",
    "commit_file",
    "file_problem",
    "has_store_name",
    "list_files",
    "locked",
    "probe",
    "read_file",
    "remove_files",
    "store_name",
    "successor_name",
    "sync_folder",
    "temporaries",
    "write_synced",
]

LOCK_NAME = "store.lock"
MAX_FILE_BYTES = 2**29
_DIGEST_DIGITS = 32
_NAME = re.compile(
    r"records-\d{8}T\d{6}\.\d{6}Z-\d{1,10}-[0-9a-f]{8}-(?P<digest>[0-9a-f]{32})\.parquet"
)
_TEMPORARY = re.compile(r"\.writing-\d+-[0-9a-f]{16}")
_TEMPORARY_AGE_S = 60.0
"""Younger ones may belong to a writer that has not locked its file yet."""


def store_name(data: bytes, *, written_ns: int) -> str:
    """A new name for a file that holds ``data``, written at ``written_ns`` (Unix time)."""
    when = datetime.fromtimestamp(written_ns // 10**9, UTC).strftime("%Y%m%dT%H%M%S")
    return _name(f"{when}.{written_ns % 10**9 // 1000:06d}Z", data)


def successor_name(name: str, data: bytes) -> str:
    """A new name for a file that takes the place of the file ``name``, in the order too."""
    return _name(name.split("-")[1], data)


def has_store_name(name: str) -> bool:
    """Whether ``name`` is one ``store_name`` gives."""
    return _NAME.fullmatch(name) is not None


def _name(when: str, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()[:_DIGEST_DIGITS]
    return f"records-{when}-{os.getpid()}-{secrets.token_hex(4)}-{digest}.parquet"


def commit_file(folder: Path, name: str, data: bytes) -> Path:
    """Put ``data`` on the disk as ``folder/name``; it is there, whole, when this returns.

    Raises:
        OSError: it cannot be written; nothing is left then.
    """
    for attempt in range(3):
        temporary = folder / f".writing-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            write_synced(temporary, data)
            temporary.rename(folder / name)
            break
        except FileNotFoundError:
            # Somebody cleaned up our temporary file, taking it for one left by a crash.
            if attempt == 2 or not folder.is_dir():
                raise
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    try:
        sync_folder(folder)
    except OSError:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
        raise
    return folder / name


def probe(folder: Path) -> None:
    """Write a file into ``folder`` and remove it.

    Raises:
        OSError: that cannot be done.
    """
    temporary = folder / f".writing-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        write_synced(temporary, b"meshwright")
    finally:
        temporary.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write ``data`` to a new file and flush it to the disk, locked meanwhile.

    Raises:
        OSError: it cannot be written; what was, is left.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with open(descriptor, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        view = memoryview(data)
        while view:
            view = view[file.write(view) or 0 :]
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk.

    Raises:
        OSError: it cannot be.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_files(folder: Path) -> list[str]:
    """Names of everything in ``folder`` that ends in ``.parquet``, oldest first.

    Raises:
        OSError: the folder cannot be read, other than by not existing.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(name for name in names if name.endswith(".parquet"))


def read_file(path: Path) -> bytes:
    """Bytes of a regular file of at most ``MAX_FILE_BYTES``.

    Raises:
        FileNotFoundError: it is gone.
        OSError: it cannot be read, or is no such file.
    """
    # O_NONBLOCK: a pipe without a writer would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise OSError(f"larger than {MAX_FILE_BYTES // 2**20} MiB")
        return file.readall() or b""


def file_problem(name: str, data: bytes) -> str:
    """What shows that ``data`` is not what was written as ``name``; empty if it is."""
    match = _NAME.fullmatch(name)
    if match is None:
        return "its name is not one a record store gives"
    if match["digest"] != hashlib.sha256(data).hexdigest()[:_DIGEST_DIGITS]:
        return "damaged: the checksum of the file does not match"
    return ""


def remove_files(folder: Path, names: list[str]) -> None:
    """Remove files; those that are gone already do not matter.

    Raises:
        OSError: one cannot be removed.
    """
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if names:
        sync_folder(folder)


def temporaries(folder: Path) -> list[Path]:
    """Temporary files in ``folder``, of running writers too."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name))
    except FileNotFoundError:
        return []


def clean_temporaries(folder: Path) -> int:
    """Remove temporary files that no running process writes any more; how many."""
    num_removed = 0
    for path in temporaries(folder):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime < _TEMPORARY_AGE_S:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its writer lives
                path.unlink()
                num_removed += 1
            finally:
                os.close(descriptor)
    return num_removed


@contextlib.contextmanager
def locked(folder: Path, *, alone: bool, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of the store; whether it is held.

    It is not where ``wait`` is false and another process has it. A reader goes on without where
    there is no lock file (a data set that is only read) or no locks are to be had.

    Raises:
        OSError: the lock file cannot be opened, for who must have the store alone.
    """
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        if alone:
            descriptor = os.open(folder / LOCK_NAME, flags | os.O_RDWR | os.O_CREAT, 0o666)
        else:
            descriptor = os.open(folder / LOCK_NAME, flags | os.O_RDONLY)
    except OSError:
        if alone:
            raise
        yield False
        return
    try:
        mode = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        try:
            fcntl.flock(descriptor, mode if wait else mode | fcntl.LOCK_NB)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)
