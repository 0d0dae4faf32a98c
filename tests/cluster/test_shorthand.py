from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster import known_devices, parse_cluster
from meshwright.errors import BadClusterFile

GPU_NAMES = [
    name
    for entry in known_devices()
    for name in (entry.device.name, *entry.aliases)
    if name != "cpu"
]


@pytest.mark.parametrize(
    ("text", "sizes", "levels"),
    [
        ("8xh100", [8], []),
        ("h100", [1], []),
        ("12xh100", [8, 4], [2]),
        ("16xh100", [8, 8], [2]),
        ("2x4xa100", [4, 4], [2]),
        ("8xa100-80gb+8xt4", [8, 8], [2]),
        (" 2 x 8 x H100 ", [8, 8], [2]),
        ("72xgb200", [4] * 18, [18]),
        ("144xgb200", [4] * 36, [18, 36]),
        ("2x72xgb200", [72, 72], [2]),
    ],
)
def test_shorthand_makes_hosts_and_levels(text: str, sizes: list[int], levels: list[int]) -> None:
    cluster = parse_cluster(text)

    assert sizes == [host.num_devices for host in cluster.hosts]
    assert levels == [hosts_per_group for hosts_per_group, _ in cluster.levels]


def test_1024_h100_are_128_hosts() -> None:
    cluster = parse_cluster("1024xh100")

    assert (1024, 128) == (cluster.num_devices, cluster.num_hosts)
    assert cluster.is_homogeneous
    assert "nvlink4" == cluster.link_between(range(8))[1].name
    assert "infiniband-ndr" == cluster.link_between(range(9))[1].name


def test_a_smaller_last_host_is_said() -> None:
    assert "1 host of 8 x t4, 1 host of 3 x t4" in parse_cluster("11xt4").describe()


def test_mixed_hosts_talk_over_the_slower_network() -> None:
    """A T4 host has 100 Gb/s for eight GPUs, whatever the A100 host could do."""
    cluster = parse_cluster("8xa100-80gb+8xt4")

    assert not cluster.is_homogeneous
    assert 1.5625e9 == cluster.link_between([0, 8])[1].bytes_per_s
    assert "nvlink3" == cluster.link_between([0, 7])[1].name
    assert "pcie3" == cluster.link_between([8, 15])[1].name


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.none() | st.integers(1, 12), st.sampled_from(GPU_NAMES)),
        min_size=1,
        max_size=3,
    )
)
def test_the_name_of_a_cluster_is_its_shorthand(
    parts: list[tuple[int, int | None, str]],
) -> None:
    text = "+".join(
        f"{count}x{name}" if per_host is None else f"{count}x{per_host}x{name}"
        for count, per_host, name in parts
    )
    cluster = parse_cluster(text)

    assert cluster == parse_cluster(cluster.name)
    assert sum(count * (per_host or 1) for count, per_host, _ in parts) == cluster.num_devices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read ''; write it like 8xh100"),
        ("8x", "cannot read '8x'"),
        ("8xh100+", "cannot read ''"),
        ("2x2x2xh100", "cannot read '2x2x2xh100'"),
        ("0xh100", "count 0 must be 1 to"),
        ("99999999999999xh100", "must be 1 to"),
        ("1000000x1000000xh100", "more than 1048576 devices"),
        ("cpu:0", "count 0 must be 1 to"),
        ("cpu:99999", "must be 1 to 4096"),
        ("cpu:2+8xh100", "CPU ranks and GPUs do not mix"),
        ("8xh10o", "unknown device 'h10o'; did you mean"),
    ],
)
def test_bad_shorthand_is_one_line(text: str, message: str) -> None:
    with pytest.raises(BadClusterFile, match=message) as error:
        parse_cluster(text)

    assert "\n" not in str(error.value)


@given(st.text(max_size=30))
def test_any_text_gives_a_cluster_or_one_line(text: str) -> None:
    message = ""
    try:
        parse_cluster(text)
    except BadClusterFile as error:
        message = str(error)

    assert len(message.splitlines()) <= 1
