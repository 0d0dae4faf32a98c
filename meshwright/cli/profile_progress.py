"""How far a sweep is, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from meshwright.strict_json import one_line
from meshwright.units import format_seconds

__all__ = ["sweep_progress"]

_SAY_EVERY_S = 5.0


class _Told(Protocol):
    def __call__(self, text: str, *, num_done: int, num_total: int, spent_s: float) -> None: ...


@contextmanager
def sweep_progress(*, budget_s: float) -> Iterator[_Told]:
    """What to tell of a sweep that may take ``budget_s``."""
    if not sys.stderr.isatty():
        yield _Lines(budget_s)
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("of " + format_seconds(budget_s)),
        TextColumn("{task.description}", markup=False),
    )
    console = Console(stderr=True)
    # A thread that redraws would take part in what is measured: draw between measurements only.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task: Any = progress.add_task("", total=None)

        def tell(text: str, *, num_done: int, num_total: int, spent_s: float) -> None:
            del spent_s  # the bar shows its own
            progress.update(task, description=one_line(text), completed=num_done, total=num_total)
            progress.refresh()

        yield tell


class _Lines:
    """A line every few seconds."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s = budget_s
        self._said_s = float("-inf")

    def __call__(self, text: str, *, num_done: int, num_total: int, spent_s: float) -> None:
        """Write the line where the last is old enough."""
        if spent_s - self._said_s < _SAY_EVERY_S:
            return
        self._said_s = spent_s
        spent = f"{format_seconds(spent_s)} of {format_seconds(self._budget_s)}"
        sys.stderr.write(f"{num_done} of {num_total} measured, {spent}: {one_line(text)}\n")
        sys.stderr.flush()
