"""Candidates with sizes drawn where models live."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.profiling.operators.candidate import Candidate, Dims, DtypeName
from meshwright.profiling.operators.catalog import FAMILIES
from meshwright.profiling.operators.family import Family

__all__ = ["Limits", "sampled_candidates"]

_TRIES = 60
"""For each size wanted; where the limits leave fewer, there are fewer."""
_ITEM_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest work of one forward pass, or update, that is drawn."""

    flop: float
    bytes: float

    @staticmethod
    def of_device(device: str) -> Limits:
        """About a second of one CPU core, or a quarter of a second of a GPU."""
        if device.startswith("cuda"):
            return Limits(flop=4e13, bytes=2.0**33)
        return Limits(flop=1e10, bytes=2.0**28)


def sampled_candidates(
    names: Sequence[str],
    dtypes: Sequence[DtypeName],
    *,
    num_shapes: int,
    limits: Limits,
    compiled: Sequence[bool] = (False,),
    seed: int = 0,
) -> list[Candidate]:
    """For each family up to ``num_shapes`` distinct sizes, in every direction and dtype it has.

    The sizes of a family depend on ``seed``, ``limits`` and its name alone, so that directions and
    dtypes can be compared and a sweep can be taken up again.
    """
    found: list[Candidate] = []
    for name in names:
        family = FAMILIES[name]
        for dims in _sizes(family, num_shapes, limits, seed):
            found.extend(
                family.candidate(dims, direction, dtype, compiled=is_compiled)
                for direction in family.directions
                for dtype in dtypes
                for is_compiled in compiled
            )
    return found


def _sizes(family: Family, num_shapes: int, limits: Limits, seed: int) -> Iterator[Dims]:
    rng = np.random.default_rng([seed, zlib.crc32(family.name.encode())])
    seen: set[tuple[tuple[str, object], ...]] = set()
    for _ in range(num_shapes * _TRIES):
        if len(seen) == num_shapes:
            return
        dims = family.sample(rng)
        key = tuple(sorted(dims.items()))
        work = family.work(dims, family.directions[0], _ITEM_BYTES)
        if key in seen or work.flop > limits.flop or work.bytes > limits.bytes:
            continue
        seen.add(key)
        yield dims
