"""The price of a finished plan: its parts' sum, times what measured steps say of such steps.

Searches compare sums of parts, thousands a second; what is shown, kept and compared last is
corrected. The correction is a cause of its own in the breakdown, seconds that may be below zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from meshwright.cluster.model import Device
from meshwright.cost.choice import CORRECTION_CAUSE, Choice, StepCost
from meshwright.cost.columns import FORWARD, PROLOGUE, FloatArray, IntArray
from meshwright.cost.pricing import Correction, StepShape
from meshwright.cost.step import StepPricer
from meshwright.cost.table import CostTable
from meshwright.cost.work import Family

__all__ = ["busiest_group", "corrected", "has_one_graph", "runs_of_kinds", "step_shape"]

_NONE = Correction(factor=1.0, trust=0.0, log_half_width=0.0)


def corrected(
    pricer: StepPricer, tables: Sequence[CostTable], choice: Choice, cost: StepCost
) -> StepCost:
    """``cost`` with its correction; as it is where the pricing has none.

    A step with unlike stages or token slices is unlike all that was measured.

    Args:
        pricer: of the cost model.
        tables: one for each stage.
        choice: what is decided.
        cost: the sum of its parts.
    """
    corrector = pricer.pricing.steps
    if corrector is None or cost.correction is not None:
        return cost
    found = _NONE
    if has_one_graph(choice):
        found = corrector.step(step_shape(pricer, tables[0], choice, cost))
    more_s = (found.factor - 1) * cost.time_s
    return replace(
        cost, breakdown_s={**cost.breakdown_s, CORRECTION_CAUSE: more_s}, correction=found
    )


def has_one_graph(choice: Choice) -> bool:
    """Whether one set of operators stands for the step: like stages, whole sequences."""
    return not (choice.stage_splits or any(choice.batch_shares) or choice.token_slices)


def step_shape(pricer: StepPricer, table: CostTable, choice: Choice, cost: StepCost) -> StepShape:
    """What the step of a choice with ``has_one_graph`` is made of."""
    group, device = busiest_group(pricer, table, choice)
    roofline = pricer.rooflines[device.name]
    work, rows = table.operator_work(choice.split, roofline)
    times = table.times_of_kinds(choice.split, roofline, pricer.prices)
    weight = runs_of_kinds(table, choice, group)[rows]
    split = choice.split
    return StepShape(
        breakdown_s=cost.breakdown_s,
        family_s=np.asarray(
            np.bincount(work.family, weight * times.device_s[rows], len(Family)), np.float64
        ),
        num_runs=float(weight.sum()),
        peak_flop_per_s=roofline.peak_flop_per_s,
        memory_bytes_per_s=device.memory_bytes_per_s,
        num_devices=choice.num_devices,
        tp=split.sizes.get("tp", 1),
        num_stages=len(choice.starts),
        num_microbatches=split.num_microbatches,
    )


def busiest_group(pricer: StepPricer, table: CostTable, choice: Choice) -> tuple[int, Device]:
    """The device group with the most work, and the type that decides how long it takes."""
    own_s = pricer.work(table, choice).own_s(choice.split.num_microbatches)
    group = int(np.argmax(own_s.reshape(-1, choice.num_groups).sum(axis=0)))
    devices = [
        pricer.device_of_stage(*place)[0]
        for stage, place in enumerate(choice.places)
        if stage % choice.num_groups == group
    ]
    return group, min(devices, key=lambda device: pricer.rooflines[device.name].flop_per_s)


def runs_of_kinds(table: CostTable, choice: Choice, group: int) -> FloatArray:
    """(kinds,) how often a device of the group runs a node of each kind in one step."""
    nodes, kind_of_node = table.columns.nodes, table.kinds.kind_of_node
    num_stages = len(choice.starts)
    in_group = np.arange(num_stages) % choice.num_groups == group
    own = int(in_group.sum())
    mine = in_group[choice.stage_of(table.num_segments)]
    in_segment = (nodes.segment >= 0) & mine[nodes.segment]
    again = table.activations(choice.policies).recomputed

    def runs(rows: IntArray) -> FloatArray:
        return np.bincount(kind_of_node[rows], minlength=table.kinds.count).astype(np.float64)

    each = np.flatnonzero(in_segment & (nodes.phase != PROLOGUE))
    free = np.flatnonzero((nodes.segment < 0) & (nodes.phase == FORWARD))
    once = np.flatnonzero(nodes.phase == PROLOGUE)
    in_step = runs(each) + runs(again[in_segment[again]]) + own * runs(free)
    return choice.split.num_microbatches * in_step + own * runs(once)
