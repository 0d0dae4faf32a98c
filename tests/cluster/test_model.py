from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster import Cluster, Device, Host, Link
from meshwright.errors import BadClusterFile, BadRequest

FAST = Link(name="fast", bytes_per_s=400e9, latency_s=1e-6, source="test")
SLOW = Link(name="slow", bytes_per_s=100e9, latency_s=2e-6, source="test")
RACK = Link(name="rack", bytes_per_s=50e9, latency_s=5e-6, source="test")
HALL = Link(name="hall", bytes_per_s=10e9, latency_s=9e-6, source="test")


def device(name: str = "big", memory_bytes: int = 1000) -> Device:
    return Device(
        name=name,
        memory_bytes=memory_bytes,
        memory_bytes_per_s=1e12,
        flop_per_s={"float32": 1e12, "bfloat16": 4e12},
        launch_latency_s=1e-6,
        source="test",
    )


def hall(*sizes: int, hosts_per_rack: int = 2) -> Cluster:
    hosts = tuple(Host(device=device(), num_devices=size, link=FAST) for size in sizes)
    return Cluster(name="hall", hosts=hosts, levels=((hosts_per_rack, RACK), (len(sizes), HALL)))


def test_devices_are_numbered_host_by_host() -> None:
    """Hosts of 2, 3 and 1: ranks 0-1, 2-4 and 5."""
    cluster = hall(2, 3, 1)

    assert 6 == cluster.num_devices
    assert [0, 0, 1, 1, 1, 2] == [cluster.host_of(rank) for rank in range(6)]
    assert range(2, 5) == cluster.devices_of_host(1)


@pytest.mark.parametrize("rank", [-1, 6])
def test_a_rank_outside_is_refused(rank: int) -> None:
    with pytest.raises(BadRequest, match=rf"no device {rank}; devices are 0 to 5"):
        hall(2, 3, 1).host_of(rank)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [([3], (0, FAST)), ([2, 4], (0, FAST)), ([4, 0], (1, RACK)), ([0, 2, 5], (2, HALL))],
)
def test_a_group_talks_over_the_lowest_level_that_holds_it(
    ranks: list[int], expected: tuple[int, Link]
) -> None:
    """Ranks 0-1 and 2-4 share a rack; rank 5 is in the other."""
    assert expected == hall(2, 3, 1).link_between(ranks)


def test_an_empty_group_has_no_link() -> None:
    with pytest.raises(BadRequest, match="empty"):
        hall(2, 3, 1).link_between([])


@given(st.data())
def test_a_superset_never_uses_a_lower_level(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=8))
    cluster = hall(*sizes)
    rank = st.integers(0, cluster.num_devices - 1)
    group = data.draw(st.lists(rank, min_size=1, max_size=6))
    more = data.draw(st.lists(rank, max_size=6))

    assert cluster.link_between(group)[0] <= cluster.link_between(group + more)[0]


def test_group_levels_count_members_by_host_and_rack() -> None:
    """Four hosts of 2 in two racks: 2 in a host, 2 hosts in a rack, 2 racks."""
    levels = hall(2, 2, 2, 2).group_levels(range(8))

    assert [(0, (2, 2, 2, 2)), (1, (2, 2)), (2, (2,))] == [
        (level.level_index, level.group_sizes) for level in levels
    ]
    assert all(level.is_uniform for level in levels)


def test_group_levels_leave_out_levels_where_nobody_meets() -> None:
    """One rank in each rack: only the hall's link is used."""
    (only,) = hall(2, 2, 2, 2).group_levels([0, 4])

    assert (2, HALL, (2,)) == (only.level_index, only.link, only.group_sizes)
    assert () == hall(2, 2, 2, 2).group_levels([5])


def test_group_levels_report_unequal_hosts() -> None:
    levels = hall(2, 3, 1).group_levels([0, 2, 3, 4])

    assert (1, 3) == levels[0].group_sizes
    assert not levels[0].is_uniform
    assert (2,) == levels[1].group_sizes


def test_the_slowest_host_link_in_use_counts() -> None:
    hosts = (
        Host(device=device(), num_devices=2, link=FAST),
        Host(device=device("small", 500), num_devices=2, link=SLOW),
    )
    cluster = Cluster(name="mixed", hosts=hosts, levels=((2, RACK),))

    assert cluster.group_levels(range(4))[0].link == SLOW
    assert cluster.group_levels([0, 1, 2])[0].link == FAST
    assert not cluster.is_homogeneous
    assert 500 == cluster.min_memory_bytes
    assert ["big", "small"] == [kind.name for kind in cluster.devices]
    assert "small" == cluster.device_of(2).name


@given(st.data())
def test_group_levels_account_for_every_member(data: st.DataObject) -> None:
    """Sizes on the lowest level used add up to the members, or to the units they stand in."""
    cluster = hall(*data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=8)))
    group = data.draw(st.sets(st.integers(0, cluster.num_devices - 1), min_size=1))
    levels = cluster.group_levels(group)
    units = len(group)
    for level in levels:
        assert units == sum(level.group_sizes)
        units = len(level.group_sizes)

    assert 1 == units
    if len(group) > 1:
        assert cluster.link_between(sorted(group))[0] == levels[-1].level_index


def test_a_dtype_without_a_unit_is_refused_with_what_there_is() -> None:
    assert 4e12 == device().peak_flop_per_s("bfloat16")
    assert 1e12 == device().peak_flop_per_s("int64")
    with pytest.raises(BadRequest, match="no peak for float8_e4m3fn; it knows bfloat16, float32"):
        device().peak_flop_per_s("float8_e4m3fn")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("memory_bytes", 0, "memory_bytes is 0"),
        ("memory_bytes_per_s", float("nan"), "memory_bytes_per_s is nan"),
        ("launch_latency_s", -1.0, "launch_latency_s is -1.0"),
        ("flop_per_s", {"bfloat16": 1e12}, "lacks 'float32'"),
        ("flop_per_s", {"float32": float("inf")}, "flop_per_s.float32 is inf"),
        ("flop_per_s", {"float32": 1.0, "bf16": 1.0}, "flop_per_s.bf16 is no dtype"),
    ],
)
def test_a_device_with_impossible_figures_cannot_exist(
    field: str, value: object, message: str
) -> None:
    with pytest.raises(BadClusterFile, match=message):
        dataclasses.replace(device(), **{field: value})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), "no level joins all 3 hosts"),
        ((2,), "no level joins all 3 hosts"),
        ((1, 3), "must grow"),
        ((3, 2, 3), "must grow"),
    ],
)
def test_levels_must_form_a_tree(sizes: tuple[int, ...], message: str) -> None:
    host = Host(device=device(), num_devices=1, link=FAST)

    with pytest.raises(BadClusterFile, match=message):
        Cluster(name="c", hosts=(host,) * 3, levels=tuple((size, RACK) for size in sizes))


def test_clusters_hash_compare_and_pickle_by_value() -> None:
    one, other = hall(2, 3, 1), hall(2, 3, 1)

    assert one == other
    assert hash(one) == hash(other)
    assert one == pickle.loads(pickle.dumps(one))
    assert 6 == pickle.loads(pickle.dumps(one)).num_devices
    assert one != hall(2, 3, 2)
