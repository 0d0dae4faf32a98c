"""The learned price of collectives: ``LearnedCollectives``, a ``CollectivePricer`` in numpy alone.

A price is the geometric mean of the learned time (``collective_model``) and the analytic one
(``meshwright.cost.collectives``), weighted by trust:

    t = analytic^(1 - trust) learned^trust

Trust is 1 on systems that were measured. For others it is what leaving out systems of the same
family of links has shown: ``analytic^2 / (analytic^2 + learned^2)`` of the errors squared. It
halves with every octave by which a link's rate or a level's ranks lie beyond what was measured
(after the first octave; not of networks, whose constants stay close to the data sheet's by their
priors), and is 0 for links that are none of NVLink, PCI Express or a network, where the analytic
formulas hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.model import Device, GroupLevel, Link
from meshwright.cost.collectives import alternatives
from meshwright.cost.pricing import Priced
from meshwright.errors import BadRequest
from meshwright.gnn_cost.collectives.model import (
    KINDS,
    Curve,
    LinkClass,
    curves,
    link_class,
    merged_levels,
    stack_groups,
    system_of,
)
from meshwright.gnn_cost.collectives.terms import (
    EFFECTS,
    KIND_EFFECTS,
    PRIORS,
    CollectiveConstants,
    effects_of,
    terms_of,
)
from meshwright.spmd.program import CollectiveKind
from meshwright.strict_json import (
    FieldError,
    convert,
    dump_json,
    load_json,
    write_text_atomically,
)

__all__ = [
    "CollectiveModel",
    "LearnedCollectives",
    "Range",
    "load_collectives",
    "parse_collectives",
    "pretrained_collectives",
]

FloatArray = NDArray[np.float64]

MODEL_VERSION = 1
MIN_FIXED_S = 2e-6
"""No collective takes less: a kernel starts and a flag crosses a link twice."""
_MAX_CONSTANT = 60.0


class Range(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured of one family of links."""

    least_bytes_per_s: float
    most_bytes_per_s: float
    most_ranks: int
    """On one level."""
    kinds: tuple[str, ...]


class CollectiveModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a price needs, as it stands in a file."""

    version: int = MODEL_VERSION
    values: dict[str, float]
    """By the names of ``PRIORS``, on their scale."""
    effects: dict[str, dict[str, float]]
    """By system (``system_of``)."""
    launch_s: dict[str, float] = {}
    """By ``source|kind``; no part of any price."""
    ranges: dict[str, Range]
    """By family of links (``nvlink``, ``pcie``, ``network``)."""
    unseen_trust: dict[str, float]
    """By family: trust on a system that was not measured."""
    seen_half_width: float
    """Half of a 90 % interval of the logarithm of time, on systems that were measured."""
    unseen_half_width: dict[str, float]
    """By family, on others."""
    card: dict[str, Any] = {}
    """Data with hashes and licenses, splits and figures, how to make it again."""

    def __post_init__(self) -> None:
        if self.version != MODEL_VERSION:
            raise FieldError("version", f"is {self.version}; this Meshwright reads {MODEL_VERSION}")
        if self.values.keys() != PRIORS.keys():
            wrong = sorted(self.values.keys() ^ PRIORS.keys())
            raise FieldError("values", f"lacks or adds constants: {', '.join(wrong[:5])}")
        known = {*EFFECTS, *(f"{name}.{kind}" for name in KIND_EFFECTS for kind in KINDS)}
        for system, effects in self.effects.items():
            if not effects.keys() <= known:
                raise FieldError("effects", f"of {system} holds an effect that is not known")
        numbers = [*self.values.values(), *(x for e in self.effects.values() for x in e.values())]
        if not all(abs(number) <= _MAX_CONSTANT for number in numbers):
            raise FieldError("values", f"or effects hold a number beyond {_MAX_CONSTANT:g}")
        if not all(0 <= trust <= 1 for trust in self.unseen_trust.values()):
            raise FieldError("unseen_trust", "holds a trust that is not between 0 and 1")

    @property
    def constants(self) -> CollectiveConstants:
        """Of the formulas."""
        return CollectiveConstants(values=self.values, effects=self.effects, launch_s=self.launch_s)

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        write_text_atomically(dump_json(msgspec.to_builtins(self)), path)


def load_collectives(path: Path) -> CollectiveModel:
    """The model a file holds.

    Raises:
        BadRequest: the file cannot be read, or is no model of collectives.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise BadRequest(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    return parse_collectives(data, name=str(path))


def parse_collectives(data: bytes, *, name: str) -> CollectiveModel:
    """The model a JSON document holds; ``name`` begins the message of its errors.

    Raises:
        BadRequest: it is no model of collectives.
    """
    value = load_json(data, error=BadRequest, name=name)
    return convert(value, CollectiveModel, error=BadRequest, name=name)


@lru_cache(maxsize=1)
def pretrained_collectives() -> LearnedCollectives:
    """The pricer that comes with the package."""
    found = resources.files("meshwright.gnn_cost.pretrained").joinpath("collectives.json")
    return LearnedCollectives(parse_collectives(found.read_bytes(), name=found.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Price:
    """What prices one kind of collective in one group."""

    learned: tuple[Curve, ...]
    """Of one group each; none where nothing is learned."""
    analytic: tuple[tuple[float, float], ...]
    trust: float
    repeats: int
    """How many messages one after another a collective is..."""
    parts: int
    """... each of so many equal parts of the payload."""

    def time_s(self, num_bytes: FloatArray) -> FloatArray:
        """(N,) seconds, blended."""
        analytic = np.minimum.reduce([fixed + num_bytes * each for fixed, each in self.analytic])
        if not self.learned:
            return np.asarray(analytic)
        curves_s = [curve.time_s(num_bytes / self.parts) for curve in self.learned]
        learned = self.repeats * np.minimum.reduce(curves_s)
        return np.asarray(np.exp(
            (1 - self.trust) * np.log(np.maximum(analytic, 1e-12)) + self.trust * np.log(learned)
        ))  # fmt: skip


class LearnedCollectives:
    """A ``CollectivePricer`` from fitted constants; remembers the groups it was asked for.

    ``HALO`` is one message between two ranks (the first and the last), which point-to-point sends
    are priced as; ``RING`` is ``num_ranks - 1`` messages of the payload's ``num_ranks``-th part.
    """

    def __init__(self, model: CollectiveModel) -> None:
        self.model = model
        self._prices: dict[tuple[CollectiveKind, tuple[GroupLevel, ...], int, Device], _Price] = {}

    def collectives(
        self,
        kind: CollectiveKind,
        num_bytes: FloatArray,
        *,
        levels: Sequence[GroupLevel],
        num_ranks: int,
        device: Device,
    ) -> Priced:
        """See ``CollectivePricer``; nothing for one rank or no bytes."""
        payload = np.asarray(num_bytes, dtype=np.float64)
        if num_ranks < 2 or not levels:
            return Priced(time_s=np.zeros_like(payload), trust=np.zeros_like(payload))
        key = (kind, tuple(levels), num_ranks, device)
        if key not in self._prices:
            self._prices[key] = self._price(*key)
        price = self._prices[key]
        time_s = np.where(payload > 0, price.time_s(payload), 0.0)
        return Priced(time_s=time_s, trust=np.full_like(payload, price.trust))

    def half_width(self, levels: Sequence[GroupLevel], device: Device) -> float:
        """Half of the 90 % interval of the logarithm of a price; 0 where nothing is learned.

        The time lies within ``exp(-width)`` and ``exp(width)`` times the price.
        """
        widths = [
            self.model.seen_half_width
            if system_of(device, level.link) in self.model.effects
            else self.model.unseen_half_width.get(_family(level.link), 0.0)
            for level in levels
        ]
        return max(widths, default=0.0)

    def _price(
        self,
        kind: CollectiveKind,
        levels: tuple[GroupLevel, ...],
        num_ranks: int,
        device: Device,
    ) -> _Price:
        is_message = kind in (CollectiveKind.HALO, CollectiveKind.RING)
        name = "send_recv" if is_message else str(kind)
        used = levels[-1:] if is_message else levels
        trust = self._trust(name, used, num_ranks, device)
        rings = kind == CollectiveKind.RING
        return _Price(
            learned=self._curves(name, used, num_ranks, device) if trust > 0 else (),
            analytic=alternatives(kind, levels, num_ranks),
            trust=trust,
            repeats=num_ranks - 1 if rings else 1,
            parts=num_ranks if rings else 1,
        )

    def _curves(
        self, name: str, levels: tuple[GroupLevel, ...], num_ranks: int, device: Device
    ) -> tuple[Curve, ...]:
        groups = stack_groups([(name, levels, num_ranks, device)])
        constants = self.model.constants
        effects = effects_of(constants, [system_of(device, levels[0].link)], [name])
        found = curves(groups, terms_of(constants.values, groups, effects)).values()
        return tuple(
            replace(curve, fixed_s=np.maximum(curve.fixed_s, MIN_FIXED_S))
            for curve in found
            if np.isfinite(curve.fixed_s).all()
        )

    def _trust(
        self, name: str, levels: Sequence[GroupLevel], num_ranks: int, device: Device
    ) -> float:
        """Of the level that is trusted least."""
        merged = merged_levels(name, levels, num_ranks)
        return min(
            self._trust_of_level(name, link, ranks, device, is_lowest=place == 0)
            for place, (link, ranks) in enumerate(merged)
        )

    def _trust_of_level(
        self, name: str, link: Link, ranks: float, device: Device, *, is_lowest: bool
    ) -> float:
        family = _family(link)
        known = self.model.ranges.get(family)
        if known is None:
            return 0.0
        is_seen = is_lowest and system_of(device, link) in self.model.effects
        trust = 1.0 if is_seen else self.model.unseen_trust.get(family, 0.0)
        if family == LinkClass.NETWORK.name.lower():
            return trust
        if name not in known.kinds:
            trust *= 0.5
        beyond = max(
            math.log2(link.bytes_per_s / known.most_bytes_per_s),
            math.log2(known.least_bytes_per_s / link.bytes_per_s),
        )
        octaves = max(beyond - 1, 0.0) + max(math.log2(ranks / known.most_ranks) - 1, 0.0)
        return float(trust * 2.0**-octaves)


def _family(link: Link) -> str:
    return link_class(link).name.lower()
