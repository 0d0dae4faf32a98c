"""``memory.json``: how far measured peaks exceed predicted ones, learned from measured runs.

It changes no price and refuses no plan: what "fits" keeps free is the calibration's, and what the
margin would refuse besides did run (``benchmarks/results/memory_prediction.json``). ``explain``
says with it whether the 99th percentile fits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import msgspec

from meshwright.cost.pricing import MemoryMargin
from meshwright.gnn_cost.document import Document
from meshwright.tracking import DataSource

__all__ = ["MEMORY_NAME", "MemoryFigures", "SourceMargin", "read_memory"]

MEMORY_NAME = "memory.json"

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=10)]


class SourceMargin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the runs of one source."""

    margin: _Share
    """Drawn towards that of all sources by the number of configurations."""
    median_excess: Annotated[float, msgspec.Meta(ge=-1, le=10)]
    """Measured over predicted, less 1."""
    runs: _Count
    configurations: _Count


class MemoryFigures(Document, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file holds."""

    what: ClassVar[str] = "memory figures"

    level: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    """Of the quantile."""
    margin: _Share
    """Of all sources."""
    within_left_out: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """Share of runs within the margin that was learned without their configuration."""
    sources: Annotated[dict[str, SourceMargin], msgspec.Meta(min_length=1)]
    data: list[DataSource] = msgspec.field(default_factory=list)
    licenses: dict[str, str] = msgspec.field(default_factory=dict)
    """By ``source`` of the rows; what was not told is absent."""

    def write(self, folder: Path) -> None:
        """Write it into the folder of a fit."""
        self.write_to(folder / MEMORY_NAME)


def read_memory(path: Path) -> MemoryMargin:
    """The margin in a file.

    Raises:
        BadRequest: it cannot be read, or does not follow the form.
    """
    form = MemoryFigures.read(path)
    return MemoryMargin(
        level=form.level,
        margin=form.margin,
        runs=sum(source.runs for source in form.sources.values()),
        configurations=sum(source.configurations for source in form.sources.values()),
        sources=tuple(sorted(form.sources)),
    )
