"""What a rank tells whoever started it: figures as they come, and words about progress."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import msgspec

from meshwright.records.kinds import Kind
from meshwright.records.record import Record, Scalar, timing_of
from meshwright.records.writing import make_record

__all__ = ["Emit", "Figure", "Note", "to_record"]


class Figure(msgspec.Struct, frozen=True, kw_only=True, tag="figure"):
    """One figure with all its repeats; what becomes a Record."""

    kind: Kind
    name: str
    unit: str
    values: tuple[float, ...]
    """Every repeat, in the order they ran."""
    method: str
    extra: dict[str, Scalar] = {}

    @property
    def median(self) -> float:
        """Of the repeats."""
        return statistics.median(self.values)


class Note(msgspec.Struct, frozen=True, kw_only=True, tag="note"):
    """A line for a person who waits."""

    text: str
    is_progress: bool = False
    """One of many, of which some may be left out."""


Emit = Callable[[Figure | Note], None]
"""Takes what was measured; on ranks other than 0 it does nothing."""


def to_record(figure: Figure, *, device: str, verb: str) -> Record:
    """The figure as a Record of this host and this process's software."""
    spread = timing_of(figure.values)
    return make_record(
        kind=figure.kind,
        name=figure.name,
        device=device,
        verb=verb,
        method=figure.method,
        unit=figure.unit,
        median=spread.median_s,
        p10=spread.p10_s,
        p90=spread.p90_s,
        num_repeats=spread.num_repeats,
        samples=figure.values,
        extra=figure.extra,
    )
