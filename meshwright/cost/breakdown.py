"""The time of a step by cause: the work of the busiest device group, and what it waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from meshwright.cost.calibration import DEFAULTS, Calibration
from meshwright.cost.choice import TIME_CAUSES, Choice
from meshwright.cost.columns import FloatArray
from meshwright.cost.framework import framework_breakdown_s
from meshwright.cost.pipeline import SliceTransfers, Transfers, closed_form_s, finish_times_s
from meshwright.cost.slices import sliced_transfers_s, sliced_work
from meshwright.cost.stage_work import StageWork
from meshwright.plans.plan import ScheduleName

__all__ = ["step_breakdown_s"]


def step_breakdown_s(
    choice: Choice,
    work: StageWork,
    *,
    forward_transfer_s: Transfers,
    backward_transfer_s: Transfers,
    latency_s: Callable[[int, int], float],
    simulate: bool,
    calibration: Calibration = DEFAULTS,
) -> dict[str, float]:
    """``TIME_CAUSES`` to seconds; they sum to the time of the step.

    Args:
        choice: what is decided.
        work: of every stage.
        forward_transfer_s: of what forwards make for other stages.
        backward_transfer_s: of what backwards make for other stages.
        latency_s: of the least message from one stage to another.
        simulate: run the schedule; otherwise the pipeline's closed form stands in for it.
        calibration: what the framework adds.

    Raises:
        PlanRefused: the schedule does not exist for these numbers of stages and micro-batches.
    """
    micro, num_groups = choice.split.num_microbatches, choice.num_groups
    forward, backward = work.forward, work.backward
    if choice.token_slices:
        forward, backward = sliced_work(work, choice.token_slices)
    forward_s, backward_s = _sum(forward), _sum(backward)
    weight_s = None
    if choice.schedule is ScheduleName.ZB_H1:
        whole_s = _each(backward_s)
        share = work.parts["weight"] / np.where(whole_s > 0, whole_s, 1.0)
        weight_s = (backward_s.T * np.minimum(share, 1.0)).T

    def group(amount: FloatArray) -> FloatArray:
        return np.asarray(amount.reshape(-1, num_groups).sum(axis=0))

    tail_s = group(_sum(work.tail))
    if simulate:
        # Forward values that go down are for backwards: forwards only wait for stages before.
        late = {(s, t): found for (s, t), found in forward_transfer_s.items() if s > t}
        ahead = {edge: found for edge, found in forward_transfer_s.items() if edge not in late}

        def end_s(*transfers: Transfers) -> float:
            there, back, down = (_sliced(found, choice, latency_s) for found in transfers)
            finish = _finish_s(choice, (forward_s, backward_s, weight_s), there, back, down)
            return float((finish + tail_s).max())

        transfers = (ahead, backward_transfer_s, late)
        total_s = end_s(*transfers)
        takes = any(any(found.values()) for found in transfers)
        without_s = end_s(*(dict.fromkeys(found, 0.0) for found in transfers)) if takes else total_s
    else:
        through_s = closed_form_s(
            forward_s, backward_s, micro, weight_s=weight_s, num_groups=num_groups
        )
        without_s = through_s + float(tail_s.max())
        total_s = without_s + sum(forward_transfer_s.values()) + sum(backward_transfer_s.values())
    own_s = group(micro * (_each(forward_s) + _each(backward_s))) + tail_s
    busiest = int(np.argmax(own_s))
    breakdown = dict.fromkeys(TIME_CAUSES, 0.0)
    for part, times in ((forward, micro), (backward, micro), (work.tail, 1)):
        for cause, seconds in part.items():
            breakdown[cause] += times * float(group(_each(seconds))[busiest])
    breakdown["pipeline_transfer"] = max(total_s - without_s, 0.0)
    breakdown["bubble"] = max(without_s - float(own_s[busiest]), 0.0)
    breakdown |= framework_breakdown_s(
        calibration, sum(breakdown.values()), num_microbatches=micro, num_devices=choice.num_devices
    )
    return breakdown


def _finish_s(
    choice: Choice,
    work_s: tuple[FloatArray, FloatArray, FloatArray | None],
    there: SliceTransfers,
    back: SliceTransfers,
    down: SliceTransfers,
) -> FloatArray:
    """(groups,) when each device group has done its last backward; only true edges are waited for.

    ``work_s`` is forward, backward, and the part of it that is put off.
    """
    forward_s, backward_s, weight_s = work_s
    finish = finish_times_s(
        choice.schedule,
        forward_s=forward_s.tolist(),
        backward_s=backward_s.tolist(),
        weight_s=None if weight_s is None else weight_s.tolist(),
        num_microbatches=choice.split.num_microbatches,
        forward_transfer_s=there,
        backward_transfer_s=back,
        late_transfer_s=down,
        stage_inputs=[()] * len(choice.starts),
        num_groups=choice.num_groups,
    )
    return np.array(finish)


def _sum(causes: Mapping[str, FloatArray]) -> FloatArray:
    return np.asarray(np.sum(list(causes.values()), axis=0))


def _each(amount: FloatArray) -> FloatArray:
    """(stages,) sums over slices, if there are any."""
    return amount if amount.ndim == 1 else np.asarray(amount.sum(axis=1))


def _sliced(
    transfers_s: Transfers, choice: Choice, latency_s: Callable[[int, int], float]
) -> SliceTransfers:
    if not choice.token_slices:
        return dict(transfers_s)
    latencies = {edge: latency_s(*edge) for edge in transfers_s}
    return sliced_transfers_s(transfers_s, choice.token_slices, latencies)
