"""Cutting segments into stages."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.space.partition import StageBytes, least_bottleneck


def bottleneck(times_s: list[float], starts: tuple[int, ...]) -> float:
    ends = (*starts[1:], len(times_s))
    return max(sum(times_s[a:b]) for a, b in zip(starts, ends, strict=True))


def test_two_stages_balance() -> None:
    """1, 1, 2: the only cut with a 2 s bottleneck is before the last."""
    assert (0, 2) == least_bottleneck([1, 1, 2], 2)


def test_every_stage_gets_a_segment() -> None:
    assert (0, 1, 2) == least_bottleneck([5, 0, 0], 3)


def test_more_stages_than_segments_is_no_partition() -> None:
    assert least_bottleneck([1, 1], 3) is None


def test_memory_moves_the_cut() -> None:
    """The first stage keeps two micro-batches in flight: one segment of 4 bytes, not two."""
    memory = StageBytes(
        fixed_bytes=[0, 0, 0, 0], kept_bytes=[4, 4, 2, 2], in_flight=[2, 1], capacity_bytes=10
    )

    assert (0, 2) == least_bottleneck([1, 1, 1, 1], 2)
    assert (0, 1) == least_bottleneck([1, 1, 1, 1], 2, memory)


def test_what_fits_nowhere_has_no_partition() -> None:
    memory = StageBytes(fixed_bytes=[11, 1], kept_bytes=[0, 0], in_flight=[1, 1], capacity_bytes=10)

    assert least_bottleneck([1, 1], 2, memory) is None


@settings(deadline=None)
@given(
    times_s=st.lists(st.floats(0, 10), min_size=1, max_size=8).filter(lambda t: max(t) > 0),
    data=st.data(),
)
def test_no_other_partition_has_a_smaller_bottleneck(
    times_s: list[float], data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(times_s)))
    best = min(
        bottleneck(times_s, (0, *cuts))
        for cuts in combinations(range(1, len(times_s)), num_stages - 1)
    )

    found = least_bottleneck(times_s, num_stages)

    assert found is not None
    assert bottleneck(times_s, found) <= best * (1 + 1e-6)
