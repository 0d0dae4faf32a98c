"""The folder of a fit: what it was asked for, and the parts that are done.

``fit.json`` holds settings and data hashes, so that a fit only goes on with what it began with. A
part that is done is its weights with their card, ``NAME.safetensors`` and ``NAME.json``, and what
else it wrote; ``done/NAME.json``, written last, holds the SHA-256 of each, so that a part counts as
done only where all are there and whole. ``checkpoints/NAME/`` belongs to the training of the part.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from safetensors.numpy import load

from meshwright.errors import BadRequest
from meshwright.gnn_cost.fitting.parts import FitSettings, PartResult, SplitError, WorstCases
from meshwright.gnn_cost.weights import save_weights
from meshwright.strict_json import (
    JsonValue,
    convert,
    dump_json,
    load_json,
    one_line,
    read_source,
    write_text_atomically,
)
from meshwright.tracking import DataSource, file_sha256

__all__ = ["FitFolder", "require_fresh"]

_SCHEMA_VERSION = 1

T = TypeVar("T")


class _Asked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema_version: int = _SCHEMA_VERSION
    settings: FitSettings
    data: list[DataSource]


class _Done(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    files: dict[str, str]
    settings: dict[str, Any]
    documents: dict[str, Any]
    splits: list[SplitError]
    worst_columns: list[str]
    worst_rows: list[list[Any]]
    figures: dict[str, Any]
    is_cut: bool


def require_fresh(path: Path, *, is_resumed: bool) -> None:
    """Check that a fit may begin in a folder.

    Raises:
        BadRequest: it holds one, and that is not to go on.
    """
    if not is_resumed and (path / "fit.json").exists():
        raise BadRequest(
            f"{one_line(str(path))}: holds a fit already; go on with it by --resume, or give "
            f"another -o"
        )


class FitFolder:
    """A fit on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(
        self, settings: FitSettings, data: tuple[DataSource, ...], *, is_resumed: bool
    ) -> None:
        """Make the folder, or go on with what is there.

        Raises:
            BadRequest: it holds a fit and none is to go on, or one of other settings or data.
        """
        asked = _Asked(settings=settings, data=list(data))
        file = self.path / "fit.json"
        where = one_line(str(self.path))
        if not file.exists():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadRequest(f"{where}: cannot make the folder: {error.strerror}") from error
            write_text_atomically(dump_json(asked), file)
            return
        require_fresh(self.path, is_resumed=is_resumed)
        before = _read(file, _Asked)
        for name in settings.__struct_fields__:
            old, new = getattr(before.settings, name), getattr(settings, name)
            if old != new:
                raise BadRequest(
                    f"{where}: the fit began with {name} {old}, not {new}; give the same, or "
                    f"another -o"
                )
        if before.data != asked.data:
            known = {(item.name, item.sha256) for item in before.data}
            added = [item.name for item in data if (item.name, item.sha256) not in known]
            what = f"{one_line(added[0])} is new or has changed" if added else "some are missing"
            raise BadRequest(
                f"{where}: the fit began with other data ({what}); give the same, or another -o"
            )

    def checkpoints(self, name: str) -> Path:
        """The folder for checkpoints of a part, made where it is not there."""
        path = self.path / "checkpoints" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def result(self, name: str) -> PartResult | None:
        """What a part gave, where it is done and whole."""
        weights = self.path / f"{name}.safetensors"
        try:
            done = _read(self.path / "done" / f"{name}.json", _Done)
            if any(file_sha256(self.path / file) != digest for file, digest in done.files.items()):
                return None
            tensors = load(weights.read_bytes()) if weights.name in done.files else {}
        except (BadRequest, OSError):
            return None
        return PartResult(
            tensors=tensors,
            settings=done.settings,
            documents=done.documents,
            splits=tuple(done.splits),
            worst=WorstCases(
                columns=tuple(done.worst_columns), rows=tuple(map(tuple, done.worst_rows))
            ),
            figures=done.figures,
            is_cut=done.is_cut,
        )

    def files(self, name: str) -> dict[str, str]:
        """SHA-256 by name of the files of a part that is done."""
        return _read(self.path / "done" / f"{name}.json", _Done).files

    def forget(self, name: str) -> None:
        """The part is not done any more."""
        (self.path / "done" / f"{name}.json").unlink(missing_ok=True)
        shutil.rmtree(self.path / "checkpoints" / name, ignore_errors=True)

    def keep(self, name: str, result: PartResult, card: Mapping[str, JsonValue]) -> None:
        """Write down what a part gave; its checkpoints go where its training is at its end.

        Raises:
            BadRequest: it cannot be written.
        """
        written: list[str] = []
        if result.tensors:
            weights = self.path / f"{name}.safetensors"
            save_weights(weights, result.tensors, kind=name, card=card)
            written += [weights.name, weights.with_suffix(".json").name]
        for file, document in result.documents.items():
            write_text_atomically(dump_json(document), self.path / file)
            written.append(file)
        done = _Done(
            files={file: file_sha256(self.path / file) for file in written},
            settings=dict(result.settings),
            documents=dict(result.documents),
            splits=list(result.splits),
            worst_columns=list(result.worst.columns),
            worst_rows=[list(row) for row in result.worst.rows],
            figures=dict(result.figures),
            is_cut=result.is_cut,
        )
        (self.path / "done").mkdir(exist_ok=True)
        write_text_atomically(dump_json(done), self.path / "done" / f"{name}.json")
        if not result.is_cut:
            shutil.rmtree(self.path / "checkpoints" / name, ignore_errors=True)


def _read(file: Path, type_: type[T]) -> T:
    data, name = read_source(file, error=BadRequest, what="fit")
    value = load_json(data, error=BadRequest, name=name)
    return convert(value, type_, error=BadRequest, name=name)
