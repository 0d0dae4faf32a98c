"""The rows, variants and groups of a search context.

A row says what all segments of a plan share. ZeRO shards over ``dp_shard`` ranks, so a row without
ZeRO has ``dp_shard`` 1; a pipeline that is cut into one micro-batch runs alike under all schedules
and has one row. A row without tensor parallelism calls its only way of sharding what rows with it
call ``tensor``, so that both fill the same columns of a room.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from meshwright.env.instance import (
    CUTS,
    MAX_CANDIDATES,
    MAX_GROUPS,
    ROW_DECISIONS,
    FloatArray,
    IntArray,
    Variant,
    checked_rows,
)
from meshwright.plans.plan import Recompute, ScheduleName
from meshwright.plans.runnable import RUNNABLE_SCHEDULES
from meshwright.space.decision import Sharding, Skeleton, Strategy
from meshwright.space.search import SearchContext
from meshwright.space.skeletons import WITH_RING, shardings_for, skeletons, strategies_for

__all__ = [
    "SCHEDULES",
    "cuts_of",
    "groups_of",
    "num_groups_for",
    "rows_of",
    "skeleton_of",
    "strategies_of",
    "thinned",
    "variants_of",
]

SCHEDULES = tuple(ScheduleName)
"""By the code of a row's last column."""

_USEFUL = ("plain", "tensor", "tensor+sequence")
"""Ways of sharding a variant may have, with a ring or not."""

_COLUMN = {name: place for place, name in enumerate(ROW_DECISIONS)}


def rows_of(context: SearchContext) -> IntArray:
    """(K, D) every row the pins allow; none where there is no plan at all."""
    found: list[tuple[int, ...]] = []
    keeps = any(pin.zero_stage for pin in context.pins.modules)
    stages_of: dict[bool, tuple[int, ...]] = {}
    for skeleton in skeletons(context):
        sizes = skeleton.sizes
        is_sharded = sizes["dp_shard"] > 1
        if is_sharded not in stages_of:
            used = {strategy.zero_stage for strategy in strategies_for(context, skeleton)}
            stages_of[is_sharded] = tuple(sorted(used))
        ways = sizes["dp_replicate"] * sizes["dp_shard"]
        for schedule in _schedules(context, skeleton):
            for zero_stage in stages_of[is_sharded]:
                shard = sizes["dp_shard"] if zero_stage or keeps else 1
                found.append(
                    (
                        *(sizes["tp"], sizes["cp"], sizes["ep"], skeleton.num_stages),
                        *(ways, shard, zero_stage, skeleton.num_microbatches),
                        SCHEDULES.index(schedule),
                    )
                )
    return checked_rows(found)


def _schedules(context: SearchContext, skeleton: Skeleton) -> Iterator[ScheduleName]:
    """Schedules with one stage on each group of devices, where they differ."""
    wanted = context.pins.schedule
    every: tuple[ScheduleName, ...] = (ScheduleName.ONE_F_ONE_B,)
    if skeleton.num_stages == 1:
        pass
    elif wanted is not None:
        every = (wanted,)
    elif skeleton.num_microbatches > 1:
        every = tuple(reversed(RUNNABLE_SCHEDULES))
        if context.allow_unrunnable:
            every = (*every, ScheduleName.ZB_H1)
    yield from (one for one in every if one is not ScheduleName.INTERLEAVED)


def thinned(rows: IntArray, estimate_s: FloatArray, max_rows: int) -> IntArray:
    """Numbers of at most ``max_rows`` rows, ascending: three quarters the best, others spread.

    No decision keeps more than ``MAX_CANDIDATES`` values.

    Args:
        rows: (K, D).
        estimate_s: (K,) smaller is better.
        max_rows: at least 4.
    """
    order = np.argsort(estimate_s, kind="stable")
    for column in range(rows.shape[1]):
        values = list(dict.fromkeys(rows[order, column].tolist()))[:MAX_CANDIDATES]
        order = order[np.isin(rows[order, column], values)]
    if len(order) <= max_rows:
        return np.sort(order)
    num_best = 3 * max_rows // 4
    spread = np.linspace(num_best, len(order) - 1, max_rows - num_best).astype(np.int64)
    return np.sort(np.concatenate([order[:num_best], order[spread]]))


