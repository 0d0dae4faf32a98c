"""From a search context to an instance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from meshwright.cost.columns import sums_by
from meshwright.env.estimates import Glance, Totals, glance, totals_of
from meshwright.env.graph import graph_of
from meshwright.env.instance import Instance, IntArray
from meshwright.env.rooms import PricedRooms, StoredRooms
from meshwright.env.rows import (
    cuts_of,
    groups_of,
    num_groups_for,
    rows_of,
    thinned,
    variants_of,
)
from meshwright.errors import NoFeasiblePlan
from meshwright.space.search import SearchContext

__all__ = ["instance_of", "stored"]

MAX_ROWS = 4096
"""Rows of an instance where nothing else is asked."""

MAX_PLANS = 1024
"""Plans of a room at most; they limit the number of groups."""


def instance_of(
    context: SearchContext,
    *,
    reference: Callable[[SearchContext], float],
    name: str | None = None,
    store: bool = False,
    max_rows: int | None = None,
    max_plans: int = MAX_PLANS,
    simulate: bool = True,
) -> Instance:
    """The planning problem of a context.

    Args:
        context: what to plan.
        reference: says the step time of the best rule of thumb; where it is not finite, the best
            plan of the most promising row that fits takes its place.
        name: of the instance; by default model, batch and cluster.
        store: open every room now and keep nothing but arrays.
        max_rows: so many rows at most, of those a glance likes best and some others.
        max_plans: plans of a room at most.
        simulate: the schedules of pipelines; otherwise their closed form, faster and a percent
            off, for whoever prices the plans chosen again.

    Raises:
        NoFeasiblePlan: the pins leave no row, or nothing fits.
    """
    every = rows_of(context)
    if not len(every):
        raise NoFeasiblePlan("no mesh of this cluster respects what is fixed; fix less")
    totals = totals_of(context)
    kept = thinned(every, glance(context, totals, every).order_s, max_rows or MAX_ROWS)
    rows = every[kept]
    seen = glance(context, totals, rows)
    variants = variants_of(context, rows)
    num_cuts = cuts_of(rows)
    groups = _groups(context, totals, len(variants), num_cuts, max_plans)
    rooms = PricedRooms(
        context,
        rows=rows,
        variants=variants,
        group_classes=groups,
        num_cuts=num_cuts,
        simulate=simulate,
    )
    instance = Instance(
        name=name or f"{context.reference.reference}:{context.batch}:{context.cluster_name}",
        rows=rows,
        row_features=seen.features,
        variants=variants,
        group_classes=groups,
        num_cuts=num_cuts,
        graph=graph_of(context, totals, groups),
        reference_s=reference(context),
        rooms=rooms,
    )
    if not math.isfinite(instance.reference_s) or instance.reference_s <= 0:
        instance = replace(instance, reference_s=_promising_s(instance, seen))
    return stored(instance) if store else instance


def stored(instance: Instance) -> Instance:
    """The same with every room opened: arrays only.

    Raises:
        NoFeasiblePlan: nothing fits.
    """
    times = [instance.rooms.open(row).time_s for row in range(len(instance.rows))]
    rooms = StoredRooms(times)
    if not any(rooms.fits(row) for row in range(len(times))):
        raise NoFeasiblePlan(f"{instance.name}: no plan of {len(times)} rows fits; use more memory")
    return replace(instance, rooms=rooms)


def _groups(
    context: SearchContext, totals: Totals, num_variants: int, num_cuts: int, max_plans: int
) -> tuple[tuple[int, ...], ...]:
    """Classes weigh what they take of the time and of the memory."""
    classes: IntArray = np.array(context.model.segment_classes)
    count = int(classes.max()) + 1
    state = totals.parameter_bytes + totals.optimizer_bytes + totals.gradient_bytes
    weight = np.zeros(count)
    for amount in (totals.work_s, totals.kept_bytes, state):
        weight += sums_by(classes, amount, count) / max(float(amount.sum()), 1e-30)
    return groups_of(context, weight, num_groups_for(count, num_variants, num_cuts, max_plans))


def _promising_s(instance: Instance, seen: Glance) -> float:
    for row in np.argsort(seen.order_s, kind="stable").tolist():
        if instance.rooms.fits(row):
            return float(instance.rooms.open(row).time_s.min())
    raise NoFeasiblePlan(f"{instance.name}: nothing fits; use more devices or more memory")
