"""Measurements of our own that come with the package, and the card that describes them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from meshwright.errors import MissingProfile
from meshwright.records import Record, RecordStore

__all__ = ["CARD_PATH", "packaged_records"]

_FOLDER = Path(__file__).parent
CARD_PATH = _FOLDER / "README.md"


@cache
def packaged_records() -> tuple[Record, ...]:
    """All Records that come with the package, in the order they were measured.

    Raises:
        MissingProfile: the package was installed without its data, or a file of it is damaged.
    """
    records, problems = RecordStore(_FOLDER).read()
    if problems or not records:
        said = problems[0] if problems else "the package holds no measurements"
        raise MissingProfile(
            f"{said}; install Meshwright again, or measure with `meshwright profile campaign`"
        )
    return tuple(records)
