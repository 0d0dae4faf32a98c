"""What the JSON files in the folder of a fit have in common: a version, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import msgspec

from meshwright.errors import BadRequest
from meshwright.strict_json import (
    check_schema_version,
    convert,
    dump_json,
    load_json,
    read_source,
    write_text_atomically,
)

__all__ = ["Document"]

_SCHEMA_VERSION = 1


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what such a file holds."""

    what: ClassVar[str]
    """What messages call the file."""

    schema_version: int = _SCHEMA_VERSION

    def __post_init__(self) -> None:
        check_schema_version(self.schema_version, _SCHEMA_VERSION)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What a file holds.

        Raises:
            BadRequest: it cannot be read, or does not follow the form.
        """
        data, name = read_source(path, error=BadRequest, what=cls.what)
        return convert(
            load_json(data, error=BadRequest, name=name), cls, error=BadRequest, name=name
        )

    def write_to(self, path: Path) -> None:
        """Write the file.

        Raises:
            BadRequest: it cannot be written.
        """
        write_text_atomically(dump_json(self), path)
