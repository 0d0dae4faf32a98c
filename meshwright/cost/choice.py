"""A choice as the cost model takes it, and what its step costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import FloatArray, IntArray
from meshwright.cost.memory import StageMemory
from meshwright.cost.pricing import Correction
from meshwright.cost.reduction import stages_of
from meshwright.cost.table import Split
from meshwright.plans.plan import Compression, Recompute, ScheduleName

__all__ = ["CORRECTION_CAUSE", "TIME_CAUSES", "Choice", "StepCost"]

TIME_CAUSES = (
    "compute",
    "launch",
    "tp_communication",
    "zero_gather",
    "dp_communication",
    "optimizer",
    "clipping",
    "pipeline_transfer",
    "bubble",
    "host",
    "data_loading",
    "stragglers",
)

CORRECTION_CAUSE = "step_correction"
"""A further cause where measured steps correct the sum (``cost.corrected``); may be below zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a plan decides beyond sharding labels."""

    split: Split
    starts: tuple[int, ...]
    """First segment of each stage."""
    first_devices: tuple[int, ...]
    """First device of each stage."""
    zero_stages: tuple[int, ...]
    """One for each segment."""
    policies: tuple[Recompute, ...]
    """One for each segment."""
    schedule: ScheduleName
    bucket_bytes: int
    stage_of_segment: tuple[int, ...] = ()
    """Stage of each segment, where a stage is more than one run; empty: by ``starts``."""
    stage_splits: tuple[Split, ...] = ()
    """One for each stage, where stages have meshes of their own; empty: ``split``."""
    batch_shares: tuple[tuple[float, ...], ...] = ()
    """For each stage the share of the samples each of its hosts takes; empty: even."""
    relays: bool = False
    """Stages only know their neighbors and pass on what skips them: a linear pipeline, the baseline
    of pipelines on the graph's own shape."""
    token_slices: tuple[int, ...] = ()
    """Tokens of each slice of the sequence that the pipeline runs by itself; empty: whole."""

    offloaded: tuple[bool, ...] = ()
    """For each segment whether its optimizer state is on the host; empty: none is."""

    pipeline_compression: Compression = Compression.NONE
    """Of what passes between stages; collectives' own is the split's."""

    def stage_of(self, num_segments: int) -> IntArray:
        """(segments,) stage of each segment."""
        if self.stage_of_segment:
            return np.array(self.stage_of_segment, dtype=np.int64)
        return stages_of(self.starts, num_segments)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """First device and number of devices of each stage."""
        return tuple(
            (first, self.split_of(stage).num_devices)
            for stage, first in enumerate(self.first_devices)
        )

    @property
    def num_devices(self) -> int:
        """Devices in use."""
        return sum(count for _, count in dict.fromkeys(self.places))

    @property
    def num_groups(self) -> int:
        """Device groups: fewer than stages under the interleaved schedule."""
        interleaved = self.schedule is ScheduleName.INTERLEAVED
        return self.split.num_stages if interleaved else len(self.starts)

    def split_of(self, stage: int) -> Split:
        """The mesh of a stage."""
        return self.stage_splits[stage] if self.stage_splits else self.split


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Time and memory of one step."""

    breakdown_s: dict[str, float]
    """``TIME_CAUSES`` to seconds, and a correction's; they sum to ``time_s``."""
    memory: StageMemory
    capacity_bytes: FloatArray
    """(stages,) of the smallest device."""
    correction: Correction | None = None
    """What measured steps say of it; ``None``: not asked."""

    @property
    def time_s(self) -> float:
        """Seconds of the step."""
        return sum(self.breakdown_s.values())

    @property
    def parts_s(self) -> float:
        """Seconds of the step before any correction, as searches compare it."""
        return self.time_s - self.breakdown_s.get(CORRECTION_CAUSE, 0.0)

    @property
    def fullest_stage(self) -> int:
        """The stage with the least room."""
        return int(np.argmax(self.memory.peak_bytes / self.capacity_bytes))

    @property
    def fits(self) -> bool:
        """Every stage fits its devices."""
        return bool((self.memory.peak_bytes <= self.capacity_bytes).all())
