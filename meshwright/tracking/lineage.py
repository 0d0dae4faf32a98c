"""What was made of what, from run to run: one marker for each thing, equal wherever it is told.

Records of a profile, cost models, planners and plans are known by their SHA-256. Whoever makes one
logs its marker, whoever is given one uses it: an artifact with the start of the hash, as plans name
it, and nothing else; so both are the same artifact and a server draws the line.
``profile -> cost model -> planner -> plan -> run``.
"""

from __future__ import annotations

from typing import Literal

from meshwright.tracking.tracker import Tracker

__all__ = ["Made", "made", "used"]

_NUM_DIGITS = 12

Made = Literal["records", "cost-model", "instances", "planner", "plan", "run"]


def made(tracker: Tracker, kind: Made, sha256: str) -> None:
    """Tell that the experiment made the thing of this hash."""
    _tell(tracker, kind, sha256, is_input=False)


def used(tracker: Tracker, kind: Made, sha256: str) -> None:
    """Tell that the experiment was given it."""
    _tell(tracker, kind, sha256, is_input=True)


def _tell(tracker: Tracker, kind: Made, sha256: str, *, is_input: bool) -> None:
    start = sha256[:_NUM_DIGITS]
    metadata, name = {"sha256": start}, f"{kind}-{start}"
    tracker.artifact(name, kind=kind, files=(), metadata=metadata, is_input=is_input)
