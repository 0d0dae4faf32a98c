"""What each stage does in a step, in order: the instruction list of every schedule.

* GPipe (arXiv 1811.06965) runs every forward, then every backward.
* 1F1B (PipeDream-Flush, arXiv 2006.09503) runs some forwards to fill the pipeline, then alternates
  one backward and one forward. A stage with ``d`` stages on the longest path from it to an end of
  the stage graph, itself included, runs ``d`` forwards ahead, so that never more than
  ``min(d, M)`` micro-batches are in flight; on a chain ``d = S - s``.
* Interleaved 1F1B (arXiv 2104.04473) gives each of P device groups k stages, stage i to group
  ``i mod P``, and takes micro-batches in rounds of P. Group p runs ``2 (P - p - 1) + (k - 1) P``
  forwards ahead.
* ZB-H1 (arXiv 2401.10241) is 1F1B with the backward in two: B makes the gradients of what came in,
  W those of parameters. The W of a stage lag behind its B by ``D - d`` micro-batches, D the largest
  ``d``, so that every stage holds at most ``min(D, M)`` micro-batches whose W has not run: the
  peak of 1F1B's first stage.

GPipe, 1F1B and ZB-H1 never deadlock on a DAG of stages in topological order. Put F_s(m) at
``2 m - d + 1`` and B_s(m) at ``2 m + d``: both orders of a stage rise along these numbers, and so
does every dependency, since ``d`` falls along each edge. A W waits for nothing but its own B.
Interleaved 1F1B does not on a chain of stages, and so on any DAG whose edges go to later stages.
Sends must not block; receives may.

Micro-batches go backward in ascending order, so that sums over them are taken in the same order
under every schedule.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

from meshwright.errors import PlanRefused
from meshwright.plans.plan import ScheduleName
from meshwright.plans.runnable import RUNNABLE_SCHEDULES
from meshwright.spmd.program import Transfer

__all__ = [
    "Action",
    "Backward",
    "Forward",
    "InFlight",
    "Kind",
    "Receive",
    "Reduce",
    "ScheduledInstruction",
    "Send",
    "StageInputs",
    "Step",
    "Task",
    "actions",
    "chain",
    "depths",
    "group_order",
    "in_flight",
    "instructions",
    "num_in_flight",
    "peaks_in_flight",
]

StageInputs = Sequence[Collection[int]]
"""For each stage the earlier stages whose values it waits for."""


class Kind(IntEnum):
    """What a task computes."""

    FORWARD = 0
    BACKWARD = 1
    """Under ZB-H1 only the gradients of what came in."""
    WEIGHT = 2
    """Gradients of parameters, where the backward is split."""


class Task(NamedTuple):
    """One function of one stage on one micro-batch."""

    kind: Kind
    stage: int
    microbatch: int


class InFlight(NamedTuple):
    """How many micro-batches the stages of one device group hold at one moment."""

    forward: tuple[int, ...]
    """For each stage of the group: forward has run, backward has not."""
    put_off: tuple[int, ...]
    """For each stage of the group: backward has run, the gradients of parameters have not."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Run ``forward`` on one micro-batch."""

    microbatch: int


@dataclass(frozen=True, slots=True)
class Backward:
    """Run ``backward`` on one micro-batch, or ``backward_final`` on the last."""

    microbatch: int
    is_final: bool


@dataclass(frozen=True, slots=True)
class Reduce:
    """Exchange the gradients of tied parameters and run ``finalize_tied``."""


@dataclass(frozen=True, slots=True)
class Step:
    """Step the optimizer and run ``publish``."""


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait for one transfer of one micro-batch."""

    transfer: Transfer
    microbatch: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send one transfer of one micro-batch without waiting."""

    transfer: Transfer
    microbatch: int


Action = Forward | Backward | Reduce | Step
ScheduledInstruction = Action | Receive | Send


def chain(num_stages: int) -> tuple[tuple[int, ...], ...]:
    """``StageInputs`` of stages that each wait for the one before."""
    return tuple((stage - 1,) if stage else () for stage in range(num_stages))


def depths(stage_inputs: StageInputs) -> tuple[int, ...]:
    """For each stage the number of stages on the longest path from it, itself included.

    Raises:
        PlanRefused: a stage waits for itself or a later one.
    """
    found = [1] * len(stage_inputs)
    for stage in reversed(range(len(stage_inputs))):
        for source in stage_inputs[stage]:
            if not 0 <= source < stage:
                raise PlanRefused(
                    f"stage {stage} waits for stage {source}; order the stages so that forward "
                    "values go up"
                )
            found[source] = max(found[source], found[stage] + 1)
    return tuple(found)


def num_in_flight(
    schedule: ScheduleName,
    *,
    stage: int,
    num_stages: int,
    num_microbatches: int,
    depth: int | None = None,
) -> int:
    """Most micro-batches whose forward has run and whose backward has not, on ``stage``.

    For schedules with one stage on each device group; ``depth`` is the stage's of ``depths``, that
    of a chain where it is left out.
    """
    if schedule is ScheduleName.GPIPE:
        return num_microbatches
    return min(num_stages - stage if depth is None else depth, num_microbatches)


