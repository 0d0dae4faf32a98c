"""The local index of an experiment: two files of JSON lines in its folder, only ever added to.

``index.jsonl`` holds what was asked for and what came of it, one event a line (``started``,
``config``, ``table``, ``artifact``, ``summary``, ``finished``), ``metrics.jsonl`` one line for each
step of a group. A line that a killed process left half written is cut off before the next is added.
Who goes on from a checkpoint tells the steps after it again: their lines bear a higher ``attempt``.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from meshwright.errors import BadRequest
from meshwright.strict_json import JsonValue, load_json, one_line
from meshwright.tracking.hashes import file_sha256

__all__ = ["INDEX_NAME", "METRICS_NAME", "LocalTracker", "read_lines"]

INDEX_NAME = "index.jsonl"
METRICS_NAME = "metrics.jsonl"
_SCHEMA_VERSION = 1


class LocalTracker:
    """A Tracker that writes into ``folder``.

    When it goes on later ``run_id`` stays the same and ``attempt``, from 1, is one more.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Begin, or go on with, the index in ``folder``.

        Raises:
            BadRequest: it cannot be written.
        """
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (INDEX_NAME, METRICS_NAME):
                _cut_half_line(self.folder / name)
            started = [
                line
                for line in read_lines(self.folder / INDEX_NAME)[0]
                if line.get("event") == "started"
            ]
            self.run_id = str(started[0]["run_id"]) if started else secrets.token_hex(8)
            self.attempt = len(started) + 1
            self._event(
                "started",
                schema_version=_SCHEMA_VERSION,
                run_id=self.run_id,
                attempt=self.attempt,
            )
        except OSError as error:
            raise BadRequest(
                f"{one_line(str(self.folder))}: cannot write there: {error.strerror or error}"
            ) from error

    def config(self, values: Mapping[str, JsonValue]) -> None:
        """See ``Tracker``."""
        self._event("config", values=values)

    def metrics(self, group: str, values: Mapping[str, float], *, step: int) -> None:
        """See ``Tracker``; what is not finite is written as null."""
        facts = {"group": group, "step": step, "attempt": self.attempt}
        self._add(METRICS_NAME, {**facts, **_plain(values)}, sync=False)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[JsonValue]]) -> None:
        """See ``Tracker``."""
        self._event("table", name=name, columns=list(columns), rows=[list(row) for row in rows])

    def artifact(
        self,
        name: str,
        *,
        kind: str,
        files: Sequence[Path],
        metadata: Mapping[str, JsonValue],
        made_from: Sequence[str] = (),
        is_input: bool = False,
    ) -> None:
        """See ``Tracker``."""
        listed = [
            {"name": path.name, "num_bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in files
        ]
        self._event(
            "artifact",
            name=name,
            kind=kind,
            files=listed,
            metadata=metadata,
            made_from=list(made_from),
            is_input=is_input or kind == "dataset",
        )

    def summary(self, values: Mapping[str, JsonValue]) -> None:
        """See ``Tracker``."""
        self._event("summary", values=values)

    def finish(self, status: str) -> None:
        """See ``Tracker``."""
        self._event("finished", status=status)

    def _event(self, event: str, **values: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._add(INDEX_NAME, {"event": event, "utc": now, **values}, sync=True)

    def _add(self, name: str, values: Mapping[str, Any], *, sync: bool) -> None:
        text = json.dumps(_plain(values), ensure_ascii=False, allow_nan=False)
        with open(self.folder / name, "ab") as file:
            file.write(text.encode("utf-8") + b"\n")
            file.flush()
            if sync:
                os.fsync(file.fileno())


def read_lines(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of a file of JSON lines, and one line about each that is none.

    A file that does not exist is empty.

    Raises:
        BadRequest: it cannot be read.
    """
    where = Path(path)
    if not where.exists():
        return [], []
    try:
        data = where.read_bytes()
    except OSError as error:
        raise BadRequest(f"{one_line(str(where))}: cannot read the file: {error}") from error
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            value = load_json(line, error=BadRequest, name=f"{where.name}, line {number}")
        except BadRequest as error:
            problems.append(str(error))
            continue
        if isinstance(value, dict):
            found.append(value)
        else:
            problems.append(f"{where.name}, line {number}: no JSON object")
    return found, problems


def _cut_half_line(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def _plain(value: Any) -> Any:
    """``value`` with None for what is not finite, and Python's numbers for numpy's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
