"""Puts Records into a store as they come, a batch every few seconds, and the rest at the end."""

from __future__ import annotations

import time
from types import TracebackType

from meshwright.records.record import Record
from meshwright.records.store import RecordStore

__all__ = ["Keeper"]

_EVERY_S = 5.0


class Keeper:
    """A context that has stored, when it is left for whatever reason, all it was given."""

    def __init__(self, store: RecordStore, *, every_s: float = _EVERY_S) -> None:
        """Stores a batch at most every ``every_s`` seconds."""
        self.num_kept = 0
        """Records on disk."""
        self._store = store
        self._every_s = every_s
        self._waiting: list[Record] = []
        self._last_s = time.monotonic()

    def keep(self, record: Record) -> None:
        """Store ``record``, now or soon.

        Raises:
            BadRequest: the store cannot be written.
        """
        self._waiting.append(record)
        if time.monotonic() - self._last_s >= self._every_s:
            self._store_all()

    def _store_all(self) -> None:
        batch, self._waiting = self._waiting, []
        if batch:
            self._store.append(batch)
            self.num_kept += len(batch)
        self._last_s = time.monotonic()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._store_all()