def skeleton_of(context: SearchContext, row: Sequence[int]) -> Skeleton:
    """The skeleton of a row."""
    of = {name: int(row[place]) for name, place in _COLUMN.items()}
    return Skeleton.of(
        {
            "dp_replicate": of["dp"] // of["dp_shard"],
            "dp_shard": of["dp_shard"],
            **{axis: of[axis] for axis in ("cp", "ep", "tp")},
        },
        num_stages=of["pp"],
        num_microbatches=of["num_microbatches"],
        schedule=SCHEDULES[of["schedule"]],
        communication=context.pins.communication,
    )


# Variants ----------------------------------------------------------------------------------------


def variants_of(context: SearchContext, rows: IntArray) -> tuple[Variant, ...]:
    """What segments may do on some of the rows, without what the pins forbid."""
    names: dict[str, None] = {}
    seen: set[tuple[bool, bool]] = set()
    columns = [_COLUMN["tp"], _COLUMN["cp"]]
    # Widest first, so that "tensor" precedes what only some rows have.
    for row in rows[np.lexsort(rows[:, columns].T)][::-1]:
        kind = (bool(row[columns[0]] > 1), bool(row[columns[1]] > 1))
        if kind not in seen:
            seen.add(kind)
            names |= dict.fromkeys(_shardings(context, skeleton_of(context, row)))
    asked = context.pins.recompute
    return tuple(
        Variant(sharding=name, recompute=recompute)
        for name in names
        for recompute in Recompute
        if asked in (None, recompute)
    )


def _shardings(context: SearchContext, skeleton: Skeleton) -> dict[str, Sharding]:
    """By the name a variant has for it."""
    return {
        sharding.name.replace("plain", "tensor"): sharding
        for sharding in shardings_for(context, skeleton)
        if sharding.name.removesuffix(WITH_RING) in _USEFUL
    }


def strategies_of(
    context: SearchContext, row: Sequence[int], variants: Sequence[Variant]
) -> Mapping[int, Strategy]:
    """By the number of the variant what it means on a row; without those the row has not."""
    by_name = _shardings(context, skeleton_of(context, row))
    found: dict[int, Strategy] = {}
    for number, variant in enumerate(variants):
        if variant.sharding in by_name:
            strategy = Strategy(
                sharding=by_name[variant.sharding],
                zero_stage=int(row[_COLUMN["zero_stage"]]),
                recompute=variant.recompute,
            )
            if context.allows_strategy(strategy):
                found[number] = strategy
    return found


# Groups ------------------------------------------------------------------------------------------


def num_groups_for(num_classes: int, num_variants: int, num_cuts: int, max_plans: int) -> int:
    """As many groups as a room of ``max_plans`` allows, at least 1."""
    count = min(MAX_GROUPS, num_classes)
    while count > 1 and num_variants**count * num_cuts > max_plans:
        count -= 1
    return count


def groups_of(
    context: SearchContext, weight_of_class: FloatArray, num_groups: int
) -> tuple[tuple[int, ...], ...]:
    """Segment classes of each group, in the order of their first segments.

    The heaviest classes own a group; every other one joins that whose owner has most dimension
    classes in common with it, the heavier where several have.
    """
    classes = context.model.segment_classes
    first = {number: place for place, number in reversed(list(enumerate(classes)))}
    labels = {
        number: frozenset(context.model.labels.by_segment[place]) for number, place in first.items()
    }
    order = sorted(first, key=lambda number: (-weight_of_class[number], first[number]))
    owners = order[:num_groups]
    members: dict[int, list[int]] = {owner: [owner] for owner in owners}
    for number in order[num_groups:]:
        own = labels[number]
        alike = [len(own & labels[o]) / max(len(own | labels[o]), 1) for o in owners]
        members[owners[int(np.argmax(alike))]].append(number)
    groups = [tuple(sorted(found, key=first.__getitem__)) for found in members.values()]
    return tuple(sorted(groups, key=lambda group: first[group[0]]))


def cuts_of(rows: IntArray) -> int:
    """How many of ``CUTS`` rows have to choose from: one where no row has a pipeline."""
    return len(CUTS) if bool((rows[:, _COLUMN["pp"]] > 1).any()) else 1
