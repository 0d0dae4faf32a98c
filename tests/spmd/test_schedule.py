"""Instruction lists of GPipe and 1F1B: no deadlock, order, micro-batches in flight."""

from __future__ import annotations

import itertools

import pytest

from meshwright.errors import PlanRefused
from meshwright.plans.plan import ScheduleName
from meshwright.plans.runnable import RUNNABLE_SCHEDULES
from meshwright.spmd.program import Transfer
from meshwright.spmd.schedule import (
    Backward,
    Forward,
    Receive,
    Reduce,
    Send,
    Step,
    actions,
    instructions,
    num_in_flight,
)

SIZES = [(s, m) for s in (1, 2, 3, 4, 7, 8) for m in (1, 2, 3, 4, 5, 8, 16)]


def _transfer(source: int, target: int, source_phase: str, target_phase: str, tag: int) -> Transfer:
    return Transfer(
        source_stage=source,
        target_stage=target,
        source_value=0,
        target_value=0,
        source_phase=source_phase,
        target_phase=target_phase,
        num_bytes=4,
        tag=tag,
    )


def _all_to_all_stages(num_stages: int) -> list[Transfer]:
    """Every stage feeds every later one's forward and backward, and gets both back."""
    tags = itertools.count()
    transfers = []
    for low, high in itertools.combinations(range(num_stages), 2):
        transfers.append(_transfer(low, high, "forward", "forward", next(tags)))
        transfers.append(_transfer(high, low, "backward", "backward", next(tags)))
        transfers.append(_transfer(low, high, "forward", "backward", next(tags)))
        transfers.append(_transfer(high, low, "forward", "backward", next(tags)))
    return transfers


def _simulate(schedule: ScheduleName, num_stages: int, num_microbatches: int) -> list[list[object]]:
    """Run all stages with blocking receives; returns what each did, or fails on a deadlock."""
    transfers = _all_to_all_stages(num_stages)
    programs = [
        instructions(
            schedule,
            stage=stage,
            num_stages=num_stages,
            num_microbatches=num_microbatches,
            incoming=[t for t in transfers if t.target_stage == stage],
            outgoing=[t for t in transfers if t.source_stage == stage],
        )
        for stage in range(num_stages)
    ]
    sent: set[tuple[int, int]] = set()
    position = [0] * num_stages
    while any(position[s] < len(programs[s]) for s in range(num_stages)):
        progress = False
        for stage, program in enumerate(programs):
            while position[stage] < len(program):
                item = program[position[stage]]
                if isinstance(item, Receive) and (item.transfer.tag, item.microbatch) not in sent:
                    break
                if isinstance(item, Send):
                    sent.add((item.transfer.tag, item.microbatch))
                position[stage] += 1
                progress = True
        assert progress, f"deadlock at {position}"
    return [list(program) for program in programs]


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
@pytest.mark.parametrize("schedule", RUNNABLE_SCHEDULES)
def test_never_deadlocks_with_blocking_receives(
    schedule: ScheduleName, num_stages: int, num_microbatches: int
) -> None:
    """Every message is received exactly once, by whom it was sent to."""
    done = _simulate(schedule, num_stages, num_microbatches)

    num_transfers = len(_all_to_all_stages(num_stages))
    received = [item for program in done for item in program if isinstance(item, Receive)]
    assert num_transfers * num_microbatches == len(received)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
@pytest.mark.parametrize("schedule", RUNNABLE_SCHEDULES)
def test_forward_before_backward_and_in_flight(
    schedule: ScheduleName, num_stages: int, num_microbatches: int
) -> None:
    """Each micro-batch runs once each way, in order; the count in flight is the promised one."""
    for stage in range(num_stages):
        order = actions(
            schedule, stage=stage, num_stages=num_stages, num_microbatches=num_microbatches
        )
        forwards = [a.microbatch for a in order if isinstance(a, Forward)]
        backwards = [a for a in order if isinstance(a, Backward)]
        in_flight = itertools.accumulate(
            1 if isinstance(a, Forward) else -1 for a in order if isinstance(a, Forward | Backward)
        )
        expected = num_in_flight(
            schedule, stage=stage, num_stages=num_stages, num_microbatches=num_microbatches
        )

        assert list(range(num_microbatches)) == forwards
        assert list(range(num_microbatches)) == [a.microbatch for a in backwards]
        assert [num_microbatches - 1] == [a.microbatch for a in backwards if a.is_final]
        assert expected == max(in_flight)
        for microbatch in range(num_microbatches):
            assert order.index(Forward(microbatch)) < order.index(backwards[microbatch])
        assert (Reduce(), Step()) == order[-2:]


def test_one_f_one_b_of_two_stages() -> None:
    """Stage 0 of 2 with 3 micro-batches: two forwards ahead, then alternate."""
    order = actions(ScheduleName.ONE_F_ONE_B, stage=0, num_stages=2, num_microbatches=3)

    assert (
        Forward(0),
        Forward(1),
        Backward(0, is_final=False),
        Forward(2),
        Backward(1, is_final=False),
        Backward(2, is_final=True),
        Reduce(),
        Step(),
    ) == order


def test_one_f_one_b_holds_stages_to_go() -> None:
    """min(S - s, M), by hand."""
    held = [
        num_in_flight(ScheduleName.ONE_F_ONE_B, stage=s, num_stages=4, num_microbatches=3)
        for s in range(4)
    ]

    assert [3, 3, 2, 1] == held


def test_refuses_a_forward_value_that_goes_down() -> None:
    """It could only be waited for forever."""
    backwards = _transfer(1, 0, "forward", "forward", 7)

    with pytest.raises(PlanRefused, match="transfer 7: a forward value of stage 1"):
        instructions(
            ScheduleName.GPIPE,
            stage=0,
            num_stages=2,
            num_microbatches=1,
            incoming=[backwards],
            outgoing=[],
        )


def test_refuses_no_microbatch() -> None:
    """Zero micro-batches would silently do nothing."""
    with pytest.raises(PlanRefused, match="0 micro-batches"):
        actions(ScheduleName.GPIPE, stage=0, num_stages=1, num_microbatches=0)


@pytest.mark.parametrize("schedule", [ScheduleName.INTERLEAVED, ScheduleName.ZB_H1])
def test_refuses_what_the_runtime_does_not_run(schedule: ScheduleName) -> None:
    """A process runs one stage, and its backward is one function."""
    with pytest.raises(PlanRefused, match="the runtime cannot run it; use gpipe or 1f1b"):
        actions(schedule, stage=0, num_stages=2, num_microbatches=2)
