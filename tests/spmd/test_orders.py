"""What device groups compute, in order, under every schedule; on chains and on DAGs of stages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import PlanRefused
from meshwright.plans.plan import ScheduleName
from meshwright.spmd.schedule import (
    InFlight,
    Kind,
    Task,
    chain,
    depths,
    group_order,
    in_flight,
    num_in_flight,
    peaks_in_flight,
)

GPIPE, ONE_F_ONE_B, INTERLEAVED, ZB_H1 = (
    ScheduleName.GPIPE,
    ScheduleName.ONE_F_ONE_B,
    ScheduleName.INTERLEAVED,
    ScheduleName.ZB_H1,
)
TWO_TOWERS = ((), (), (0, 1))
"""Stages 0 and 1 side by side feed stage 2."""


def order(schedule: ScheduleName, group: int, groups: int, count: int, stages: int | None = None):
    return group_order(
        schedule,
        group=group,
        num_groups=groups,
        num_microbatches=count,
        stage_inputs=chain(stages or groups),
    )


def written(tasks: Sequence[Task]) -> str:
    """``F0 B0 W0``; stages of an interleaved group as letters: ``Fa0 Fb0``."""
    stages = sorted({task.stage for task in tasks})
    letter = {stage: "" if len(stages) == 1 else "abcd"[n] for n, stage in enumerate(stages)}
    return " ".join(f"{'FBW'[t.kind]}{letter[t.stage]}{t.microbatch}" for t in tasks)


def peak(tasks: Sequence[Task]) -> int:
    """Most micro-batches of any stages whose forward has run and whose backward has not."""
    changes = [{Kind.FORWARD: 1, Kind.BACKWARD: -1}.get(task.kind, 0) for task in tasks]
    return max(itertools.accumulate(changes))


def test_zb_h1_of_three_stages() -> None:
    """W lags by 0, 1 and 2 micro-batches: no stage holds more than 3."""
    assert "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3" == written(order(ZB_H1, 0, 3, 4))
    assert "F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3" == written(order(ZB_H1, 1, 3, 4))
    assert "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3" == written(order(ZB_H1, 2, 3, 4))


def test_interleaved_of_two_groups_with_two_stages_each() -> None:
    """Figure 4 of arXiv 2104.04473, cut to two groups and four micro-batches."""
    first = "Fa0 Fa1 Fb0 Fb1 Fa2 Bb0 Fa3 Bb1 Fb2 Ba0 Fb3 Ba1 Bb2 Bb3 Ba2 Ba3"
    last = "Fa0 Fa1 Fb0 Bb0 Fb1 Bb1 Fa2 Ba0 Fa3 Ba1 Fb2 Bb2 Fb3 Bb3 Ba2 Ba3"

    assert first == written(order(INTERLEAVED, 0, 2, 4, stages=4))
    assert last == written(order(INTERLEAVED, 1, 2, 4, stages=4))


def test_depth_is_the_longest_way_to_an_end() -> None:
    assert (4, 3, 2, 1) == depths(chain(4))
    assert (2, 2, 1) == depths(TWO_TOWERS)
    assert (3, 1, 2, 1) == depths(((), (0,), (0,), (2,)))


def test_parallel_towers_run_equally_far_ahead() -> None:
    """On a chain of three the first stage would hold three micro-batches."""
    orders = [
        group_order(ONE_F_ONE_B, group=g, num_groups=3, num_microbatches=4, stage_inputs=TWO_TOWERS)
        for g in range(3)
    ]

    assert ["F0 F1 B0 F2 B1 F3 B2 B3"] * 2 == [written(found) for found in orders[:2]]
    assert "F0 B0 F1 B1 F2 B2 F3 B3" == written(orders[2])
    assert 2 == num_in_flight(ONE_F_ONE_B, stage=0, num_stages=3, num_microbatches=4, depth=2)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 20])
@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_peaks_are_the_published_ones(stages: int, count: int) -> None:
    """GPipe M; 1F1B min(S - s, M); ZB-H1 with what W waits for min(S, M) on every stage."""
    for stage in range(stages):
        (put_off,) = {sum(m.forward) + sum(m.put_off) for m in flights(ZB_H1, stage, stages, count)}

        assert count == peak(order(GPIPE, stage, stages, count))
        assert min(stages - stage, count) == peak(order(ONE_F_ONE_B, stage, stages, count))
        assert min(stages - stage, count) == peak(order(ZB_H1, stage, stages, count))
        assert min(stages, count) == put_off


def flights(
    schedule: ScheduleName, group: int, groups: int, count: int, stages: int | None = None
) -> tuple[InFlight, ...]:
    return in_flight(order(schedule, group, groups, count, stages))


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("groups", [2, 4, 8])
def test_interleaved_holds_the_published_number_of_chunks(groups: int, chunks: int) -> None:
    """The first group: 1 + (P - 1) / (P k) of 1F1B's P micro-batches (arXiv 2205.05198, 4.2.3)."""
    count, stages = 4 * groups, chunks * groups
    most = [
        max(sum(moment.forward) for moment in flights(INTERLEAVED, g, groups, count, stages))
        for g in range(groups)
    ]

    assert groups * chunks * (1 + (groups - 1) / (groups * chunks)) == pytest.approx(most[0])
    assert [2 * (groups - g - 1) + (chunks - 1) * groups + 1 for g in range(groups)] == most


