"""Times of collectives."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.model import Cluster, Device, Host, Link
from meshwright.cost.collectives import CollectivePrices, collective_time_s, flat_ring_hops
from meshwright.spmd.program import CollectiveKind

# 1 GB/s and 2 GB/s reached: 0.8 of the data sheet.
FAST = Link(name="fast", bytes_per_s=2.5e9, latency_s=1e-6, source="test")
SLOW = Link(name="slow", bytes_per_s=1.25e9, latency_s=10e-6, source="test")
DEVICE = Device(
    name="toy",
    memory_bytes=2**30,
    memory_bytes_per_s=1e9,
    flop_per_s={"float32": 1e9},
    launch_latency_s=0.0,
    source="test",
)


def cluster(num_hosts: int, per_host: int) -> Cluster:
    return Cluster(
        name="toy",
        hosts=(Host(device=DEVICE, num_devices=per_host, link=FAST),) * num_hosts,
        levels=((num_hosts, SLOW),) if num_hosts > 1 else (),
    )


def test_ring_all_reduce_of_four() -> None:
    """6 hops of 1 us, and 2 x 3/4 of 2 GB at 2 GB/s."""
    time_s = collective_time_s(
        CollectiveKind.ALL_REDUCE, 2e9, cluster=cluster(1, 4), ranks=range(4)
    )

    assert pytest.approx(6e-6 + 1.5) == time_s


def test_small_all_reduce_of_many_goes_by_tree() -> None:
    """64 hosts of one device: 2 x 6 hops of 10 us instead of 126, plus 2 x 8 bytes at 1 GB/s."""
    time_s = collective_time_s(
        CollectiveKind.ALL_REDUCE, 8, cluster=cluster(64, 1), ranks=range(64)
    )

    assert pytest.approx(120e-6 + 16e-9) == time_s


def test_two_hosts_go_level_by_level_at_the_pace_of_the_slower() -> None:
    """Within hosts 2 x 3/4 B at 2 GB/s; across, a quarter of B each: 2 x 1/2 x B/4 at 1 GB/s."""
    time_s = collective_time_s(
        CollectiveKind.ALL_REDUCE, 4e9, cluster=cluster(2, 4), ranks=range(8)
    )

    assert pytest.approx(max(3.0, 1.0), rel=1e-4) == time_s


def test_latencies_of_levels_add_up() -> None:
    """64 hosts of 2: 2 hops of 1 us within, 2 x 6 of 10 us across; then the slower of the bytes.

    2 x 1/2 x 8 kB at 2 GB/s within, or of half of that 2 x 2 x 63/64 at 1 GB/s across.
    """
    time_s = collective_time_s(
        CollectiveKind.ALL_REDUCE, 8000, cluster=cluster(64, 2), ranks=range(128)
    )

    assert pytest.approx(2e-6 + 120e-6 + 15.75e-6) == time_s


def test_gathers_go_around_all_ranks() -> None:
    """64 hosts of 2: 64 hops of 1 us within hosts and 63 of 10 us between, for one byte of each."""
    for kind in (CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER):
        time_s = collective_time_s(kind, 128, cluster=cluster(64, 2), ranks=range(128))

        assert pytest.approx(64e-6 + 630e-6, rel=1e-3) == time_s


def test_one_rank_of_each_host_may_gather_by_tree() -> None:
    """64 hosts of one device: 6 hops of 10 us instead of 63."""
    time_s = collective_time_s(
        CollectiveKind.ALL_GATHER, 64, cluster=cluster(64, 1), ranks=range(64)
    )

    assert pytest.approx(60e-6, rel=1e-2) == time_s


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_a_ring_has_one_hop_less_than_ranks(sizes: list[int]) -> None:
    assert math.prod(sizes) - 1 == sum(flat_ring_hops(sizes))


def test_all_to_all_uses_all_levels_at_once() -> None:
    """Of 8 GB, 3/8 go within the host at 2 GB/s and, meanwhile, 4/8 across at 1 GB/s."""
    time_s = collective_time_s(
        CollectiveKind.ALL_TO_ALL, 8e9, cluster=cluster(2, 4), ranks=range(8)
    )

    assert pytest.approx(max(1.5, 4.0), rel=1e-4) == time_s


def test_groups_follow_the_order_of_axes() -> None:
    """On 2 hosts of 4 with tp=4 inside: tp stays in a host, dp_shard of 2 crosses."""
    prices = CollectivePrices(cluster(2, 4))
    sizes = {"dp_shard": 2, "tp": 4}

    inner = prices.time_s(CollectiveKind.ALL_GATHER, 4e9, axes=("tp",), axis_sizes=sizes)
    outer = prices.time_s(CollectiveKind.ALL_GATHER, 4e9, axes=("dp_shard",), axis_sizes=sizes)

    assert pytest.approx(1.5, rel=1e-4) == float(inner)
    assert pytest.approx(2.0, rel=1e-4) == float(outer)


def test_a_message_takes_latency_and_bytes() -> None:
    prices = CollectivePrices(cluster(2, 4))

    assert pytest.approx(1e-6 + 1.0) == prices.send_time_s(2e9, 0, 1)
    assert pytest.approx(10e-6 + 2.0) == prices.send_time_s(2e9, 0, 4)
    assert 0.0 == prices.send_time_s(2e9, 3, 3)


@given(
    kind=st.sampled_from(CollectiveKind),
    hosts=st.integers(1, 6),
    per_host=st.integers(1, 8),
    small=st.integers(0, 10**10),
    more=st.integers(0, 10**10),
)
def test_more_bytes_never_cost_less(
    kind: CollectiveKind, hosts: int, per_host: int, small: int, more: int
) -> None:
    where = cluster(hosts, per_host)
    ranks = range(where.num_devices)

    first = collective_time_s(kind, small, cluster=where, ranks=ranks)
    second = collective_time_s(kind, small + more, cluster=where, ranks=ranks)

    assert first <= second


@given(kind=st.sampled_from(CollectiveKind), num_bytes=st.integers(0, 10**12))
def test_one_rank_costs_nothing(kind: CollectiveKind, num_bytes: int) -> None:
    assert 0.0 == collective_time_s(kind, num_bytes, cluster=cluster(2, 4), ranks=[5])


@given(count=st.integers(2, 200), num_bytes=st.integers(1, 10**10))
def test_more_ranks_on_one_level_never_reduce_faster(count: int, num_bytes: int) -> None:
    few = collective_time_s(
        CollectiveKind.ALL_REDUCE, num_bytes, cluster=cluster(1, count), ranks=range(count - 1)
    )
    many = collective_time_s(
        CollectiveKind.ALL_REDUCE, num_bytes, cluster=cluster(1, count), ranks=range(count)
    )

    assert few <= many * (1 + 1e-12)
