"""Frozen sets: which instances a claim is about, told by a hash.

``frozen_sets.json`` holds for each set its split, its seeds, and the SHA-256 of its
specifications. Whoever draws them again gets the same ones or an error, never others unawares.
Some of a set are worth nothing once made (``env.maker``); they are left out by everybody alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType

import msgspec

from meshwright.env.generator import InstanceSpec, draw
from meshwright.errors import BadRequest

__all__ = ["FrozenSet", "freeze", "frozen_sets", "frozen_specs", "specs_lines", "specs_sha256"]

_FILE = "frozen_sets.json"


class FrozenSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A range of seeds of a split, and what they must give."""

    name: str
    split: str
    first_seed: int
    count: int
    sha256: str
    """Of the specifications, in order."""


def specs_lines(specs: Iterable[InstanceSpec]) -> bytes:
    """The specifications as JSON, one a line."""
    return b"".join(msgspec.json.encode(spec, order="deterministic") + b"\n" for spec in specs)


def specs_sha256(specs: Iterable[InstanceSpec]) -> str:
    """Of ``specs_lines``."""
    return hashlib.sha256(specs_lines(specs)).hexdigest()


def freeze(name: str, split: str, *, first_seed: int, count: int) -> FrozenSet:
    """The set of these seeds as it is drawn now, to be written down."""
    specs = _drawn(split, first_seed, count)
    return FrozenSet(
        name=name, split=split, first_seed=first_seed, count=count, sha256=specs_sha256(specs)
    )


@cache
def frozen_sets() -> Mapping[str, FrozenSet]:
    """The sets of this version, by name."""
    text = resources.files("meshwright.env").joinpath(_FILE).read_text("utf-8")
    found = msgspec.json.decode(text, type=tuple[FrozenSet, ...])
    return MappingProxyType({item.name: item for item in found})


def frozen_specs(name: str, count: int | None = None) -> tuple[InstanceSpec, ...]:
    """The specifications of the set called ``name``.

    Args:
        name: of the set.
        count: only the first ones; less than all cannot be checked.

    Raises:
        BadRequest: there is no such set, or what is drawn is not what was frozen.
    """
    if name not in frozen_sets():
        raise BadRequest(f"instances: no set {name!r}; use one of {', '.join(frozen_sets())}")
    frozen = frozen_sets()[name]
    if count is not None and count < frozen.count:
        return _drawn(frozen.split, frozen.first_seed, count)
    specs = _drawn(frozen.split, frozen.first_seed, frozen.count)
    found = specs_sha256(specs)
    if found != frozen.sha256:
        raise BadRequest(
            f"instances: set {name!r} was frozen as {frozen.sha256[:12]} but {found[:12]} is drawn "
            "now: the generator, the model zoo or the device catalog has changed; freeze it anew"
        )
    return specs


def _drawn(split: str, first_seed: int, count: int) -> tuple[InstanceSpec, ...]:
    return tuple(draw(seed, split) for seed in range(first_seed, first_seed + count))
