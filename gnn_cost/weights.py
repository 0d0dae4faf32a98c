"""Fitted weights as two files: tensors (safetensors) and a card that says what they are (JSON).

The card is for people as much as for programs: what the weights were fitted on (with hashes), how
it was split, what came out, under which licenses the data stand, and the command that makes the
same weights again. It holds the hash of the tensors, so that neither file goes without the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from meshwright.errors import BadRequest
from meshwright.strict_json import (
    JsonValue,
    dump_json,
    load_json,
    write_bytes_atomically,
    write_text_atomically,
)

__all__ = ["CARD_VERSION", "load_weights", "save_weights"]

CARD_VERSION = 1
MAX_WEIGHTS_BYTES = 64 * 2**20

Tensors = dict[str, NDArray[Any]]


def save_weights(
    path: Path, tensors: Mapping[str, NDArray[Any]], *, kind: str, card: Mapping[str, JsonValue]
) -> None:
    """Write ``path`` (``.safetensors``) and the card beside it (``.json``), each atomically.

    Args:
        path: of the tensors.
        tensors: by name.
        kind: what the weights are for, ``"operators"``; asked for again when they are loaded.
        card: what stands on the card besides ``kind``, ``card_version`` and ``sha256``.
    """
    data = save_tensors({name: np.ascontiguousarray(one) for name, one in tensors.items()})
    whole: dict[str, JsonValue] = {
        "card_version": CARD_VERSION,
        "kind": kind,
        "sha256": hashlib.sha256(data).hexdigest(),
        **card,
    }
    write_bytes_atomically(data, path)
    write_text_atomically(dump_json(whole), path.with_suffix(".json"))


def load_weights(
    path: Path, *, kind: str, versions: Mapping[str, int], command: str = "meshwright fit"
) -> tuple[Tensors, dict[str, JsonValue]]:
    """Tensors by name, and their card.

    Args:
        path: of the tensors; the card stands beside it.
        kind: what the weights must be for.
        versions: what the card must say, ``{"features_version": 1}``.
        command: makes such weights; named in errors.

    Raises:
        BadRequest: a file is missing, damaged, or of another kind or version.
    """
    card_path = path.with_suffix(".json")
    card = load_json(_read(card_path, command), error=BadRequest, name=str(card_path))
    if not isinstance(card, dict):
        raise BadRequest(f"{card_path}: no card of weights; fit them again")
    for key, expected in {"card_version": CARD_VERSION, "kind": kind, **versions}.items():
        if card.get(key) != expected:
            raise BadRequest(
                f"{card_path}: {key} is {card.get(key)!r}, this version needs "
                f"{expected!r}; fit the weights again with `{command}`"
            )
    data = _read(path, command)
    if hashlib.sha256(data).hexdigest() != card.get("sha256"):
        raise BadRequest(f"{path}: is not the file its card describes; fetch or fit both again")
    try:
        return load_tensors(data), card
    except (SafetensorError, KeyError, ValueError) as error:
        raise BadRequest(f"{path}: no safetensors file ({error}); fit the weights again") from error


def _read(path: Path, command: str) -> bytes:
    try:
        if path.stat().st_size > MAX_WEIGHTS_BYTES:
            raise BadRequest(f"{path}: over {MAX_WEIGHTS_BYTES >> 20} MiB; these are no weights")
        return path.read_bytes()
    except OSError as error:
        raise BadRequest(
            f"{path}: cannot be read ({error.strerror}); name weights that `{command}` wrote"
        ) from error
