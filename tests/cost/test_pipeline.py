"""The simulated schedules."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost.pipeline import (
    closed_form_s,
    finish_times_s,
    simulate_many,
    step_lower_bound_s,
)
from meshwright.plans.plan import ScheduleName
from meshwright.spmd.schedule import Kind, Task, chain, group_order

ONE_F_ONE_B, GPIPE = ScheduleName.ONE_F_ONE_B, ScheduleName.GPIPE


def end_s(
    schedule: ScheduleName,
    forward_s: list[float],
    backward_s: list[float],
    count: int,
    transfer_s: float = 0.0,
) -> float:
    pairs = range(len(forward_s) - 1)
    return max(
        finish_times_s(
            schedule,
            forward_s=forward_s,
            backward_s=backward_s,
            num_microbatches=count,
            forward_transfer_s={(s, s + 1): transfer_s for s in pairs},
            backward_transfer_s={(s + 1, s): transfer_s for s in pairs},
        )
    )


@pytest.mark.parametrize("schedule", [ONE_F_ONE_B, GPIPE])
@pytest.mark.parametrize(("stages", "count"), [(1, 5), (2, 1), (4, 3), (4, 16), (8, 2000)])
def test_equal_stages_take_the_closed_form(schedule: ScheduleName, stages: int, count: int) -> None:
    """(M + S - 1) (f + b)."""
    assert pytest.approx((count + stages - 1) * 3.0) == end_s(
        schedule, [1.0] * stages, [2.0] * stages, count
    )


def test_naive_placement_is_a_sum() -> None:
    """One micro-batch walks there and back: nothing overlaps."""
    assert pytest.approx(1 + 2 + 3 + 4 + 5 + 6) == end_s(GPIPE, [1, 2, 3], [4, 5, 6], 1)


def test_transfers_delay_the_only_microbatch() -> None:
    """Two stages: there and back, half a second each way."""
    assert pytest.approx(2 * 3.0 + 1.0) == end_s(ONE_F_ONE_B, [1, 1], [2, 2], 1, transfer_s=0.5)


def test_a_value_that_skips_a_stage_is_waited_for() -> None:
    """Stage 0's value reaches stage 2 at 1 + 5 s, long after stage 1's at 2 s."""
    finish = finish_times_s(
        ONE_F_ONE_B,
        forward_s=[1, 1, 1],
        backward_s=[1, 1, 1],
        num_microbatches=1,
        forward_transfer_s={(0, 2): 5.0},
        backward_transfer_s={},
    )

    assert (10.0, 9.0, 8.0) == finish


def exhaustively_s(
    schedule: ScheduleName,
    times_s: dict[Kind, list[float]],
    orders: list[tuple[Task, ...]],
    forward_s: dict[tuple[int, int], float],
    backward_s: dict[tuple[int, int], float],
) -> tuple[float, ...]:
    """When each group ends: tasks are timed again and again until nothing changes."""
    end: dict[Task, float] = dict.fromkeys(itertools.chain(*orders), 0.0)
    changed = True
    while changed:
        changed = False
        for tasks in orders:
            clock = 0.0
            for task in tasks:
                way = {Kind.FORWARD: forward_s, Kind.BACKWARD: backward_s}.get(task.kind, {})
                arrivals = [
                    end[task._replace(stage=source)] + seconds
                    for (source, target), seconds in way.items()
                    if target == task.stage
                ]
                clock = max([clock, *arrivals]) + times_s[task.kind][task.stage]
                changed |= clock != end[task]
                end[task] = clock
    return tuple(end[tasks[-1]] for tasks in orders)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_steady_state_shortcut_is_exact(data: st.DataObject) -> None:
    """Counting micro-batches gives what timing every one gives, under every schedule."""
    schedule = data.draw(st.sampled_from(ScheduleName))
    groups = data.draw(st.integers(2, 4))
    chunks = data.draw(st.integers(2, 3)) if schedule is ScheduleName.INTERLEAVED else 1
    stages = groups * chunks
    durations = st.lists(st.integers(1, 9).map(float), min_size=stages, max_size=stages)
    forward_s, rest_s, weight_s = data.draw(durations), data.draw(durations), data.draw(durations)
    transfer_s = float(data.draw(st.integers(0, 12)))
    count = groups * data.draw(st.integers(1, 60))
    there = {(s, s + 1): transfer_s for s in range(stages - 1)}
    back = {(s + 1, s): transfer_s / 2 for s in range(stages - 1)}
    backward_s = [b + w for b, w in zip(rest_s, weight_s, strict=True)]
    orders = [
        group_order(
            schedule,
            group=group,
            num_groups=groups,
            num_microbatches=count,
            stage_inputs=chain(stages),
        )
        for group in range(groups)
    ]
    whole = rest_s if schedule is ScheduleName.ZB_H1 else backward_s
    times_s = {Kind.FORWARD: forward_s, Kind.BACKWARD: whole, Kind.WEIGHT: weight_s}

    expected = exhaustively_s(schedule, times_s, orders, there, back)

    assert pytest.approx(expected, rel=1e-11) == finish_times_s(
        schedule,
        forward_s=forward_s,
        backward_s=backward_s,
        weight_s=weight_s,
        num_microbatches=count,
        forward_transfer_s=there,
        backward_transfer_s=back,
        num_groups=groups,
    )


@pytest.mark.parametrize("count", [3, 200])
def test_parallel_towers_do_not_wait_for_one_another(count: int) -> None:
    """Towers of 1 + 2 s side by side, then a head of 1 + 1 s: the towers are the bottleneck.

    Stage 2 gets its first values at 1 s, and each tower is busy from its start to its end but for
    the 2 s in which the head handles the first micro-batch; as a chain of three there are 5.
    """
    towers_s = finish_times_s(
        ONE_F_ONE_B,
        forward_s=[1, 1, 1],
        backward_s=[2, 2, 1],
        num_microbatches=count,
        forward_transfer_s={},
        backward_transfer_s={},
        stage_inputs=((), (), (0, 1)),
    )

    assert pytest.approx(3 * count + 1) == towers_s[0] == towers_s[1]
    assert towers_s[0] < end_s(ONE_F_ONE_B, [1, 1, 1], [2, 2, 1], count)


def test_a_backward_waits_for_a_forward_value_of_another_stage() -> None:
    """Stage 1's forward ends at 2 s, its value reaches stage 0's backward 5 s later."""
    finish = finish_times_s(
        GPIPE,
        forward_s=[1, 1],
        backward_s=[1, 1],
        num_microbatches=1,
        forward_transfer_s={},
        backward_transfer_s={},
        late_transfer_s={(1, 0): 5.0},
    )

    assert (8.0, 3.0) == finish


def bubble_s(schedule: ScheduleName, stages: int, count: int, chunks: int = 1) -> float:
    """Idle seconds of a group with F = B = W = 1 s on each micro-batch."""
    each = [1 / chunks] * (stages * chunks)
    finish = finish_times_s(
        schedule,
        forward_s=each,
        backward_s=[2 * s for s in each],
        weight_s=each,
        num_microbatches=count,
        forward_transfer_s={},
        backward_transfer_s={},
        num_groups=stages,
    )
    return max(finish) - 3 * count


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_bubbles_are_the_published_ones(stages: int) -> None:
    """Over the work of 3 M s: (S - 1) / M, (S - 1) / (k M), and a third of 1F1B's for ZB-H1."""
    count = 4 * stages
    plain = (stages - 1) / count

    assert pytest.approx(plain) == bubble_s(GPIPE, stages, count) / (3 * count)
    assert pytest.approx(plain) == bubble_s(ONE_F_ONE_B, stages, count) / (3 * count)
    for chunks in (2, 4):
        interleaved = bubble_s(ScheduleName.INTERLEAVED, stages, count, chunks)
        assert pytest.approx(plain / chunks) == interleaved / (3 * count)
    assert pytest.approx(plain / 3) == bubble_s(ScheduleName.ZB_H1, stages, count) / (3 * count)


