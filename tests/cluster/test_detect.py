from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.cluster import cpu_cluster, detect_machine, parse_cluster
from meshwright.cluster.cpu import MachineCpu, cpu_device, read_machine_cpu
from meshwright.cluster.detect import DetectedGpu, cluster_of_gpus, parse_nvidia_smi
from meshwright.errors import BadClusterFile

CPU = MachineCpu(
    model="test",
    num_cores=4,
    memory_bytes=16 * 2**30,
    clock_hz=2e9,
    clock_is_known=True,
    float32_flop_per_cycle=32,
    has_bfloat16=False,
)

SMI = """0, GPU-aaaa-1, NVIDIA A100-SXM4-80GB, 81920
1, GPU-bbbb-2, Tesla T4, 15360
"""


def gpu(name: str, memory_bytes: int = 100) -> DetectedGpu:
    return DetectedGpu(driver_name=name, memory_bytes=memory_bytes, reported_by="torch")


def test_cpu_ranks_share_the_memory_and_have_a_core_each() -> None:
    """4 ranks on 4 cores: 4 GiB and 2 GHz x 32 flop each."""
    device = cpu_cluster(4, cpu=CPU).device_of(3)

    assert 4 * 2**30 == device.memory_bytes
    assert 64e9 == device.flop_per_s["float32"]
    assert 32e9 == device.flop_per_s["float64"]


def test_more_ranks_than_cores_share_the_cores() -> None:
    assert 32e9 == cpu_device(num_ranks=8, cpu=CPU).flop_per_s["float32"]
    assert 64e9 == cpu_device(num_ranks=2, cpu=CPU).flop_per_s["float32"]


def test_cpu_figures_say_that_they_are_estimates() -> None:
    cluster = parse_cluster("cpu:4")

    assert ("cpu:4", 4) == (cluster.name, cluster.num_devices)
    assert cluster.device_of(0).source.startswith("estimate, not measured")
    assert cluster.hosts[0].link.source.startswith("estimate, not measured")
    assert "loopback" == cluster.link_between(range(4))[1].name


def test_cpu_is_read_from_proc_and_sys(tmp_path: Path) -> None:
    """A container with 1.5 cores' quota and 1 GiB on a 3 GHz Intel core with AVX-512."""
    files = {
        "proc/cpuinfo": "vendor_id\t: GenuineIntel\nmodel name\t: Some Xeon\ncpu MHz\t\t: 3000.0\n"
        "flags\t\t: sse avx fma avx512f avx512_bf16\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/memory.max": f"{2**30}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    cpu = read_machine_cpu(tmp_path)

    assert ("Some Xeon", 1, 2**30) == (cpu.model, cpu.num_cores, cpu.memory_bytes)
    assert (3e9, True, 64, True) == (
        cpu.clock_hz,
        cpu.clock_is_known,
        cpu.float32_flop_per_cycle,
        cpu.has_bfloat16,
    )


def test_a_machine_without_proc_says_that_its_clock_is_assumed(tmp_path: Path) -> None:
    cpu = read_machine_cpu(tmp_path)

    assert not cpu.clock_is_known
    assert "(assumed)" in cpu_device(num_ranks=1, cpu=cpu).source


def test_asking_for_cpu_ranks_passes_over_gpus() -> None:
    assert "cpu:3" == detect_machine(num_cpu_ranks=3).name


def test_equal_gpus_are_one_host_with_the_smallest_report() -> None:
    cluster = cluster_of_gpus((gpu("Tesla T4", 120), gpu("Tesla T4", 110)))

    assert (1, 2, 110) == (cluster.num_hosts, cluster.num_devices, cluster.min_memory_bytes)
    assert "reported by torch" in cluster.device_of(0).source


def test_different_gpus_keep_their_numbers() -> None:
    cluster = cluster_of_gpus((gpu("Tesla T4"), gpu("NVIDIA L4"), gpu("NVIDIA L4")))

    assert ["t4", "l4", "l4"] == [cluster.device_of(rank).name for rank in range(3)]
    assert "pcie3" == cluster.link_between([0, 2])[1].name


def test_a_gpu_outside_the_catalog_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(BadClusterFile, match="'GeForce 256' is not in the catalog; describe it"):
        cluster_of_gpus((gpu("GeForce 256"),))


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA A100-SXM4-80GB", "Tesla T4"]),
        ("1", ["Tesla T4"]),
        ("1,0", ["Tesla T4", "NVIDIA A100-SXM4-80GB"]),
        ("GPU-bbbb", ["Tesla T4"]),
        ("0,7,1", ["NVIDIA A100-SXM4-80GB"]),
        ("", []),
        ("-1", []),
    ],
)
def test_nvidia_smi_is_read_as_cuda_would_number(visible: str | None, names: list[str]) -> None:
    assert names == [found.driver_name for found in parse_nvidia_smi(SMI, visible=visible)]


def test_nvidia_smi_memory_is_in_mebibytes_and_odd_lines_are_passed_over() -> None:
    (only,) = parse_nvidia_smi("0, GPU-a, Tesla T4, 15360\nNo devices\n", visible=None)

    assert 15360 * 2**20 == only.memory_bytes


def test_planning_clusters_works_without_torch() -> None:
    """In a fresh interpreter in which importing torch fails; there is no GPU tool on its path."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from meshwright.cluster import detect_machine, parse_cluster\n"
        "print(parse_cluster('16xh100').num_devices, detect_machine().name)"
    )
    environ = {**os.environ, "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False
    )

    assert 0 == done.returncode, done.stderr
    assert done.stdout.startswith("16 cpu:")
