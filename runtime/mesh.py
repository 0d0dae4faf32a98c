"""Which rank is which: stages, coordinates and process groups.

Ranks are the devices of the plan. Stage ``s`` owns the ranks from ``first_devices[s]`` on, one for
each coordinate, row-major over ``AXIS_NAMES``. A *position* along axes is the row-major index of a
coordinate restricted to them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from meshwright.errors import PlanRefused
from meshwright.plans.plan import AXIS_NAMES, ParallelPlan
from meshwright.spmd.program import Collective, Function, StageProgram

__all__ = [
    "Axes",
    "Coordinate",
    "Group",
    "Layout",
    "axes_used",
    "layout_of",
    "make_groups",
    "program_functions",
]

Axes = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinate:
    """One rank's place inside its stage."""

    shape: tuple[int, ...]
    """Sizes of ``AXIS_NAMES``."""
    index: tuple[int, ...]
    """Position along each."""

    def size(self, axes: Axes) -> int:
        """Ranks along ``axes``."""
        return math.prod(self.shape[AXIS_NAMES.index(axis)] for axis in axes)

    def position(self, axes: Axes) -> int:
        """Row-major position along ``axes``, the first outermost."""
        position = 0
        for axis in axes:
            place = AXIS_NAMES.index(axis)
            position = position * self.shape[place] + self.index[place]
        return position

    @property
    def flat(self) -> int:
        """Row-major position in the whole stage."""
        return self.position(AXIS_NAMES)

    def peers(self, axes: Axes) -> tuple[Coordinate, ...]:
        """The coordinates that differ only along ``axes``, by position along them."""
        places = [AXIS_NAMES.index(axis) for axis in axes]
        found = []
        for moved in itertools.product(*(range(self.shape[place]) for place in places)):
            index = list(self.index)
            for place, position in zip(places, moved, strict=True):
                index[place] = position
            found.append(Coordinate(shape=self.shape, index=tuple(index)))
        return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The ranks of a plan."""

    stage_shape: tuple[int, ...]
    """Sizes of ``AXIS_NAMES`` inside every stage."""
    first_devices: tuple[int, ...]
    """First rank of each stage."""

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.first_devices)

    @property
    def num_ranks_per_stage(self) -> int:
        """Ranks of one stage."""
        return math.prod(self.stage_shape)

    @property
    def num_ranks(self) -> int:
        """Ranks of the plan."""
        return self.num_stages * self.num_ranks_per_stage

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """Every coordinate of a stage, in rank order."""
        return tuple(
            Coordinate(shape=self.stage_shape, index=index)
            for index in itertools.product(*(range(size) for size in self.stage_shape))
        )

    def rank_of(self, stage: int, coordinate: Coordinate) -> int:
        """The rank at ``coordinate`` of ``stage``."""
        return self.first_devices[stage] + coordinate.flat

    def locate(self, rank: int) -> tuple[int, Coordinate]:
        """Stage and coordinate of ``rank``.

        Raises:
            PlanRefused: if no stage owns it.
        """
        for stage, first in enumerate(self.first_devices):
            if first <= rank < first + self.num_ranks_per_stage:
                return stage, self.coordinates[rank - first]
        raise PlanRefused(f"rank {rank}: no stage owns it; start {self.num_ranks} ranks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The process group of one rank along some axes, as functional collectives name it."""

    name: str
    size: int


def layout_of(plan: ParallelPlan) -> Layout:
    """The ranks of ``plan``.

    Raises:
        PlanRefused: if the stages are not equal meshes that cover the devices without overlap.
    """
    per_stage = plan.mesh.num_devices_per_stage
    for number, stage in enumerate(plan.stages):
        if stage.num_devices != per_stage:
            raise PlanRefused(
                f"stages[{number}].num_devices is {stage.num_devices} but the mesh has {per_stage} "
                "devices in each stage; the runtime needs equal stages"
            )
    first_devices = tuple(stage.first_device for stage in plan.stages)
    owned = sorted(first + offset for first in first_devices for offset in range(per_stage))
    if owned != list(range(plan.mesh.num_devices)):
        raise PlanRefused(
            f"stages do not cover devices 0..{plan.mesh.num_devices - 1} exactly once; mend "
            "stages[].first_device"
        )
    return Layout(stage_shape=plan.mesh.stage_shape, first_devices=first_devices)


def program_functions(program: StageProgram) -> dict[str, Function]:
    """The functions of a program, by name of the field."""
    return {
        "prologue": program.prologue,
        "forward": program.forward,
        "backward": program.backward,
        "backward_final": program.backward_final,
        "finalize_tied": program.finalize_tied,
        "publish": program.publish,
    }


def axes_used(functions: Iterable[Function]) -> tuple[Axes, ...]:
    """Every axes tuple some collective runs along, sorted."""
    return tuple(
        sorted(
            {
                item.axes
                for function in functions
                for item in function.body
                if isinstance(item, Collective)
            }
        )
    )


def make_groups(
    layout: Layout, *, rank: int, axes: Iterable[Axes], timeout_s: float = 600.0
) -> Mapping[Axes, Group]:
    """The process groups of ``rank`` along each of ``axes``; needs the default group.

    Only members take part in making a group, so a rank of thousands makes no more groups than it
    uses. Members meet in the same order everywhere because the axes are sorted and all ranks of a
    stage run the same program.
    """
    stage, coordinate = layout.locate(rank)
    groups: dict[Axes, Group] = {}
    for axes_tuple in sorted(set(axes)):
        ranks = [layout.rank_of(stage, peer) for peer in coordinate.peers(axes_tuple)]
        if len(ranks) == 1:
            groups[axes_tuple] = Group(name="", size=1)
            continue
        handle = dist.new_group(
            ranks, timeout=timedelta(seconds=timeout_s), use_local_synchronization=True
        )
        groups[axes_tuple] = Group(name=handle.group_name, size=len(ranks))
    return groups