def test_zb_h1_of_two_stages_by_hand() -> None:
    """F = B = W = 1 s, three micro-batches; a dot is idle.

    Stage 0: F0 F1 .  B0 W0 F2 B1 W1 B2 W2
    Stage 1: .  F0 B0 F1 B1 W0 F2 B2 W1 W2
    """
    finish = finish_times_s(
        ScheduleName.ZB_H1,
        forward_s=[1, 1],
        backward_s=[2, 2],
        weight_s=[1, 1],
        num_microbatches=3,
        forward_transfer_s={},
        backward_transfer_s={},
    )

    assert (10.0, 10.0) == finish
    assert pytest.approx(12.0) == end_s(ONE_F_ONE_B, [1, 1], [2, 2], 3)


def test_token_slices_fill_the_pipeline_with_one_microbatch() -> None:
    """Slices of 1, 2 and 3 s forward, twice that backward, on three stages (arXiv 2102.07988).

    Forward: sum + (S - 1) max = 6 + 2 x 3; the backward runs the slices in descending order.
    """
    finish = finish_times_s(
        GPIPE,
        forward_s=[[1, 2, 3]] * 3,
        backward_s=[[2, 4, 6]] * 3,
        num_microbatches=1,
        forward_transfer_s={},
        backward_transfer_s={},
    )

    assert pytest.approx(12 + 24) == max(finish)
    assert pytest.approx(3 * 6 + 3 * 12) == end_s(GPIPE, [6] * 3, [12] * 3, 1)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_many_plans_at_a_time_are_timed_like_each(data: st.DataObject) -> None:
    schedule = data.draw(st.sampled_from(ScheduleName))
    groups = data.draw(st.integers(1, 4))
    chunks = 2 if schedule is ScheduleName.INTERLEAVED and groups > 1 else 1
    stages, plans = groups * chunks, data.draw(st.integers(1, 4))
    count = groups * data.draw(st.sampled_from([1, 2, 3, 20, 100]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    forward_s, backward_s = rng.uniform(1, 2, (plans, stages)), rng.uniform(2, 4, (plans, stages))
    weight_s, tail_s = rng.uniform(0, 5, (plans, stages)), rng.uniform(0, 9, (plans, groups))
    there, back = rng.uniform(0, 1, (plans, stages - 1)), rng.uniform(0, 1, (plans, stages - 1))

    found = simulate_many(
        schedule,
        forward_s=forward_s,
        backward_s=backward_s,
        weight_s=weight_s,
        num_microbatches=count,
        forward_transfer_s=there,
        backward_transfer_s=back,
        tail_s=tail_s,
        num_groups=groups,
    )

    assert (plans,) == found.shape
    for plan in range(plans):
        finish = finish_times_s(
            schedule,
            forward_s=forward_s[plan].tolist(),
            backward_s=backward_s[plan].tolist(),
            weight_s=weight_s[plan].tolist(),
            num_microbatches=count,
            forward_transfer_s={(s, s + 1): there[plan, s] for s in range(stages - 1)},
            backward_transfer_s={(s + 1, s): back[plan, s] for s in range(stages - 1)},
            num_groups=groups,
        )
        assert max(np.array(finish) + tail_s[plan]) == pytest.approx(found[plan], rel=1e-12)


@pytest.mark.parametrize("count", [3, 100])
def test_many_plans_on_a_dag(count: int) -> None:
    """Stages 0 and 1 feed 2, and 0 feeds 1: edges are (0, 1), (0, 2), (1, 2)."""
    inputs = ((), (0,), (0, 1))
    rng = np.random.default_rng(0)
    forward_s, backward_s = rng.uniform(1, 2, (5, 3)), rng.uniform(2, 4, (5, 3))
    there, back = rng.uniform(0, 4, (5, 3)), rng.uniform(0, 4, (5, 3))
    edges = ((0, 1), (0, 2), (1, 2))

    found = simulate_many(
        ONE_F_ONE_B,
        forward_s=forward_s,
        backward_s=backward_s,
        num_microbatches=count,
        forward_transfer_s=there,
        backward_transfer_s=back,
        stage_inputs=inputs,
    )

    for plan in range(5):
        finish = finish_times_s(
            ONE_F_ONE_B,
            forward_s=forward_s[plan].tolist(),
            backward_s=backward_s[plan].tolist(),
            num_microbatches=count,
            forward_transfer_s=dict(zip(edges, there[plan], strict=True)),
            backward_transfer_s={(b, a): back[plan, e] for e, (a, b) in enumerate(edges)},
            stage_inputs=inputs,
        )
        assert max(finish) == pytest.approx(found[plan], rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_schedule_beats_the_bound(data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, 5))
    durations = st.lists(st.floats(0.1, 9), min_size=stages, max_size=stages)
    forward_s, backward_s = data.draw(durations), data.draw(durations)
    count = data.draw(st.integers(1, 30))

    bound_s = step_lower_bound_s(forward_s, backward_s, count)

    for schedule in (GPIPE, ONE_F_ONE_B):
        assert bound_s <= end_s(schedule, forward_s, backward_s, count) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_split_or_interleaved_schedule_beats_its_bound(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 4))
    schedule = data.draw(st.sampled_from([ScheduleName.ZB_H1, ScheduleName.INTERLEAVED]))
    stages = 2 * groups if schedule is ScheduleName.INTERLEAVED and groups > 1 else groups
    durations = st.lists(st.floats(0.1, 9), min_size=stages, max_size=stages)
    forward_s, backward_s, weight_s = (data.draw(durations) for _ in range(3))
    count = groups * data.draw(st.integers(1, 8))
    finish = finish_times_s(
        schedule,
        forward_s=forward_s,
        backward_s=backward_s,
        weight_s=weight_s,
        num_microbatches=count,
        forward_transfer_s={},
        backward_transfer_s={},
        num_groups=groups,
    )
    bound_s = step_lower_bound_s(
        forward_s,
        backward_s,
        count,
        num_groups=groups,
        is_split=schedule is ScheduleName.ZB_H1,
    )

    assert bound_s <= max(finish) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_micro_batch_and_equal_stages_take_the_closed_form(data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, 5))
    durations = st.lists(st.floats(0.1, 9), min_size=stages, max_size=stages)
    forward_s, backward_s = data.draw(durations), data.draw(durations)
    count = data.draw(st.integers(1, 30))

    assert pytest.approx(closed_form_s(forward_s, backward_s, 1)) == end_s(
        GPIPE, forward_s, backward_s, 1
    )
    assert pytest.approx(closed_form_s([1.0] * stages, [2.0] * stages, count)) == end_s(
        ONE_F_ONE_B, [1.0] * stages, [2.0] * stages, count
    )


def test_the_bound_on_a_dag_follows_the_longest_way() -> None:
    """Towers side by side: 3 + 3 s and not 9 s for one micro-batch."""
    bound_s = step_lower_bound_s([1] * 3, [2] * 3, 1, stage_inputs=((), (), (0, 1)))

    assert 6.0 == bound_s