def group_order(
    schedule: ScheduleName,
    *,
    group: int,
    num_groups: int,
    num_microbatches: int,
    stage_inputs: StageInputs,
) -> tuple[Task, ...]:
    """What one device group computes in a step, in order; see the module docstring.

    Args:
        schedule: the schedule.
        group: which device group; it has the stages ``group``, ``group + num_groups``...
        num_groups: device groups; fewer than stages only under the interleaved schedule.
        num_microbatches: micro-batches of a step.
        stage_inputs: the stage graph.

    Raises:
        PlanRefused: the schedule does not exist for these numbers.
    """
    num_stages = len(stage_inputs)
    _check_counts(schedule, num_groups, num_stages, num_microbatches)
    if num_groups < num_stages:
        return _interleaved_order(group, num_groups, num_stages // num_groups, num_microbatches)
    ahead = depths(stage_inputs)
    lead = num_microbatches
    if schedule is not ScheduleName.GPIPE:
        lead = min(ahead[group], num_microbatches)
    lag = max(ahead) - ahead[group] if schedule is ScheduleName.ZB_H1 else None
    return tuple(_alternating(group, num_microbatches, lead, lag))


def _alternating(stage: int, num_microbatches: int, lead: int, lag: int | None) -> Iterator[Task]:
    """``lead`` forwards, then backwards and forwards by turns; W ``lag`` behind, if at all."""
    for microbatch in range(lead):
        yield Task(Kind.FORWARD, stage, microbatch)
    for microbatch in range(num_microbatches):
        yield Task(Kind.BACKWARD, stage, microbatch)
        if lag is not None and microbatch >= lag:
            yield Task(Kind.WEIGHT, stage, microbatch - lag)
        if lead + microbatch < num_microbatches:
            yield Task(Kind.FORWARD, stage, lead + microbatch)
    if lag is not None:
        for microbatch in range(max(num_microbatches - lag, 0), num_microbatches):
            yield Task(Kind.WEIGHT, stage, microbatch)


def _check_counts(
    schedule: ScheduleName, num_groups: int, num_stages: int, num_microbatches: int
) -> None:
    if num_microbatches < 1:
        raise PlanRefused(
            f"schedule {schedule}: {num_microbatches} micro-batches; set num_microbatches to 1 or "
            "more"
        )
    if num_groups == num_stages:
        return
    if schedule is not ScheduleName.INTERLEAVED or num_stages % num_groups:
        raise PlanRefused(
            f"schedule {schedule}: {num_stages} stages on {num_groups} device groups; give each "
            "group one stage, or with interleaved equally many"
        )
    if num_microbatches % num_groups:
        raise PlanRefused(
            f"schedule {schedule}: {num_microbatches} micro-batches do not divide into rounds of "
            f"{num_groups} device groups; use a multiple of {num_groups}"
        )


def _interleaved_order(
    group: int, num_groups: int, num_chunks: int, num_microbatches: int
) -> tuple[Task, ...]:
    def task(kind: Kind, number: int) -> Task:
        round_number, within = divmod(number, num_groups * num_chunks)
        chunk, position = divmod(within, num_groups)
        if kind is Kind.BACKWARD:
            chunk = num_chunks - 1 - chunk
        return Task(kind, chunk * num_groups + group, round_number * num_groups + position)

    total = num_chunks * num_microbatches
    lead = min(2 * (num_groups - group - 1) + (num_chunks - 1) * num_groups, total)
    order = [task(Kind.FORWARD, number) for number in range(lead)]
    for number in range(total):
        if lead + number < total:
            order.append(task(Kind.FORWARD, lead + number))
        order.append(task(Kind.BACKWARD, number))
    return tuple(order)


def in_flight(order: Sequence[Task]) -> tuple[InFlight, ...]:
    """What a device group holds at its worst moments, counted along its order.

    A moment is left out where another holds at least as many micro-batches of every stage.
    """
    stages = sorted({task.stage for task in order})
    place = {stage: number for number, stage in enumerate(stages)}
    forward, put_off = [0] * len(stages), [0] * len(stages)
    splits = any(task.kind is Kind.WEIGHT for task in order)
    moments: dict[InFlight, None] = {}
    for task, following in itertools.pairwise((*order, None)):
        assert task is not None
        number = place[task.stage]
        if task.kind is Kind.FORWARD:
            forward[number] += 1
        elif task.kind is Kind.BACKWARD:
            forward[number] -= 1
            put_off[number] += splits
        else:
            put_off[number] -= 1
        rises = task.kind is Kind.FORWARD or (task.kind is Kind.BACKWARD and splits)
        if rises and (following is None or following.kind is not Kind.FORWARD):
            moments[InFlight(tuple(forward), tuple(put_off))] = None

    def is_within(one: InFlight, other: InFlight) -> bool:
        held, most = (*one.forward, *one.put_off), (*other.forward, *other.put_off)
        return one != other and all(a <= b for a, b in zip(held, most, strict=True))

    return tuple(m for m in moments if not any(is_within(m, other) for other in moments))


def peaks_in_flight(
    schedule: ScheduleName,
    *,
    num_groups: int,
    num_microbatches: int,
    stage_inputs: tuple[tuple[int, ...], ...],
) -> tuple[tuple[InFlight, ...], ...]:
    """``in_flight`` of every device group; arguments as for ``group_order``.

    Once the pipeline is full a group holds no more than before, so of many micro-batches only some
    are counted; GPipe holds them all.

    Raises:
        PlanRefused: the schedule does not exist for these numbers.
    """
    if schedule is ScheduleName.GPIPE:
        _check_counts(schedule, num_groups, len(stage_inputs), num_microbatches)
        return ((InFlight((num_microbatches,), (0,)),),) * num_groups
    if num_groups < len(stage_inputs):
        enough = 4 * num_groups + num_microbatches % num_groups
    else:
        enough = 3 * max(depths(stage_inputs))
    return _peaks(schedule, num_groups, min(num_microbatches, enough), stage_inputs)


@lru_cache(maxsize=1024)
def _peaks(
    schedule: ScheduleName,
    num_groups: int,
    num_microbatches: int,
    stage_inputs: tuple[tuple[int, ...], ...],
) -> tuple[tuple[InFlight, ...], ...]:
    return tuple(
        in_flight(
            group_order(
                schedule,
                group=group,
                num_groups=num_groups,
                num_microbatches=num_microbatches,
                stage_inputs=stage_inputs,
            )
        )
        for group in range(num_groups)
    )


def actions(
    schedule: ScheduleName,
    *,
    stage: int,
    num_stages: int,
    num_microbatches: int,
    depth: int | None = None,
) -> tuple[Action, ...]:
    """The computations of one step of ``stage`` as the runtime runs them, in order.

    Args:
        schedule: ``gpipe`` or ``1f1b``: a process runs one stage, whose backward is one function.
        stage: which stage.
        num_stages: stages of the plan.
        num_microbatches: micro-batches of a step.
        depth: the stage's of ``depths``; that of a chain where it is left out.

    Raises:
        PlanRefused: if there is no micro-batch, the stage does not exist, or the runtime does not
            run the schedule.
    """
    _check_counts(schedule, num_stages, num_stages, num_microbatches)
    if not 0 <= stage < num_stages:
        raise PlanRefused(f"schedule {schedule}: no stage {stage} among {num_stages}; mend stages")
    if schedule not in RUNNABLE_SCHEDULES:
        raise PlanRefused(
            f"schedule {schedule}: the runtime cannot run it; use {' or '.join(RUNNABLE_SCHEDULES)}"
        )
    lead = num_in_flight(
        schedule,
        stage=stage,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        depth=depth,
    )
    order: list[Action] = [
        Forward(task.microbatch)
        if task.kind is Kind.FORWARD
        else Backward(task.microbatch, is_final=task.microbatch == num_microbatches - 1)
        for task in _alternating(stage, num_microbatches, lead, None)
    ]
    return (*order, Reduce(), Step())


def instructions(
    schedule: ScheduleName,
    *,
    stage: int,
    num_stages: int,
    num_microbatches: int,
    incoming: Sequence[Transfer],
    outgoing: Sequence[Transfer],
    depth: int | None = None,
) -> tuple[ScheduledInstruction, ...]:
    """``actions`` with every transfer received just before its use and sent once it is made.

    Raises:
        PlanRefused: if a transfer runs against the order of the stages, which would deadlock.
    """
    for transfer in (*incoming, *outgoing):
        _check_direction(transfer)
    order: list[ScheduledInstruction] = []
    for action in actions(
        schedule,
        stage=stage,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        depth=depth,
    ):
        if not isinstance(action, Forward | Backward):
            order.append(action)
            continue
        phase = "forward" if isinstance(action, Forward) else "backward"
        order += [Receive(t, action.microbatch) for t in incoming if t.target_phase == phase]
        order.append(action)
        order += [Send(t, action.microbatch) for t in outgoing if t.source_phase == phase]
    return tuple(order)


def _check_direction(transfer: Transfer) -> None:
    """Forward values go up or are used in the backward; gradients go down."""
    phases = (transfer.source_phase, transfer.target_phase)
    goes_up = transfer.target_stage > transfer.source_stage
    goes_down = transfer.target_stage < transfer.source_stage
    is_ordered = {
        ("forward", "forward"): goes_up,
        ("forward", "backward"): goes_up or goes_down,
        ("backward", "backward"): goes_down,
    }
    if not is_ordered.get(phases, False):
        raise PlanRefused(
            f"transfer {transfer.tag}: a {phases[0]} value of stage {transfer.source_stage} is "
            f"needed in the {phases[1]} of stage {transfer.target_stage}; order the stages so that "
            "forward values go up and gradients down"
        )
