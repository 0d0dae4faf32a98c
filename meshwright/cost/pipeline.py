"""How long a pipeline takes: the schedule of ``spmd.schedule``, simulated event by event.

A stage runs one function at a time, in the schedule's order. The forward of micro-batch m on
stage s starts when the stage is free and every value it receives has arrived; the backward
likewise. Sends do not block. For equal stages of forward f and backward b without transfers, both
schedules take ``(M + S - 1) (f + b)``.

Once the pipeline is full the schedule repeats itself after some micro-batches (as many as are in
flight on a loop of stages that waits for itself), so thousands of them are counted, not simulated:
as soon as a period is seen, whole periods are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.plans.plan import ScheduleName
from meshwright.spmd.schedule import Backward, Forward, actions

__all__ = ["closed_form_s", "finish_times_s", "step_lower_bound_s"]

_SIMULATED_PER_STAGE = 12
"""Micro-batches simulated for each stage before looking for the steady state."""

_RELATIVE_TOLERANCE = 1e-9

Transfers = Mapping[tuple[int, int], float]
"""(source stage, target stage) to the seconds one micro-batch's values take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    """When every function ended, seconds from the start of the step."""

    finish_s: tuple[float, ...]
    """Of each stage's last backward."""
    forward_end_s: NDArray[np.float64]
    """(stages, micro-batches)"""
    backward_end_s: NDArray[np.float64]
    """(stages, micro-batches)"""


def finish_times_s(
    schedule: ScheduleName,
    *,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    num_microbatches: int,
    forward_transfer_s: Transfers,
    backward_transfer_s: Transfers,
) -> tuple[float, ...]:
    """When each stage has run its last backward, seconds from the start of the step."""
    num_stages = len(forward_s)
    if num_stages == 1:
        return (num_microbatches * (forward_s[0] + backward_s[0]),)

    def simulate(count: int) -> _Times:
        return _simulate(
            schedule, forward_s, backward_s, count, forward_transfer_s, backward_transfer_s
        )

    few = _SIMULATED_PER_STAGE * num_stages
    if num_microbatches <= few + num_stages:
        return simulate(num_microbatches).finish_s
    if schedule is ScheduleName.GPIPE:
        # No stage waits for a later one while forwards run, so the period is one micro-batch.
        first, second = simulate(few).finish_s, simulate(few + 1).finish_s
        rest = num_microbatches - few
        return tuple(t + rest * (u - t) for t, u in zip(first, second, strict=True))
    found = _period(simulate(few), num_stages)
    if found is None:
        return simulate(num_microbatches).finish_s
    length, seconds = found
    rest = (num_microbatches - few) // length
    return tuple(
        end + rest * seconds for end in simulate(num_microbatches - rest * length).finish_s
    )


def _period(times: _Times, num_stages: int) -> tuple[int, float] | None:
    """After how many micro-batches the steady state repeats, and how long these take.

    Looks at the micro-batches before the pipeline drains; ``None`` where nothing repeats yet.
    """
    rows = np.concatenate([times.forward_end_s, times.backward_end_s]).T
    window = rows[-5 * num_stages : -num_stages]
    tolerance_s = _RELATIVE_TOLERANCE * float(window.max())
    for length in range(1, num_stages + 1):
        difference = window[length:] - window[:-length]
        if float(difference.max() - difference.min()) <= tolerance_s:
            return length, float(difference.mean())
    return None


def closed_form_s(
    forward_s: Sequence[float], backward_s: Sequence[float], num_microbatches: int
) -> float:
    """One micro-batch through every stage, the others through the slowest.

    Exact for equal stages and for one micro-batch; for unequal stages an estimate (Alpa, arXiv
    2201.12023, equation 2), mostly a little high.
    """
    both = [f + b for f, b in zip(forward_s, backward_s, strict=True)]
    return sum(both) + (num_microbatches - 1) * max(both)


def step_lower_bound_s(
    forward_s: Sequence[float], backward_s: Sequence[float], num_microbatches: int
) -> float:
    """No schedule ends earlier.

    Stage s waits for the first micro-batch to walk through the stages before it, works on all of
    them, and then the last one walks back; and one micro-batch alone passes every stage twice.
    """
    before_s = bound_s = 0.0
    for own_forward_s, own_backward_s in zip(forward_s, backward_s, strict=True):
        own_s = own_forward_s + own_backward_s
        bound_s = max(bound_s, before_s + num_microbatches * own_s)
        before_s += own_s
    return max(bound_s, before_s)


def _simulate(
    schedule: ScheduleName,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    num_microbatches: int,
    forward_transfer_s: Transfers,
    backward_transfer_s: Transfers,
) -> _Times:
    num_stages = len(forward_s)
    orders = [
        [
            (isinstance(action, Forward), action.microbatch)
            for action in actions(
                schedule, stage=stage, num_stages=num_stages, num_microbatches=num_microbatches
            )
            if isinstance(action, Forward | Backward)
        ]
        for stage in range(num_stages)
    ]
    sources = _sources(num_stages, forward_transfer_s, backward_transfer_s)
    done = {
        True: [[-1.0] * num_microbatches for _ in range(num_stages)],
        False: [[-1.0] * num_microbatches for _ in range(num_stages)],
    }
    clock = [0.0] * num_stages
    position = [0] * num_stages
    duration = {True: forward_s, False: backward_s}
    total = 2 * num_microbatches * num_stages
    finished = 0
    while finished < total:
        before = finished
        for stage in (*range(num_stages), *range(num_stages - 2, -1, -1)):
            order = orders[stage]
            while position[stage] < len(order):
                is_forward, microbatch = order[position[stage]]
                start = clock[stage]
                is_ready = True
                for source, seconds in sources[is_forward][stage]:
                    end = done[is_forward][source][microbatch]
                    if end < 0:
                        is_ready = False
                        break
                    start = max(start, end + seconds)
                if not is_ready:
                    break
                clock[stage] = start + duration[is_forward][stage]
                done[is_forward][stage][microbatch] = clock[stage]
                position[stage] += 1
                finished += 1
        assert finished > before, "the schedule waits for itself"
    return _Times(
        finish_s=tuple(clock),
        forward_end_s=np.array(done[True]),
        backward_end_s=np.array(done[False]),
    )


def _sources(
    num_stages: int, forward_transfer_s: Transfers, backward_transfer_s: Transfers
) -> dict[bool, list[list[tuple[int, float]]]]:
    """For forward and backward and each stage, whom it waits for and how long values travel.

    Neighbors are waited for even where nothing passes: the schedules assume a chain.
    """
    forward: list[dict[int, float]] = [
        {stage - 1: 0.0} if stage else {} for stage in range(num_stages)
    ]
    backward: list[dict[int, float]] = [
        {stage + 1: 0.0} if stage + 1 < num_stages else {} for stage in range(num_stages)
    ]
    for (source, target), seconds in forward_transfer_s.items():
        forward[target][source] = seconds
    for (source, target), seconds in backward_transfer_s.items():
        backward[target][source] = seconds
    return {
        True: [list(found.items()) for found in forward],
        False: [list(found.items()) for found in backward],
    }
