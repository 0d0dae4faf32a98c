"""A decision: everything a plan may choose, segment by segment, before it becomes a plan.

A search fixes a ``Skeleton`` (mesh, micro-batches, schedule), prices some ``Strategy`` for every
segment, and answers with a ``Decision``: which strategy each segment uses and where stages begin.
Uniform plans use one strategy everywhere; layer-wise mixtures use several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

from meshwright.plans.plan import AXIS_NAMES, CommunicationOptions, Recompute, ScheduleName

__all__ = ["Decision", "Sharding", "Skeleton", "Strategy", "runs_of"]

Labels = tuple[tuple[str, tuple[str, ...]], ...]
"""Mesh axis to the labels it shards, most wanted first; axes in order of ``AXIS_NAMES``."""

Exceptions = tuple[tuple[int, Labels], ...]
"""Number of an operator within its segment to labels of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """A way of sharding every segment class along the axes inside a stage."""

    name: str
    """For people: ``tensor``, ``tensor+sequence``, ``batch``, ``replicate``, ``ilp``..."""
    by_class: tuple[Labels, ...]
    """By segment class; batch axes (``dp_replicate``, ``dp_shard``) included."""
    operators_by_class: tuple[Exceptions, ...] = ()
    """By segment class; empty: none has exceptions."""

    def labels_of(self, segment_class: int) -> dict[str, list[str]]:
        """``SegmentPlan.shard`` of a class."""
        return {axis: list(labels) for axis, labels in self.by_class[segment_class]}

    def operators_of(self, segment_class: int) -> dict[str, dict[str, list[str]]]:
        """``SegmentPlan.operators`` of a class."""
        if not self.operators_by_class:
            return {}
        return {
            str(number): {axis: list(names) for axis, names in labels}
            for number, labels in self.operators_by_class[segment_class]
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """What one segment does."""

    sharding: Sharding
    zero_stage: int = 0
    recompute: Recompute = Recompute.NONE
    offload: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """What all segments of a plan share."""

    axis_sizes: tuple[tuple[str, int], ...]
    """Every one of ``AXIS_NAMES``."""
    num_stages: int = 1
    num_microbatches: int = 1
    schedule: ScheduleName = ScheduleName.ONE_F_ONE_B
    token_slices: tuple[int, ...] = ()
    communication: CommunicationOptions = field(default_factory=CommunicationOptions)

    @classmethod
    def of(cls, sizes: Mapping[str, int], **others: object) -> Skeleton:
        """From the sizes of some axes; the others are 1."""
        every = tuple((axis, sizes.get(axis, 1)) for axis in AXIS_NAMES)
        return cls(axis_sizes=every, **others)  # type: ignore[arg-type]

    @property
    def sizes(self) -> dict[str, int]:
        """``axis_sizes`` as a mapping."""
        return dict(self.axis_sizes)

    @property
    def num_devices_per_stage(self) -> int:
        """Devices of one stage."""
        count = 1
        for _, size in self.axis_sizes:
            count *= size
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A skeleton and what every segment does on it."""

    skeleton: Skeleton
    starts: tuple[int, ...]
    """First segment of each stage, ascending from 0."""
    strategies: tuple[Strategy, ...]
    """One for each segment."""


def runs_of(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs, first and last."""
    found = []
    for _, group in groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        run = [number for _, number in group]
        found.append((run[0], run[-1]))
    return found
