"""Token slices: the dynamic program against every way of cutting, and slices of priced plans."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meshwright.cost.model import choice_of
from meshwright.errors import BadRequest
from meshwright.plans.plan import ScheduleName
from meshwright.space.token_slices import SliceTime, best_slicing, sliced_choice
from tests.cost.graphs import zoo
from tests.cost.plans import context_of, uniform_plan


def slice_time(fixed_s: float, token_s: float, attention_s: float) -> SliceTime:
    def time_s(length: NDArray[np.float64], before: NDArray[np.float64]) -> NDArray[np.float64]:
        return fixed_s + token_s * length + attention_s * length * (before + length / 2)

    return time_s


def all_cuts(count: int) -> Iterator[tuple[int, ...]]:
    for number in range(count):
        for cuts in itertools.combinations(range(1, count), number):
            yield (0, *cuts, count)


def pipeline_s(time_s: SliceTime, cuts: tuple[int, ...], stages: int, sequences: int) -> float:
    each = [
        float(time_s(np.array(float(stop - start)), np.array(float(start))))
        for start, stop in itertools.pairwise(cuts)
    ]
    return sequences * sum(each) + (stages - 1) * max(each)


@settings(max_examples=60, deadline=None)
@given(
    fixed_s=st.floats(0.01, 3),
    token_s=st.floats(0.01, 2),
    attention_s=st.floats(0, 1),
    tokens=st.integers(1, 9),
    stages=st.integers(1, 8),
    sequences=st.integers(1, 3),
)
def test_no_other_cut_is_better(
    fixed_s: float, token_s: float, attention_s: float, tokens: int, stages: int, sequences: int
) -> None:
    """Against all 2^(T - 1) ways of cutting up to 9 tokens."""
    time_s = slice_time(fixed_s, token_s, attention_s)
    expected = min(pipeline_s(time_s, cuts, stages, sequences) for cuts in all_cuts(tokens))

    found = best_slicing(time_s, num_tokens=tokens, num_stages=stages, num_sequences=sequences)

    assert tokens == sum(found.lengths)
    assert expected == pytest.approx(found.pipeline_s, rel=1e-12)
    cuts = (0, *itertools.accumulate(found.lengths))
    assert expected == pytest.approx(pipeline_s(time_s, cuts, stages, sequences), rel=1e-12)


def test_later_slices_are_shorter() -> None:
    """Attention makes later tokens dearer.

    Without it n equal slices of two stages take n + 64 + (1 + 64 / n) s: 8 are best.
    """
    even = best_slicing(slice_time(1, 1, 0), num_tokens=64, num_stages=2)
    causal = best_slicing(slice_time(1, 1, 0.1), num_tokens=64, num_stages=17)

    assert (8,) * 8 == even.lengths
    assert sorted(causal.lengths, reverse=True) == list(causal.lengths)
    assert causal.lengths[0] > 2 * causal.lengths[-1]


def test_one_stage_needs_no_slices() -> None:
    """Every slice pays a second more, and nothing overlaps."""
    found = best_slicing(slice_time(1, 1, 0.1), num_tokens=12, num_stages=1)

    assert (12,) == found.lengths


def test_granularity() -> None:
    found = best_slicing(slice_time(0.1, 1, 0.1), num_tokens=64, num_stages=4, granularity=16)

    assert {0} == {length % 16 for length in found.lengths}
    with pytest.raises(BadRequest, match="granularity 5 does not divide 64 tokens"):
        best_slicing(slice_time(1, 1, 0), num_tokens=64, num_stages=4, granularity=5)


@pytest.mark.parametrize(("count", "gains"), [(1, True), (32, False)])
def test_slices_of_a_priced_plan(count: int, gains: bool) -> None:
    """One micro-batch on four stages gains much; 32 micro-batches of one sequence gain nothing."""
    reference = "tiny-gpt?num_layers=8&hidden=256&num_heads=4&vocab_size=64&seq_len=256"
    context = context_of(zoo(reference, 32), "4xa100-80gb", 32)
    plan = uniform_plan(context, pp=4, num_microbatches=count)
    choice = choice_of(plan, context.model.segment_classes)
    choice = replace(choice, schedule=ScheduleName.GPIPE)
    table = context.model.table([e.shard for e in plan.segments], {"micro": count})
    whole = context.model.pricer.price(table, choice)

    found, cost = sliced_choice(context.model.pricer, table, choice, num_tokens=256)

    assert cost.time_s == context.model.pricer.price(table, found).time_s <= whole.time_s
    if gains:
        assert 256 == sum(found.token_slices)
        assert cost.time_s < 0.7 * whole.time_s
    else:
        assert () == found.token_slices
