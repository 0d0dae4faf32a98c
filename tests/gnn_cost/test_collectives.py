"""The learned price of collectives: its formulas, its bounds, and what it does far from data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from meshwright.cluster import parse_cluster
from meshwright.cluster.catalog import find_device, find_link
from meshwright.cluster.model import Device, GroupLevel
from meshwright.cost.collectives import alternatives
from meshwright.errors import BadRequest
from meshwright.gnn_cost.collectives.model import (
    KINDS,
    Terms,
    best_time_s,
    clock_hz,
    curves,
    kind_of,
    stack_groups,
    system_of,
)
from meshwright.gnn_cost.collectives.pricer import (
    MIN_FIXED_S,
    CollectiveModel,
    LearnedCollectives,
    Range,
    load_collectives,
    parse_collectives,
    pretrained_collectives,
)
from meshwright.gnn_cost.collectives.terms import PRIORS
from meshwright.spmd.program import CollectiveKind

SIZES = 2.0 ** np.arange(0, 36)
SWITCHED = ("nvlink3", "nvlink4", "nvlink5", "pcie4", "infiniband-ndr")


def gpu(name: str = "h100-sxm-80gb") -> Device:
    return find_device(name, where="test").device


def on_one_level(link: str, ranks: int) -> tuple[GroupLevel, ...]:
    network = link.startswith("infiniband")
    return (
        GroupLevel(
            level_index=int(network),
            link=find_link(link, where="test"),
            group_sizes=(ranks,),
        ),
    )


def random_model(seed: int) -> CollectiveModel:
    """Constants anywhere within three deviations of their priors, trusted fully."""
    rng = np.random.default_rng(seed)
    drawn = {name: float(mean + dev * rng.uniform(-3, 3)) for name, (mean, dev) in PRIORS.items()}
    everything = Range(least_bytes_per_s=1.0, most_bytes_per_s=1e15, most_ranks=10**6, kinds=KINDS)
    families = ("nvlink", "pcie", "network")
    return CollectiveModel(
        values=drawn,
        effects={},
        ranges=dict.fromkeys(families, everything),
        unseen_trust=dict.fromkeys(families, 1.0),
        seen_half_width=0.1,
        unseen_half_width={},
    )


def price_s(
    pricer: LearnedCollectives, kind: CollectiveKind, link: str, ranks: int, device: Device
) -> np.ndarray:
    levels = on_one_level(link, ranks)
    priced = pricer.collectives(kind, SIZES, levels=levels, num_ranks=ranks, device=device)
    return priced.time_s


def plain_terms(**changes: float) -> Terms:
    given_ = {
        "start_s": 5e-6, "hop_s": 1e-6, "fill_s": 0.0, "half_bytes": 1.0, "efficiency": 0.5,
        "copy": 0.0, "switch_start_s": 1.0, "switch_efficiency": 0.5,
    } | changes  # fmt: skip
    per_level = {"hop_s", "efficiency"}
    return Terms(
        **{
            name: np.full((3, 1) if name in per_level else (1,), value)
            for name, value in given_.items()
        }
    )


# The formulas ------------------------------------------------------------------------------------


def test_ring_all_reduce_by_hand() -> None:
    """4 ranks: 6 steps of 1 us after 5 us; 1.5 x 300 MB over half of 300 GB/s takes 3 ms."""
    groups = stack_groups([("all_reduce", on_one_level("nvlink3", 4), 4, gpu("a100-sxm-80gb"))])
    found = curves(groups, plain_terms())

    assert ["ring"] == list(found)
    assert pytest.approx(3.011e-3) == best_time_s(found, np.array([300e6]))[0]


def test_own_part_is_copied() -> None:
    """8 ranks, copy 0.5: 7/8 + 0.5/8 of 300 MB over 150 GB/s, after 5 + 7 us."""
    groups = stack_groups([("all_gather", on_one_level("nvlink3", 8), 8, gpu("a100-sxm-80gb"))])
    found = curves(groups, plain_terms(copy=0.5))

    assert pytest.approx(12e-6 + 0.9375 * 2e-3) == best_time_s(found, np.array([300e6]))[0]


def test_slower_level_of_two_counts() -> None:
    """64 H100 in 8 hosts: 7/8 of an eighth goes over 25 GB/s; 63 hops, 7 of them between hosts."""
    cluster = parse_cluster("64xh100")
    levels = cluster.group_levels(range(64))
    groups = stack_groups([("all_gather", levels, 64, cluster.device_of(0))])
    ring = curves(groups, plain_terms())["ring"]

    assert pytest.approx(7 / 8 / 8 / 25e9) == ring.s_per_byte[0]
    assert pytest.approx(5e-6 + 8 * 7e-6 + 7e-6) == ring.fixed_s[0]


def test_rack_of_nvlink_is_one_level() -> None:
    """72 GB200: hosts of 4 and the rack share NVLink, so 71 steps and 71/72 of the bytes."""
    cluster = parse_cluster("72xgb200")
    levels = cluster.group_levels(range(72))
    groups = stack_groups([("all_gather", levels, 72, cluster.device_of(0))])
    ring = curves(groups, plain_terms())["ring"]

    assert 2 == len(levels)
    assert pytest.approx(5e-6 + 71e-6) == ring.fixed_s[0]
    assert pytest.approx(71 / 72 / 450e9) == ring.s_per_byte[0]


def test_reduction_in_the_switch_moves_less() -> None:
    """8 H100: 1.125 B instead of 1.75 B at the same efficiency."""
    groups = stack_groups([("all_reduce", on_one_level("nvlink4", 8), 8, gpu())])
    found = curves(groups, plain_terms(switch_start_s=5e-6))

    assert pytest.approx(1.125 / 225e9) == found["switch"].s_per_byte[0]
    assert pytest.approx(1.75 / 225e9) == found["ring"].s_per_byte[0]


def test_pair_of_a_cube_mesh_has_two_of_six_links() -> None:
    groups = stack_groups([("all_gather", on_one_level("nvlink2", 2), 2, gpu("v100-sxm2-32gb"))])

    assert pytest.approx(50e9) == groups.bytes_per_s[0, 0]


@pytest.mark.parametrize(
    ("name", "clock"),
    [("v100-sxm2-32gb", 1.53e9), ("a100-sxm-80gb", 1.41e9), ("h100-sxm-80gb", 1.98e9)],
)
def test_clock_follows_from_the_data_sheet(name: str, clock: float) -> None:
    assert pytest.approx(clock, rel=0.01) == clock_hz(gpu(name))


def test_h200_is_the_system_h100_is() -> None:
    link = find_link("nvlink4", where="test")

    assert system_of(gpu("h100-sxm-80gb"), link) == system_of(gpu("h200-sxm-141gb"), link)


# Whatever the constants are ----------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), link=st.sampled_from(SWITCHED), ranks=st.integers(2, 64))
@settings(max_examples=40, deadline=None)
def test_more_bytes_never_cost_less(seed: int, link: str, ranks: int) -> None:
    pricer = LearnedCollectives(random_model(seed))
    for kind in CollectiveKind:
        times_s = price_s(pricer, kind, link, ranks, gpu())

        assert (np.diff(times_s) > 0).all()


@given(seed=st.integers(0, 10_000), link=st.sampled_from(SWITCHED))
@settings(max_examples=40, deadline=None)
def test_more_ranks_never_cost_less(seed: int, link: str) -> None:
    """But where a switch reduces, or a tree between hosts takes the steps of the next power of two.

    The switch lets ``n`` ranks send ``1 + 1 / n`` of the payload, as measured on H100.
    """
    pricer = LearnedCollectives(random_model(seed))
    ranks = (2, 4, 8, 16, 32) if link == "infiniband-ndr" else (2, 3, 4, 5, 6, 7, 8, 12, 16)
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        if kind == "all_reduce" and link in ("nvlink4", "nvlink5"):
            continue
        times_s = np.stack(
            [price_s(pricer, CollectiveKind(kind), link, n, gpu("a100-sxm-80gb")) for n in ranks]
        )

        assert (times_s[1:] >= times_s[:-1] * 0.98).all(), kind


@given(seed=st.integers(0, 10_000), link=st.sampled_from(SWITCHED), ranks=st.integers(2, 32))
@settings(max_examples=40, deadline=None)
def test_no_link_carries_more_than_its_data_sheet(seed: int, link: str, ranks: int) -> None:
    """The bytes that must cross it take at least their time; and a start takes at least 2 us."""
    pricer = LearnedCollectives(random_model(seed))
    rate = find_link(link, where="test").bytes_per_s
    least = {"all_reduce": 1.0, "all_gather": 1 - 1 / ranks, "halo": 1.0}
    for kind, share in least.items():
        times_s = price_s(pricer, CollectiveKind(kind), link, ranks, gpu())

        assert (times_s >= share * SIZES / rate).all()
        assert (times_s >= MIN_FIXED_S).all()


# What the package brings -------------------------------------------------------------------------


def test_one_rank_and_no_bytes_cost_nothing() -> None:
    pricer = pretrained_collectives()
    alone = pricer.collectives(
        CollectiveKind.ALL_REDUCE, SIZES, levels=(), num_ranks=1, device=gpu()
    )
    empty = pricer.collectives(
        CollectiveKind.ALL_REDUCE,
        np.zeros(1),
        levels=on_one_level("nvlink4", 8),
        num_ranks=8,
        device=gpu(),
    )

    assert 0.0 == alone.time_s.max()
    assert 0.0 == empty.time_s[0]


def test_a_measured_system_is_trusted_and_an_unknown_link_is_analytic() -> None:
    pricer = pretrained_collectives()
    seen = pricer.collectives(
        CollectiveKind.ALL_GATHER,
        SIZES,
        levels=on_one_level("nvlink4", 8),
        num_ranks=8,
        device=gpu(),
    )
    levels = on_one_level("infinity-fabric3", 8)
    other = pricer.collectives(
        CollectiveKind.ALL_GATHER,
        SIZES,
        levels=levels,
        num_ranks=8,
        device=gpu("mi300x-192gb"),
    )
    costs = alternatives(CollectiveKind.ALL_GATHER, levels, 8)
    analytic_s = np.minimum.reduce([fixed + SIZES * each for fixed, each in costs])

    assert {1.0} == set(seen.trust)
    assert {0.0} == set(other.trust)
    np.testing.assert_allclose(analytic_s, other.time_s)


def test_trust_falls_with_distance() -> None:
    """A system left out less than a measured one; racks of 72 less than hosts of 8."""
    pricer = pretrained_collectives()

    def trust(link: str, ranks: int, device: str) -> float:
        priced = pricer.collectives(
            CollectiveKind.ALL_GATHER,
            np.ones(1),
            levels=on_one_level(link, ranks),
            num_ranks=ranks,
            device=gpu(device),
        )
        return float(priced.trust[0])

    assert 1.0 == trust("nvlink3", 8, "a100-sxm-80gb")
    assert trust("nvlink4", 8, "a100-sxm-80gb") < 1.0
    assert trust("nvlink5", 72, "gb200-186gb") < 0.5 * trust("nvlink5", 8, "gb200-186gb")
    assert trust("pcie4", 4, "l4") < trust("nvlink4", 4, "a100-sxm-80gb")


def test_a_ring_is_messages_one_after_another() -> None:
    pricer = pretrained_collectives()
    ring_s = price_s(pricer, CollectiveKind.RING, "nvlink4", 4, gpu())[20:]
    levels = on_one_level("nvlink4", 4)
    part_s = pricer.collectives(
        CollectiveKind.HALO, SIZES[20:] / 4, levels=levels, num_ranks=4, device=gpu()
    ).time_s

    np.testing.assert_allclose(3 * part_s, ring_s)


def test_packaged_card_says_where_it_comes_from() -> None:
    card = pretrained_collectives().model.card

    assert {"data", "licenses", "reproduce", "splits"} <= card.keys()
    assert all(64 == len(source["sha256"]) for source in card["data"])
    assert all(0 < split["mape"] for split in card["splits"])


def test_pricing_loads_neither_torch_nor_tables() -> None:
    code = (
        "import sys; from meshwright.gnn_cost.collectives import pretrained_collectives as p; p();"
        "print([x for x in ('torch', 'pyarrow', 'scipy', 'sklearn') if x in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "[]" == done.stdout.strip()


def test_model_survives_its_file(tmp_path: Path) -> None:
    model = random_model(3)
    model.save(tmp_path / "collectives.json")

    assert model == load_collectives(tmp_path / "collectives.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"version": 1', '"version": 9'), "reads 1"),
        (('"half_rate"', '"half"'), "half_rate"),
        (('"seen_half_width": 0.1', '"seen_half_width": "x"'), "seen_half_width"),
        (('"half_rate":', '"half_rate": 1e9, "x":'), "x"),
    ],
)
def test_damaged_model_is_one_line(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "collectives.json"
    random_model(3).save(path)
    data = path.read_text().replace(*change).encode()

    with pytest.raises(BadRequest, match=said) as caught:
        parse_collectives(data, name="collectives.json")
    assert "\n" not in str(caught.value)


def test_missing_model_is_a_bad_request(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="cannot be read"):
        load_collectives(tmp_path / "none.json")


def test_message_is_a_halo() -> None:
    assert CollectiveKind.HALO == kind_of("send_recv")
    assert CollectiveKind.ALL_REDUCE == kind_of("all_reduce")
