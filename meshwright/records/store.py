"""The record store: a directory of Parquet files to which Records are only ever added.

Each ``append`` is one new file that is there whole or not at all; ``compact`` turns many small
ones into few. ``docs/records.md`` describes the files and what the store promises.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meshwright.errors import BadRequest
from meshwright.records import pruning, upkeep
from meshwright.records.files import (
    LOCK_NAME,
    MAX_FILE_BYTES,
    commit_file,
    locked,
    probe,
    store_name,
    sync_folder,
)
from meshwright.records.layout import ROWS_PER_GROUP, Group, file_of, table_of
from meshwright.records.pruning import Pruned
from meshwright.records.query import Query
from meshwright.records.record import Record
from meshwright.records.scan import failure, scan
from meshwright.records.upkeep import Compacted, Merged, Verification
from meshwright.strict_json import one_line

__all__ = ["RecordStore"]

_EVERYTHING = Query()


class RecordStore:
    """Records in a directory.

    Several processes of one host may use a store at once, each through an object of its own; of
    several threads each needs an object of its own too.
    """

    def __init__(self, path: str | os.PathLike[str], *, compact_after: int = 256) -> None:
        """The store at ``path``, which ``append`` makes where it does not exist.

        After ``compact_after`` appends this object joins the files it wrote into one, so that who
        appends Records one by one leaves no thousands of files.
        """
        self.path = Path(path)
        self._compact_after = compact_after
        self._written: list[tuple[str, Any]] = []
        """Name and table of the files this object wrote and has not joined."""
        self._last_ns = 0

    def check_writable(self) -> None:
        """Prove that Records can be added, by making the directory and a file that is removed.

        Raises:
            BadRequest: they cannot.
        """
        try:
            self._make()
            probe(self.path)
        except OSError as exc:
            raise failure(self.path, "add", exc) from exc

    def append(self, records: Iterable[Record]) -> None:
        """Add ``records``: all are on the disk when this returns, none where it raises.

        Raises:
            BadRequest: the store cannot be written, or a Record cannot be stored.
        """
        table = table_of(records)
        if not table.num_rows:
            return
        try:
            name = self._commit(table)
        except OSError as exc:
            raise failure(self.path, "add", exc) from exc
        is_small = table.num_rows <= ROWS_PER_GROUP
        if is_small:
            self._written.append((name, table))
        if not is_small or len(self._written) >= self._compact_after:
            upkeep.join_own(self.path, self._written)
            self._written = []

    def _make(self) -> None:
        """Make the directory, and in it the lock."""
        if not (self.path / LOCK_NAME).exists():
            self.path.mkdir(parents=True, exist_ok=True)
            sync_folder(self.path.parent)
            with locked(self.path, alone=True, wait=False):
                pass  # readers that come now find the lock

    def _commit(self, table: Any) -> str:
        self._make()
        data = file_of([table])
        if len(data) > MAX_FILE_BYTES:
            raise BadRequest(
                f"{one_line(str(self.path))}: {table.num_rows} records are more than one file of "
                f"{MAX_FILE_BYTES // 2**20} MiB holds; append fewer at once"
            )
        self._last_ns = max(time.time_ns(), self._last_ns + 1000)
        name = store_name(data, written_ns=self._last_ns)
        commit_file(self.path, name, data)
        return name

    def read(self, query: Query = _EVERYTHING) -> tuple[list[Record], list[str]]:
        """The Records that ``query`` accepts and that are whole, and what is wrong with the store.

        Each problem is one line about one file. Of one writer the Records come in the order in
        which they were appended. A store that does not exist yet is empty.

        Raises:
            BadRequest: the directory cannot be read.
        """
        records: list[Record] = []
        problems: list[str] = []
        seen: set[bytes] = set()
        for found in scan(self.path, query):
            if found.problem:
                problems.append(found.problem)
            for checksum, record in found.whole_rows:
                if checksum not in seen:
                    seen.add(checksum)
                    records.append(record)
        return records, problems

    def sources(self) -> frozenset[str]:
        """Every ``source`` of its whole Records: of imported ones name and SHA-256 of their files.

        Raises:
            BadRequest: the directory cannot be read.
        """
        return frozenset(
            record.source
            for found in scan(self.path, _EVERYTHING)
            for _, record in found.whole_rows
        )

    def query(
        self,
        *,
        kind: str | None = None,
        name: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        machine: str | None = None,
    ) -> tuple[list[Record], list[str]]:
        """``read`` of the Records for which every condition given holds; see ``Query``."""
        return self.read(Query(kind=kind, name=name, device=device, dtype=dtype, machine=machine))

    def count(self, query: Query = _EVERYTHING) -> tuple[dict[Group, int], list[str]]:
        """How many Records of each kind, name, device, dtype and machine; and the problems.

        Raises:
            BadRequest: the directory cannot be read.
        """
        return upkeep.count(self.path, query)

    def verify(self) -> Verification:
        """What every file holds, by its own checksum and those of its rows.

        Raises:
            BadRequest: the directory cannot be read.
        """
        return upkeep.verify(self.path)

    def merge(self, other: RecordStore) -> Merged:
        """Add the Records of ``other`` that are whole and not here yet; ``other`` stays as it is.

        Raises:
            BadRequest: one of the two cannot be read, or this one not be written.
        """
        return upkeep.merge(self.path, other.path)

    def compact(self) -> Compacted:
        """Join small files, drop rows that stand twice; Records and their order stay the same.

        Files with damage are left as they are.

        Raises:
            BadRequest: the store cannot be read or written.
        """
        return upkeep.compact(self.path)

    def prune(
        self,
        *,
        keep_newest: int | None = None,
        before_utc: str | None = None,
        duplicates: bool = False,
        damaged: bool = False,
    ) -> Pruned:
        """Remove Records, and what interrupted writers left.

        Args:
            keep_newest: Of those that measure the same on the same hardware keep only so many.
            before_utc: Remove those measured before this time (ISO 8601); not those that do not
                say when.
            duplicates: Of those that are equal in everything keep the first.
            damaged: Replace files with damage by what is whole in them.

        Raises:
            BadRequest: the store cannot be read or written, or a condition has no sense.
        """
        return pruning.prune(
            self.path,
            keep_newest=keep_newest,
            before_utc=before_utc,
            duplicates=duplicates,
            damaged=damaged,
        )
