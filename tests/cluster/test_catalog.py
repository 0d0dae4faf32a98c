from __future__ import annotations

import pytest

from meshwright.cluster import known_devices, known_links, parse_cluster
from meshwright.cluster.catalog import match_driver_name
from meshwright.errors import BadClusterFile

ENTRIES = {entry.device.name: entry for entry in known_devices()}


def test_the_catalog_holds_the_devices_of_data_centers_and_this_cpu() -> None:
    expected = {
        *("p4", "p40", "p100-pcie-16gb", "p100-sxm2-16gb"),
        *("v100-sxm2-16gb", "v100-sxm2-32gb", "v100-pcie-16gb", "v100-pcie-32gb"),
        *("t4", "rtx-2080", "rtx-2080-ti", "rtx-titan", "rtx-3090", "rtx-4090", "rtx-a6000"),
        *("a10", "a10g", "a40", "l4", "l40", "l40s"),
        *("a100-pcie-40gb", "a100-pcie-80gb", "a100-sxm-40gb", "a100-sxm-80gb", "a800-sxm-80gb"),
        *("h100-pcie-80gb", "h100-sxm-80gb", "h100-nvl-94gb", "h100-sxm-64gb"),
        *("h100-sxm-96gb-hbm2e", "h800-sxm-80gb", "h20-sxm-96gb", "gh200-96gb", "gh200-144gb"),
        *("h200-sxm-141gb", "b200-sxm-180gb", "gb200-186gb", "b300-sxm-270gb", "gb300-279gb"),
        *("mi250-gcd", "mi250x-gcd", "mi300x-192gb", "mi325x-256gb", "mi355x-288gb", "cpu"),
    }

    assert expected == set(ENTRIES)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("h100", "h100-sxm-80gb"),
        ("a100", "a100-sxm-80gb"),
        ("A100-80GB", "a100-sxm-80gb"),
        ("a100-40gb", "a100-sxm-40gb"),
        ("v100", "v100-sxm2-16gb"),
        ("mi300x", "mi300x-192gb"),
        ("h100_sxm_96gb_hbm2e", "h100-sxm-96gb-hbm2e"),
        ("gb300", "gb300-279gb"),
    ],
)
def test_an_alias_names_its_device(alias: str, name: str) -> None:
    assert name == parse_cluster(f"1x{alias}").device_of(0).name


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != "cpu"])
def test_figures_of_a_gpu_are_plausible(name: str) -> None:
    """Slips of a power of ten, sparse rates and decimal/binary mix-ups fall outside."""
    entry = ENTRIES[name]
    device = entry.device

    assert 7 * 2**30 <= device.memory_bytes <= 288e9
    assert 1.9e11 <= device.memory_bytes_per_s <= 8e12
    assert 20 <= device.num_units <= 304
    assert 2 * 2**20 <= device.cache_bytes <= 256 * 2**20
    assert 5e12 <= device.flop_per_s["float32"] <= 200e12
    assert device.flop_per_s["float64"] <= device.flop_per_s["float32"]
    assert device.flop_per_s["float32"] <= device.flop_per_s["bfloat16"]
    assert device.flop_per_s["bfloat16"] <= device.flop_per_s["float16"] <= 2600e12
    assert entry.network.bytes_per_s <= entry.host_link.bytes_per_s
    assert "read 20" in device.source


@pytest.mark.parametrize("name", list(ENTRIES))
def test_every_figure_names_its_source(name: str) -> None:
    entry = ENTRIES[name]

    assert all([entry.device.source, entry.host_link.source, entry.network.source])


def test_figures_of_the_h100_are_the_data_sheets() -> None:
    """3.35 TB/s; 989.4 dense bfloat16 TFLOPS; NVLink 900 GB/s in both directions."""
    entry = ENTRIES["h100-sxm-80gb"]

    assert 3.35e12 == entry.device.memory_bytes_per_s
    assert 989.4e12 == entry.device.flop_per_s["bfloat16"]
    assert 132 == entry.device.num_units
    assert 50 * 2**20 == entry.device.cache_bytes
    assert 450e9 == entry.host_link.bytes_per_s
    assert 50e9 == entry.network.bytes_per_s


def test_a_rack_of_gb300_is_one_domain_of_72() -> None:
    cluster = parse_cluster("144xgb300")

    assert 36 == cluster.num_hosts
    assert (18, "nvlink5") == (cluster.levels[0][0], cluster.levels[0][1].name)
    assert "infiniband-xdr" == cluster.levels[1][1].name


def test_driver_names_find_their_device() -> None:
    found = match_driver_name("NVIDIA A100-SXM4-80GB")

    assert found is not None
    assert "a100-sxm-80gb" == found.device.name
    assert match_driver_name("NVIDIA GeForce GTX 1080") is None


def test_links_have_distinct_names() -> None:
    names = [link.name for link in known_links()]

    assert sorted(set(names)) == sorted(names)


def test_an_unknown_gpu_gets_a_suggestion() -> None:
    with pytest.raises(BadClusterFile, match=r"unknown device 'h1000'; did you mean h100") as error:
        parse_cluster("8xh1000")

    assert "\n" not in str(error.value)
