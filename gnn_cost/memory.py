"""``memory.json``: how far measured peaks exceed predicted ones, learned from measured runs.

It changes no price and refuses no plan: what "fits" keeps free is the calibration's, and what the
margin would refuse besides did run (``benchmarks/results/memory_prediction.json``). ``explain``
says with it whether the 99th percentile fits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from meshwright.cost.pricing import MemoryMargin
from meshwright.errors import BadRequest
from meshwright.strict_json import (
    FieldError,
    convert,
    dump_json,
    load_json,
    read_source,
    write_text_atomically,
)
from meshwright.tracking import DataSource

__all__ = ["MEMORY_NAME", "MemoryFigures", "SourceMargin", "read_memory"]

MEMORY_NAME = "memory.json"
_SCHEMA_VERSION = 1

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


class MemoryFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file holds."""

    schema_version: int = _SCHEMA_VERSION
    level: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    """Of the quantile."""
    margin: _Share
    """Of all sources."""
    within_left_out: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """Share of runs within the margin that was learned without their configuration."""
    sources: Annotated[dict[str, SourceMargin], msgspec.Meta(min_length=1)]
    data: list[DataSource] = []
    licenses: dict[str, str] = {}
    """By ``source`` of the rows; what was not told is absent."""

    def __post_init__(self) -> None:
        if self.schema_version != _SCHEMA_VERSION:
            raise FieldError(
                "schema_version",
                f"is {self.schema_version}, this Meshwright reads {_SCHEMA_VERSION}",
            )

    def write(self, folder: Path) -> None:
        """Write it into the folder of a fit."""
        write_text_atomically(dump_json(self), folder / MEMORY_NAME)


def read_memory(path: Path) -> MemoryMargin:
    """The margin in a file.

    Raises:
        BadRequest: it cannot be read, or does not follow the form.
    """
    data, name = read_source(path, error=BadRequest, what="memory figures")
    form = convert(
        load_json(data, error=BadRequest, name=name), MemoryFigures, error=BadRequest, name=name
    )
    return MemoryMargin(
        level=form.level,
        margin=form.margin,
        runs=sum(source.runs for source in form.sources.values()),
        configurations=sum(source.configurations for source in form.sources.values()),
        sources=tuple(sorted(form.sources)),
    )
