"""How long a pipeline takes: the schedule of ``spmd.schedule``, simulated event by event.

A stage runs one function at a time, in the schedule's order. The forward of micro-batch m on
stage s starts when the stage is free and every value it receives has arrived; the backward
likewise. Sends do not block. For equal stages of forward f and backward b without transfers, both
schedules take ``(M + S - 1) (f + b)``.

Once the pipeline is full every further micro-batch takes as long as the one before, so thousands of
them are counted, not simulated: when ``_STEADY_RUNS`` further micro-batches in a row lengthen
the step equally, the rest do too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from meshwright.plans.plan import ScheduleName
from meshwright.spmd.schedule import Backward, Forward, actions

__all__ = ["finish_times_s", "step_lower_bound_s"]

_STEADY_RUNS = 3
_RELATIVE_TOLERANCE = 1e-9

Transfers = Mapping[tuple[int, int], float]
"""(source stage, target stage) to the seconds one micro-batch's values take."""


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

    def simulate(count: int) -> tuple[float, ...]:
        return _simulate(
            schedule, forward_s, backward_s, count, forward_transfer_s, backward_transfer_s
        )

    few = 4 * num_stages + _STEADY_RUNS
    if num_microbatches <= few + _STEADY_RUNS:
        return simulate(num_microbatches)
    runs = [simulate(few + extra) for extra in range(_STEADY_RUNS + 1)]
    steps = [
        tuple(late - early for early, late in zip(first, second, strict=True))
        for first, second in pairwise(runs)
    ]
    scale = max(runs[-1])
    is_steady = all(
        abs(value - reference) <= _RELATIVE_TOLERANCE * scale
        for step in steps[1:]
        for value, reference in zip(step, steps[0], strict=True)
    )
    if not is_steady:
        return simulate(num_microbatches)
    rest = num_microbatches - (few + _STEADY_RUNS)
    return tuple(end + rest * step for end, step in zip(runs[-1], steps[-1], strict=True))


def step_lower_bound_s(
    forward_s: Sequence[float], backward_s: Sequence[float], num_microbatches: int
) -> float:
    """No schedule ends earlier: one micro-batch walks through, the rest wait for the slowest."""
    both = [f + b for f, b in zip(forward_s, backward_s, strict=True)]
    return sum(both) + (num_microbatches - 1) * max(both)


def _simulate(
    schedule: ScheduleName,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    num_microbatches: int,
    forward_transfer_s: Transfers,
    backward_transfer_s: Transfers,
) -> tuple[float, ...]:
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
    return tuple(clock)


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
