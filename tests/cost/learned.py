"""Pricers that stand for learned ones, with answers known by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.model import Device, GroupLevel
from meshwright.cost.pricing import Correction, Priced, StepShape
from meshwright.cost.work import DTYPES, OperatorWork
from meshwright.spmd.program import CollectiveKind

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FixedCollectives:
    """So many seconds and seconds per byte, whatever is asked; counts how often it is."""

    fixed_s: float = 1e-3
    s_per_byte: float = 1e-9
    trust: float = 1.0
    asked: list[CollectiveKind] = field(default_factory=list)

    def collectives(
        self,
        kind: CollectiveKind,
        num_bytes: FloatArray,
        *,
        levels: Sequence[GroupLevel],
        num_ranks: int,
        device: Device,
    ) -> Priced:
        assert levels
        assert num_ranks > 1
        assert device.name != "cpu"
        self.asked.append(kind)
        return Priced(
            time_s=self.fixed_s + num_bytes * self.s_per_byte,
            trust=np.full(len(num_bytes), self.trust),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PeakOperators:
    """Data-sheet peaks over an efficiency."""

    efficiency: float = 0.5
    trust: float = 1.0

    def operators(self, work: OperatorWork, device: Device) -> Priced:
        names = [DTYPES[number] for number in work.dtype]
        peaks = np.array([device.flop_per_s.get(name, 1e12) for name in names])
        least_s = np.maximum(work.flop / peaks, work.num_bytes / device.memory_bytes_per_s)
        return Priced(time_s=least_s / self.efficiency, trust=np.full(work.count, self.trust))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CachedOperators:
    """Data-sheet peaks; what fits ``cache_bytes`` takes no time to move."""

    cache_bytes: float

    def operators(self, work: OperatorWork, device: Device) -> Priced:
        found = PeakOperators(efficiency=1.0).operators(work, device)
        peaks = np.array([device.flop_per_s.get(DTYPES[number], 1e12) for number in work.dtype])
        is_cached = work.num_bytes <= self.cache_bytes
        time_s = np.where(is_cached, np.maximum(work.flop / peaks, 1e-12), found.time_s)
        return Priced(time_s=time_s, trust=found.trust)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FixedSteps:
    """A factor by tensor parallel degree, 1 for those not told; counts how often it is asked."""

    factor_of_tp: Mapping[int, float]
    trust: float = 1.0
    log_half_width: float = 0.1
    asked: list[StepShape] = field(default_factory=list)

    def step(self, shape: StepShape) -> Correction:
        self.asked.append(shape)
        return Correction(
            factor=self.factor_of_tp.get(shape.tp, 1.0),
            trust=self.trust,
            log_half_width=self.log_half_width,
        )
