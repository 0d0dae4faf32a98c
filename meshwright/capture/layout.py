"""Where repeated children stand in a module's lists, and how their paths change with the depth.

A *run* is a stretch of a ``ModuleList`` or ``Sequential`` whose children repeat with a period:
every ``period`` children make one *unit*. Paths of parameters and modules name a child by its
position; with another number of units in a run the positions behind it move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Layout", "ModuleRun", "RunPath"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRun:
    """Children of one list that repeat."""

    list_path: str
    """Path of the list in the module tree."""
    first: int
    """Position of the first child."""
    period: int
    """Children in one unit."""
    num_units: int


@dataclass(frozen=True, slots=True)
class RunPath:
    """A path below one unit of a run; ``Layout.join`` writes it out."""

    run: int
    unit: int
    offset: int
    """Which child of the unit."""
    rest: str
    """What follows the child, with its leading dot; may be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The same lists with any number of units in each run."""

    runs: tuple[ModuleRun, ...]
    """As in the whole module; those of one list in order."""

    def split(self, path: str, units: Sequence[int]) -> RunPath | None:
        """``path`` in a module with these units; None where it is in no unit."""
        found = self._position(path)
        if found is None:
            return None
        list_path, position, rest = found
        for number, run in enumerate(self.runs):
            if run.list_path == list_path:
                local = position - self._start(number, units)
                if 0 <= local < units[number] * run.period:
                    return RunPath(number, local // run.period, local % run.period, rest)
        return None

    def join(self, path: RunPath, units: Sequence[int]) -> str:
        """The path in a module with these units."""
        run = self.runs[path.run]
        position = self._start(path.run, units) + path.unit * run.period + path.offset
        return f"{_prefix(run.list_path)}{position}{path.rest}"

    def moved(self, path: str, before: Sequence[int], after: Sequence[int]) -> str:
        """``path``, which is in no unit, after the units changed from ``before`` to ``after``."""
        found = self._position(path)
        if found is None:
            return path
        list_path, position, rest = found
        shift = sum(
            (after[number] - before[number]) * run.period
            for number, run in enumerate(self.runs)
            if run.list_path == list_path and self._start(number, before) <= position
        )
        return f"{_prefix(list_path)}{position + shift}{rest}"

    def _start(self, number: int, units: Sequence[int]) -> int:
        """Position of the first child of a run."""
        wanted = self.runs[number]
        return wanted.first + sum(
            (units[other] - run.num_units) * run.period
            for other, run in enumerate(self.runs)
            if run.list_path == wanted.list_path and run.first < wanted.first
        )

    def _position(self, path: str) -> tuple[str, int, str] | None:
        """List, position and rest of a path below one of the lists."""
        for list_path in dict.fromkeys(run.list_path for run in self.runs):
            prefix = _prefix(list_path)
            if path.startswith(prefix):
                position, dot, rest = path[len(prefix) :].partition(".")
                if position.isdecimal():
                    return list_path, int(position), dot + rest
        return None


def _prefix(list_path: str) -> str:
    return f"{list_path}." if list_path else ""
