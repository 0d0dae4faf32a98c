"""Which ranks, which payloads: what is counted before anything is timed."""

from __future__ import annotations

import itertools

import pytest

from meshwright.errors import BadRequest
from meshwright.profiling.sweeps import (
    GroupShape,
    buffer_elements,
    groups_of,
    shapes_for,
    sizes_between,
)


def test_strided_groups_interleave() -> None:
    found = groups_of(8, GroupShape(size=2, stride=2))

    assert ((0, 2), (1, 3), (4, 6), (5, 7)) == found


@pytest.mark.parametrize("num_ranks", [2, 4, 6, 12, 16])
def test_groups_of_every_shape_hold_every_rank_once(num_ranks: int) -> None:
    shapes = shapes_for(num_ranks)

    for shape in shapes:
        groups = groups_of(num_ranks, shape)
        assert list(range(num_ranks)) == sorted(rank for group in groups for rank in group)
        assert {shape.size} == {len(group) for group in groups}
        assert {shape.stride} == {b - a for group in groups for a, b in itertools.pairwise(group)}


def test_shapes_of_four_ranks() -> None:
    """Pairs of neighbors, pairs two apart, and all: the axes of meshes 2 x 2 and 4."""
    expected = (
        GroupShape(size=2, stride=1),
        GroupShape(size=2, stride=2),
        GroupShape(size=4, stride=1),
    )

    assert expected == shapes_for(4)
    assert expected[1:2] == shapes_for(4, sizes=(2,), strides=(2,))


@pytest.mark.parametrize(("sizes", "strides"), [((3,), None), ((4,), (2,)), ((1,), None)])
def test_groups_that_do_not_split_the_ranks_are_refused(
    sizes: tuple[int, ...], strides: tuple[int, ...] | None
) -> None:
    with pytest.raises(BadRequest, match="do not split 4 ranks; give sizes"):
        shapes_for(4, sizes=sizes, strides=strides)


@pytest.mark.parametrize(
    ("op", "sent", "got"),
    [
        ("all_reduce", 256, 256),
        ("broadcast", 256, 256),
        ("send_recv", 256, 256),
        ("all_gather", 64, 256),
        ("reduce_scatter", 256, 64),
        ("all_to_all", 256, 256),
    ],
)
def test_a_payload_of_1024_bytes_is_the_whole_of_256_floats(op: str, sent: int, got: int) -> None:
    """Four ranks: a gathered output or a scattered input is the full payload, a share a quarter."""
    assert (sent, got) == buffer_elements(op, 1024, size=4, item_bytes=4)


def test_payloads_are_rounded_up_to_equal_shares() -> None:
    """1000 bytes of 4 among 3 ranks: 84 elements each, 252 in all."""
    assert (84, 252) == buffer_elements("all_gather", 1000, size=3, item_bytes=4)
    assert (250, 250) == buffer_elements("all_reduce", 1000, size=3, item_bytes=4)


def test_sizes_are_powers_of_two() -> None:
    assert (1024, 2048, 4096) == sizes_between(1000, 5000)


def test_a_range_without_a_power_of_two_is_refused() -> None:
    with pytest.raises(BadRequest, match="no power of two from 4 B to 1 TiB lies between 5 and 7"):
        sizes_between(5, 7)
