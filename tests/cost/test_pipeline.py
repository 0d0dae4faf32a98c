"""The simulated schedules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost.pipeline import (
    _simulate,
    closed_form_s,
    finish_times_s,
    step_lower_bound_s,
)
from meshwright.plans.plan import ScheduleName

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


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_steady_state_shortcut_is_exact(data: st.DataObject) -> None:
    """Counting micro-batches gives what simulating every one gives."""
    stages = data.draw(st.integers(2, 5))
    durations = st.lists(st.integers(1, 9).map(float), min_size=stages, max_size=stages)
    forward_s, backward_s = data.draw(durations), data.draw(durations)
    transfer_s = float(data.draw(st.integers(0, 12)))
    schedule = data.draw(st.sampled_from(ScheduleName))
    count = data.draw(st.integers(1, 120))
    there = {(s, s + 1): transfer_s for s in range(stages - 1)}
    back = {(s + 1, s): transfer_s for s in range(stages - 1)}

    full = _simulate(schedule, forward_s, backward_s, count, there, back).finish_s

    assert pytest.approx(full) == finish_times_s(
        schedule,
        forward_s=forward_s,
        backward_s=backward_s,
        num_microbatches=count,
        forward_transfer_s=there,
        backward_transfer_s=back,
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_schedule_beats_the_bound(data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, 5))
    durations = st.lists(st.floats(0.1, 9), min_size=stages, max_size=stages)
    forward_s, backward_s = data.draw(durations), data.draw(durations)
    count = data.draw(st.integers(1, 30))

    bound_s = step_lower_bound_s(forward_s, backward_s, count)

    for schedule in ScheduleName:
        assert bound_s <= end_s(schedule, forward_s, backward_s, count) * (1 + 1e-9)


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
