"""What each stage does in a step, in order: the instruction list of GPipe and 1F1B.

GPipe runs every forward, then every backward. 1F1B (PipeDream-Flush, arXiv 2006.09503) runs
``min(S - s, M) - 1`` forwards on stage ``s`` of ``S`` to fill the pipeline, then alternates one
forward and one backward, so that never more than ``min(S - s, M)`` micro-batches are in flight.

Both orders are correct for any DAG of stages whose forward values go from lower to higher stages
and whose gradients go back: with ``F_s(m)`` after ``F_(s-1)(m)`` and ``B_s(m)`` after
``B_(s+1)(m)`` they do not deadlock on a chain, and a transfer that skips stages asks only for an
order that this chain already implies. Sends must not block; receives may.

Micro-batches go backward in ascending order, so that sums over them are taken in the same order
under every schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.errors import PlanRefused
from meshwright.plans.plan import ScheduleName
from meshwright.spmd.program import Transfer

__all__ = [
    "Action",
    "Backward",
    "Forward",
    "Receive",
    "Reduce",
    "ScheduledInstruction",
    "Send",
    "Step",
    "actions",
    "instructions",
    "num_in_flight",
]


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


def num_in_flight(
    schedule: ScheduleName, *, stage: int, num_stages: int, num_microbatches: int
) -> int:
    """Most micro-batches whose forward has run and whose backward has not, on ``stage``."""
    if schedule is ScheduleName.GPIPE:
        return num_microbatches
    return min(num_stages - stage, num_microbatches)


def actions(
    schedule: ScheduleName, *, stage: int, num_stages: int, num_microbatches: int
) -> tuple[Action, ...]:
    """The computations of one step of ``stage``, in order; see the module docstring.

    Raises:
        PlanRefused: if there is no micro-batch, or the stage does not exist.
    """
    if num_microbatches < 1:
        raise PlanRefused(
            f"schedule {schedule}: {num_microbatches} micro-batches; set num_microbatches to 1 or "
            "more"
        )
    if not 0 <= stage < num_stages:
        raise PlanRefused(f"schedule {schedule}: no stage {stage} among {num_stages}; mend stages")
    lead = num_in_flight(
        schedule, stage=stage, num_stages=num_stages, num_microbatches=num_microbatches
    )
    order: list[Action] = [Forward(microbatch) for microbatch in range(lead)]
    for microbatch in range(num_microbatches):
        order.append(Backward(microbatch, is_final=microbatch == num_microbatches - 1))
        if lead + microbatch < num_microbatches:
            order.append(Forward(lead + microbatch))
    return (*order, Reduce(), Step())


def instructions(
    schedule: ScheduleName,
    *,
    stage: int,
    num_stages: int,
    num_microbatches: int,
    incoming: Sequence[Transfer],
    outgoing: Sequence[Transfer],
) -> tuple[ScheduledInstruction, ...]:
    """``actions`` with every transfer received just before its use and sent once it is made.

    Raises:
        PlanRefused: if a transfer runs against the order of the stages, which would deadlock.
    """
    for transfer in (*incoming, *outgoing):
        _check_direction(transfer)
    order: list[ScheduledInstruction] = []
    for action in actions(
        schedule, stage=stage, num_stages=num_stages, num_microbatches=num_microbatches
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
