"""This machine's CPU as devices: ``N`` processes that share its cores and memory.

Nothing here is measured. Cores, memory, clock and vector units are read from the operating system;
the rates that follow from them are upper estimates, and every source says so.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from meshwright.cluster.model import Cluster, Device, Host, Link
from meshwright.errors import BadClusterFile

__all__ = ["LOOPBACK", "MachineCpu", "cpu_cluster", "cpu_device", "read_machine_cpu"]

LOOPBACK = Link(
    name="loopback",
    bytes_per_s=1e9,
    latency_s=0.65e-3,
    source=(
        "estimate, not measured here: gloo over loopback, 1 GB/s taken as a low figure; latency: a "
        "small serial gloo collective of 2 processes took 1.3 ms on a 2-core machine, two hops; "
        "measure with `meshwright profile machine -o FILE`"
    ),
)

_MEMORY_BYTES_PER_S_PER_CORE = 10e9
"""Estimate: what one server core streams from DRAM; cores add up until the channels are full,
which this ignores."""

_LAUNCH_LATENCY_S = 5e-6
"""Assumption: dispatch of one eager PyTorch operator."""

_DEFAULT_CLOCK_HZ = 2.5e9

MAX_RANKS = 4096
"""Processes that one machine could conceivably start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCpu:
    """What the operating system says of the CPU."""

    model: str
    num_cores: int
    """Cores this process may use (affinity and container quota)."""
    memory_bytes: int
    """Of the machine, or the container's limit where that is lower."""
    clock_hz: float
    clock_is_known: bool
    float32_flop_per_cycle: int
    """Multiply-adds of one core count two."""
    has_bfloat16: bool


def read_machine_cpu(root: Path = Path("/")) -> MachineCpu:
    """The CPU of this machine, by ``/proc`` and ``/sys`` under ``root`` where they exist."""
    text = _read(root / "proc/cpuinfo")
    flags = set(_field(text, "flags", "Features").split())
    megahertz = _field(text, "cpu MHz")
    clock_is_known = bool(re.fullmatch(r"\d+(\.\d+)?", megahertz)) and float(megahertz) > 0
    return MachineCpu(
        model=_field(text, "model name") or platform.processor() or platform.machine() or "unknown",
        num_cores=_num_cores(root),
        memory_bytes=_memory_bytes(root),
        clock_hz=float(megahertz) * 1e6 if clock_is_known else _DEFAULT_CLOCK_HZ,
        clock_is_known=clock_is_known,
        float32_flop_per_cycle=_float32_flop_per_cycle(flags, _field(text, "vendor_id")),
        has_bfloat16=bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
    )


def cpu_device(*, num_ranks: int, cpu: MachineCpu | None = None) -> Device:
    """One of ``num_ranks`` single-threaded processes that share this machine.

    Memory is an equal share. Each rank computes with one thread; with more ranks than cores, the
    cores are shared too.
    """
    cpu = cpu or read_machine_cpu()
    share = min(1.0, cpu.num_cores / num_ranks)
    float32 = cpu.clock_hz * cpu.float32_flop_per_cycle * share
    half = 2 * float32 if cpu.has_bfloat16 else float32
    clock = "" if cpu.clock_is_known else " (assumed)"
    return Device(
        name="cpu",
        memory_bytes=cpu.memory_bytes // num_ranks,
        memory_bytes_per_s=_MEMORY_BYTES_PER_S_PER_CORE * share,
        flop_per_s={
            "float64": float32 / 2,
            "float32": float32,
            "bfloat16": half,
            "float16": float32,
            "int8": float32,
        },
        launch_latency_s=_LAUNCH_LATENCY_S,
        source=(
            f"estimate, not measured: {cpu.model}, {cpu.num_cores} cores, "
            f"{cpu.clock_hz / 1e9:.2f} GHz{clock} x {cpu.float32_flop_per_cycle} float32 flop per "
            f"cycle on one thread, shared by {num_ranks} ranks; memory bandwidth 10 GB/s per core "
            f"assumed; measure with `meshwright profile machine -o FILE`"
        ),
    )


def cpu_cluster(num_ranks: int, *, cpu: MachineCpu | None = None) -> Cluster:
    """``num_ranks`` gloo processes on this machine, joined by loopback; named ``cpu:N``."""
    if not 1 <= num_ranks <= MAX_RANKS:
        raise BadClusterFile(
            f"cluster 'cpu:{num_ranks}': ranks on one machine must be 1 to {MAX_RANKS}"
        )
    device = cpu_device(num_ranks=num_ranks, cpu=cpu)
    host = Host(device=device, num_devices=num_ranks, link=LOOPBACK)
    return Cluster(name=f"cpu:{num_ranks}", hosts=(host,), levels=())


def _float32_flop_per_cycle(flags: set[str], vendor: str) -> int:
    """Two multiply-add units of the widest vectors the core has at full rate.

    Zen 4 runs 512-bit instructions as two 256-bit halves (AMD Zen 4 optimization guide), so
    AVX-512 counts double on Intel only.
    """
    if "avx512f" in flags and vendor == "GenuineIntel":
        return 64
    if "fma" in flags:
        return 32
    if "avx" in flags or "asimd" in flags:
        return 16
    return 8


def _num_cores(root: Path) -> int:
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _memory_bytes(root: Path) -> int:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError) as error:
        raise BadClusterFile(
            "cannot read this machine's memory; describe it in a cluster file instead of 'cpu:N'"
        ) from error
    limits = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
    for path in limits:
        limit = _read(root / path).strip()
        if limit.isdigit() and int(limit) > 0:
            total = min(total, int(limit))
    return total


def _read(path: Path) -> str:
    """Content of a small file of the kernel, or nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, *names: str) -> str:
    """Value of the first ``name : value`` line of ``/proc/cpuinfo``."""
    for name in names:
        found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, flags=re.MULTILINE)
        if found:
            return found.group(1).strip()
    return ""
