"""What a step is priced with: operators, collectives, and the figures that join them.

The core prices by roofline and data sheets (``ANALYTIC``). A learned model takes its place here: it
is handed to the core and never imported by it. *Trust* says how much of a price is learned: at 1
all of the learned correction counts, at 0 none (far from all training data), and then the price is
the analytic one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.model import Device, GroupLevel
from meshwright.cost.calibration import DEFAULTS, Calibration
from meshwright.cost.work import OperatorWork
from meshwright.spmd.program import CollectiveKind

__all__ = [
    "ANALYTIC",
    "ANALYTIC_INTERVAL",
    "CollectivePricer",
    "OperatorPricer",
    "Priced",
    "Pricing",
]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """Times of some items, and how far they are learned."""

    time_s: FloatArray
    """(N,) on the device; without the launch from the host."""
    trust: FloatArray
    """(N,) from 0, analytic, to 1, learned."""


class OperatorPricer(Protocol):
    """Prices operators in one batch."""

    def operators(self, work: OperatorWork, device: Device) -> Priced:
        """Times of all rows on one device; never below the roofline at the data sheet's peaks."""
        ...


class CollectivePricer(Protocol):
    """Prices collectives of one group in one batch."""

    def collectives(
        self,
        kind: CollectiveKind,
        num_bytes: FloatArray,
        *,
        levels: Sequence[GroupLevel],
        num_ranks: int,
        device: Device,
    ) -> Priced:
        """Times for (N,) full payloads, ``Collective.num_bytes`` each, of one group of ranks.

        Args:
            kind: what is done.
            num_bytes: (N,) full payloads.
            levels: how the group spreads over hosts and racks, lowest first.
            num_ranks: in the group.
            device: type of its devices.
        """
        ...


ANALYTIC_INTERVAL = (0.8, 1.5)
"""Interval of an analytic step time, relative to it. Assumption."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pricing:
    """A cost model's figures as one thing to hand on; compared by identity."""

    name: str = "analytic"
    """What plans call it."""
    sha256: str = ""
    """Of its model card; empty for ``analytic``."""
    data_sha256: frozenset[str] = frozenset()
    """Of the files it was learned from: what it says of their rows is in sample."""
    operators: OperatorPricer | None = None
    """``None``: by roofline."""
    collectives: CollectivePricer | None = None
    """``None``: by latency and bandwidth."""
    calibration: Calibration = DEFAULTS
    interval: tuple[float, float] = ANALYTIC_INTERVAL
    """Quantiles of measured over predicted step times where all of a step is learned."""

    def __post_init__(self) -> None:
        low, high = self.interval
        assert 0 < low <= 1 <= high, "an interval around the prediction"

    @property
    def is_learned(self) -> bool:
        """Whether anything in it is learned."""
        return self.operators is not None or self.collectives is not None

    @property
    def label(self) -> str:
        """Name and the start of the hash, as plans carry it."""
        return f"{self.name} {self.sha256[:12]}".rstrip()

    def interval_s(self, time_s: float, learned_share: float) -> tuple[float, float]:
        """Interval of a step time of which ``learned_share``, 0 to 1, is learned.

        What is not learned has the interval of an analytic step.
        """
        low, high = (
            learned_share * learned + (1 - learned_share) * analytic
            for learned, analytic in zip(self.interval, ANALYTIC_INTERVAL, strict=True)
        )
        return time_s * low, time_s * high


ANALYTIC = Pricing()
"""Data sheets alone."""
