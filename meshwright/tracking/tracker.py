"""Where an experiment says what it does: the interface, and the local index with its mirror.

Nothing an experiment says may stop it: a disk that is full or a server that is gone is told once,
and the training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from meshwright.strict_json import JsonValue, one_line

__all__ = ["Mirrored", "Tracker"]


class Tracker(Protocol):
    """Takes what an experiment says."""

    def config(self, values: Mapping[str, JsonValue]) -> None:
        """What it was asked for: settings, seeds, data with their hashes, splits."""
        ...

    def metrics(self, group: str, values: Mapping[str, float], *, step: int) -> None:
        """Figures of one step of ``group`` (``"operators/0"``); of equal steps the last holds."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[JsonValue]]) -> None:
        """A small table, such as the worst cases of a split."""
        ...

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
        """Files the experiment made (or was given), and the SHA-256 of what they were made from.

        ``is_input``: it was given; what is of kind ``"dataset"`` always was.
        """
        ...

    def summary(self, values: Mapping[str, JsonValue]) -> None:
        """Final figures."""
        ...

    def finish(self, status: str) -> None:
        """The end: ``"finished"``, ``"budget"``, ``"interrupted"`` or ``"failed"``."""
        ...


class Mirrored:
    """A Tracker that tells several, the first being the truth; none of them can fail its caller."""

    def __init__(self, trackers: Sequence[Tracker], *, complain: Callable[[str], None]) -> None:
        """``complain`` is told, once for each of ``trackers``, that it has failed."""
        self._trackers = list(trackers)
        self._complain = complain

    def config(self, values: Mapping[str, JsonValue]) -> None:
        """See ``Tracker``."""
        self._tell(lambda tracker: tracker.config(values))

    def metrics(self, group: str, values: Mapping[str, float], *, step: int) -> None:
        """See ``Tracker``."""
        self._tell(lambda tracker: tracker.metrics(group, values, step=step))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[JsonValue]]) -> None:
        """See ``Tracker``."""
        self._tell(lambda tracker: tracker.table(name, columns, rows))

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
        self._tell(
            lambda tracker: tracker.artifact(
                name,
                kind=kind,
                files=files,
                metadata=metadata,
                made_from=made_from,
                is_input=is_input,
            )
        )

    def summary(self, values: Mapping[str, JsonValue]) -> None:
        """See ``Tracker``."""
        self._tell(lambda tracker: tracker.summary(values))

    def finish(self, status: str) -> None:
        """See ``Tracker``."""
        self._tell(lambda tracker: tracker.finish(status))

    def _tell(self, say: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._trackers):
            try:
                say(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                self._complain(
                    f"{name} failed and is off from here on; training goes on: "
                    f"{type(error).__name__}: {one_line(str(error))}"
                )
