"""What a step is priced with: operators, collectives, and the figures that join them.

The core prices by roofline and data sheets (``ANALYTIC``). A learned model takes its place here: it
is handed to the core and never imported by it. *Trust* says how much of a price is learned: at 1
all of the learned correction counts, at 0 none (far from all training data), and then the price is
the analytic one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    "Correction",
    "MemoryMargin",
    "OperatorPricer",
    "Priced",
    "Pricing",
    "StepCorrector",
    "StepShape",
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepShape:
    """What a step is made of: all that measured steps may correct it by."""

    breakdown_s: Mapping[str, float]
    """Seconds by cause."""
    family_s: FloatArray
    """(``len(Family)``,) of operators that the busiest device group runs."""
    num_runs: float
    """Operators that group runs."""
    peak_flop_per_s: float
    """Data sheet of its device, for the step's products."""
    memory_bytes_per_s: float
    num_devices: int
    tp: int
    num_stages: int
    num_microbatches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What measured steps say of a predicted one."""

    factor: float
    """Of its time; 1 far from all that was measured."""
    trust: float
    """From 0, far from all that was measured, to 1."""
    log_half_width: float
    """Of the interval of the logarithm of the time, where ``trust`` is 1."""

    def interval_s(self, time_s: float, usual_s: tuple[float, float]) -> tuple[float, float]:
        """Interval of the corrected ``time_s``; ``usual_s`` is that without a correction."""
        low, high = (
            (1 - self.trust) * math.log(usual / time_s) + self.trust * own
            for usual, own in zip(usual_s, (-self.log_half_width, self.log_half_width), strict=True)
        )
        return time_s * math.exp(low), time_s * math.exp(high)


class StepCorrector(Protocol):
    """Corrects the time of whole steps; for the last ranking of plans, not for their search."""

    def step(self, shape: StepShape) -> Correction:
        """What measured steps say of one predicted as ``shape``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryMargin:
    """What measured peaks exceed predicted ones by."""

    level: float
    """Of the quantile, over configurations."""
    margin: float
    """Over the prediction."""
    runs: int
    configurations: int
    sources: tuple[str, ...]
    """Where the runs come from."""


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
    steps: StepCorrector | None = None
    """``None``: a step is what its parts add up to."""
    memory: MemoryMargin | None = None
    """``None``: nothing is learned of it."""
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