def test_moments_of_an_interleaved_group() -> None:
    """Fa0 Fa1 Fb0 | Bb0 Fb1 | Bb1 Fa2 | ... : (2, 1) at the first backward, (3, 0) never beaten."""
    moments = flights(INTERLEAVED, 1, 2, 4, stages=4)

    assert {(2, 1), (3, 0)} == {moment.forward for moment in moments}


@st.composite
def dags(draw: st.DrawFn) -> tuple[tuple[int, ...], ...]:
    count = draw(st.integers(1, 7))
    return tuple(
        tuple(sorted(draw(st.sets(st.integers(0, stage - 1))) if stage else ()))
        for stage in range(count)
    )


def runs_to_the_end(orders: Sequence[Sequence[Task]], inputs: Sequence[Sequence[int]]) -> bool:
    """Every group takes its next task once all it waits for is done."""
    done: set[Task] = set()
    outputs = [[t for t, found in enumerate(inputs) if s in found] for s in range(len(inputs))]
    position = [0] * len(orders)
    while any(position[g] < len(orders[g]) for g in range(len(orders))):
        before = len(done)
        for group, tasks in enumerate(orders):
            while position[group] < len(tasks):
                kind, stage, microbatch = task = tasks[position[group]]
                others = {Kind.FORWARD: inputs, Kind.BACKWARD: outputs}.get(kind, [()] * 9)[stage]
                needs = {Task(kind, other, microbatch) for other in others}
                # A backward may also read what any stage's forward made.
                if kind is Kind.BACKWARD:
                    needs |= {Task(Kind.FORWARD, s, microbatch) for s in range(len(inputs))}
                if kind is Kind.WEIGHT:
                    needs.add(Task(Kind.BACKWARD, stage, microbatch))
                if not needs <= done:
                    break
                done.add(task)
                position[group] += 1
        if len(done) == before:
            return False
    return True


@settings(max_examples=150, deadline=None)
@given(
    inputs=dags(), count=st.integers(1, 9), schedule=st.sampled_from([GPIPE, ONE_F_ONE_B, ZB_H1])
)
def test_no_dag_of_stages_deadlocks(
    inputs: tuple[tuple[int, ...], ...], count: int, schedule: ScheduleName
) -> None:
    orders = [
        group_order(
            schedule, group=g, num_groups=len(inputs), num_microbatches=count, stage_inputs=inputs
        )
        for g in range(len(inputs))
    ]

    assert runs_to_the_end(orders, inputs)
    for group, tasks in enumerate(orders):
        kinds = (Kind.FORWARD, Kind.BACKWARD, *([Kind.WEIGHT] if schedule is ZB_H1 else []))
        expected = [Task(kind, group, m) for kind in kinds for m in range(count)]
        assert expected == sorted(tasks)


@settings(max_examples=60, deadline=None)
@given(groups=st.integers(2, 5), chunks=st.integers(2, 4), rounds=st.integers(1, 4))
def test_interleaving_never_deadlocks(groups: int, chunks: int, rounds: int) -> None:
    inputs = chain(groups * chunks)
    orders = [
        order(INTERLEAVED, g, groups, rounds * groups, groups * chunks) for g in range(groups)
    ]

    assert runs_to_the_end(orders, inputs)
    for group, tasks in enumerate(orders):
        expected = [
            Task(kind, stage, m)
            for kind in (Kind.FORWARD, Kind.BACKWARD)
            for stage in range(group, groups * chunks, groups)
            for m in range(rounds * groups)
        ]
        assert expected == sorted(tasks)


def test_the_check_above_sees_deadlocks() -> None:
    """Stage 0 wants its gradient before it has fed stage 1."""
    crossed = [
        [Task(Kind.BACKWARD, 0, 0), Task(Kind.FORWARD, 0, 0)],
        [Task(Kind.FORWARD, 1, 0), Task(Kind.BACKWARD, 1, 0)],
    ]

    assert not runs_to_the_end(crossed, chain(2))


@pytest.mark.parametrize("schedule", list(ScheduleName))
@pytest.mark.parametrize(("groups", "count"), [(2, 2), (2, 4), (4, 4), (4, 100), (3, 300)])
def test_peaks_of_many_micro_batches_are_those_of_some(
    schedule: ScheduleName, groups: int, count: int
) -> None:
    stages = 3 * groups if schedule is INTERLEAVED else groups
    found = peaks_in_flight(
        schedule, num_groups=groups, num_microbatches=count, stage_inputs=chain(stages)
    )

    every = [flights(schedule, group, groups, count, stages) for group in range(groups)]
    assert [set(moments) for moments in every] == [set(moments) for moments in found]


def test_refuses_what_the_schedule_cannot_do() -> None:
    with pytest.raises(PlanRefused, match="4 stages on 2 device groups; give each group one"):
        order(ONE_F_ONE_B, 0, 2, 4, stages=4)
    with pytest.raises(PlanRefused, match="3 stages on 2 device groups"):
        order(INTERLEAVED, 0, 2, 4, stages=3)
    with pytest.raises(PlanRefused, match="3 micro-batches do not divide into rounds of 2"):
        order(INTERLEAVED, 0, 2, 3, stages=4)
    with pytest.raises(PlanRefused, match="stage 0 waits for stage 1; order the stages"):
        depths(((1,), ()))
