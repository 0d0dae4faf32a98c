"""From a plan of an instance to the decision it stands for and to words; the best plan of all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.env.instance import CUTS, ROW_DECISIONS, Instance, Room
from meshwright.env.rooms import PricedRooms
from meshwright.errors import BadRequest, PlanRefused
from meshwright.plans.plan import ScheduleName
from meshwright.space.decision import Decision
from meshwright.space.search import SearchContext

__all__ = ["Placed", "best_of", "best_of_room", "decision_of", "in_words"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Placed:
    """One plan of an instance."""

    row: int
    variants: tuple[int, ...]
    """For each group the number of its variant."""
    cut: int


def decision_of(context: SearchContext, instance: Instance, placed: Placed) -> Decision:
    """What the plan decides, segment by segment.

    Args:
        context: that ``instance`` was made of.
        instance: whose plan it is.
        placed: the plan.

    Raises:
        PlanRefused: the row has no such variant.
    """
    rooms = instance.rooms
    if not isinstance(rooms, PricedRooms) or rooms.context is not context:
        rooms = PricedRooms(
            context,
            rows=instance.rows,
            variants=instance.variants,
            group_classes=instance.group_classes,
            num_cuts=instance.num_cuts,
        )
    for sharded in rooms.opened(placed.row):
        if set(placed.variants) <= set(sharded.variants):
            chosen = np.array([sharded.variants.index(number) for number in placed.variants])
            assignment = chosen[rooms.group_of_segment]
            return sharded.space.decision(assignment, sharded.starts[placed.cut])
    raise PlanRefused(
        f"{instance.name}: no way of sharding row {placed.row} has variants {placed.variants}"
    )


def best_of_room(room: Room, row: int) -> tuple[float, Placed]:
    """Time and plan of the fastest plan of a row; infinite where none fits."""
    *variants, cut = np.unravel_index(int(room.time_s.argmin()), room.time_s.shape)
    placed = Placed(row=row, variants=tuple(int(v) for v in variants), cut=int(cut))
    return float(room.time_s.min()), placed


def best_of(instance: Instance) -> tuple[float, Placed]:
    """Time and plan of the fastest plan of all; opens every room.

    Raises:
        BadRequest: nothing fits.
    """
    found = min(best_of_room(instance.rooms.open(row), row) for row in range(len(instance.rows)))
    if not np.isfinite(found[0]):
        raise BadRequest(f"{instance.name}: nothing fits")
    return found


def in_words(instance: Instance, placed: Placed) -> str:
    """``tp 8, ..., 1f1b; tensor/full; time``: the row, what each group does, the cut."""
    sizes = dict(zip(ROW_DECISIONS, instance.rows[placed.row].tolist(), strict=True))
    schedule = tuple(ScheduleName)[sizes.pop("schedule")].value
    row = [f"{name} {size}" for name, size in sizes.items()] + [schedule]
    chosen = [instance.variants[number] for number in placed.variants]
    groups = [f"{variant.sharding}/{variant.recompute.value}" for variant in chosen]
    return f"{', '.join(row)}; {', '.join(groups)}; {CUTS[placed.cut]}"
