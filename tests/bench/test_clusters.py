"""A row's columns over the figures of the catalog."""

from __future__ import annotations

import pytest

from meshwright.bench.clusters import cluster_of, devices_of
from meshwright.errors import BadClusterFile, BadRequest
from tests.bench.given_runs import run


def test_columns_win_over_the_catalog() -> None:
    cluster, _ = cluster_of(run(gpus=16, dp=4, hosts=2, intra_host_GBps=200, inter_host_GBps=12.5))

    assert 16 == cluster.num_devices
    assert 2 == len(cluster.hosts)
    assert 200e9 == cluster.hosts[0].link.bytes_per_s
    assert 12.5e9 == cluster.levels[-1][1].bytes_per_s


def test_nvlink_domain_of_many_hosts() -> None:
    """144 GPUs in trays of 4: two racks of 18 trays, joined by the network."""
    cluster, _ = cluster_of(
        run(gpu="gb200", gpus=144, hosts=36, gpus_per_host=4, dp=36, nvlink_domain_gpus=72)
    )

    assert [18, 36] == [size for size, _ in cluster.levels]
    assert cluster.levels[0][1].bytes_per_s > cluster.levels[1][1].bytes_per_s


def test_ten_thousand_devices() -> None:
    cluster, _ = cluster_of(
        run(gpu="h100_sxm_80gb", gpus=10_000, hosts=None, gpus_per_host=None, dp=2500)
    )

    assert 1250 == len(cluster.hosts)


@pytest.mark.parametrize(
    ("gpu", "names"),
    [
        ("a100_sxm_80gb", ["a100-sxm-80gb"]),
        ("H100", ["h100-sxm-80gb"]),
        ("b200_sxm_180gb_air_cooled", ["b200-sxm-180gb"]),
        ("mixed:a100_sxm_40gb+t4", ["a100-sxm-40gb", "t4"]),
        ("NVIDIA A100-SXM4-40GB", ["a100-sxm-40gb"]),
        ("NVIDIA A100 80GB PCIe", ["a100-pcie-80gb"]),
        ("A100 80GB PCIe", ["a100-pcie-80gb"]),
        ("A100-40G", ["a100-sxm-40gb"]),
        ("H100-SXM5-80GB", ["h100-sxm-80gb"]),
        ("DGX H100", ["h100-sxm-80gb"]),
        ("8x H100 (80GB)", ["h100-sxm-80gb"]),
        ("HGX-H200", ["h200-sxm-141gb"]),
        ("GB200 NVL72", ["gb200-186gb"]),
        ("DGX-GB200", ["gb200-186gb"]),
        ("AMD Instinct MI300X", ["mi300x-192gb"]),
        ("Tesla V100-SXM2-16GB", ["v100-sxm2-16gb"]),
        ("NVIDIA GeForce RTX 3090", ["rtx-3090"]),
        ("RTX3090", ["rtx-3090"]),
        ("rtx 2080ti", ["rtx-2080-ti"]),
    ],
)
def test_names_of_devices(gpu: str, names: list[str]) -> None:
    assert names == [entry.device.name for entry in devices_of(gpu, [])]


def test_halves_of_a_mixed_cluster() -> None:
    cluster, _ = cluster_of(run(gpu="mixed:a100_sxm_40gb+t4", gpus=16, hosts=4, gpus_per_host=4))

    assert ["a100-sxm-40gb"] * 2 + ["t4"] * 2 == [host.device.name for host in cluster.hosts]


def test_what_cannot_be_known_is_an_error() -> None:
    with pytest.raises(BadRequest, match="number of devices is not known"):
        cluster_of(run(gpus=None, dp=None, hosts=None))
    with pytest.raises(BadClusterFile, match="abacus"):
        cluster_of(run(gpu="abacus"))
    with pytest.raises(BadRequest, match="gpus is 2000000; more than 131072 is not modeled"):
        cluster_of(run(gpus=None, dp=500_000))
