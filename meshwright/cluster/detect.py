"""The machine this runs on, as a cluster.

GPUs are asked of torch where it is installed, else of ``nvidia-smi``; without any, the CPU is the
cluster. Memory is what the driver reports; every rate is the catalog's and not measured here.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import os
import subprocess
from collections.abc import Mapping
from itertools import groupby

from meshwright.cluster.catalog import CatalogEntry, find_link, match_driver_name
from meshwright.cluster.cpu import cpu_cluster, read_machine_cpu
from meshwright.cluster.model import Cluster, Device, Host
from meshwright.errors import BadClusterFile
from meshwright.units import MIB

__all__ = [
    "DetectedGpu",
    "cluster_of_gpus",
    "detect_gpus",
    "detect_machine",
    "parse_nvidia_smi",
]

_SMI_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DetectedGpu:
    """One GPU as the driver reports it."""

    driver_name: str
    memory_bytes: int
    reported_by: str
    """``"torch"`` or ``"nvidia-smi"``."""


def detect_machine(*, num_cpu_ranks: int | None = None) -> Cluster:
    """This machine: its GPUs, or where there are none its CPU, one rank for each core.

    Args:
        num_cpu_ranks: describe the CPU as so many ranks, whatever GPUs there are.

    Raises:
        BadClusterFile: a GPU that the catalog does not hold.
    """
    gpus = () if num_cpu_ranks is not None else detect_gpus()
    if gpus:
        return cluster_of_gpus(gpus)
    cpu = read_machine_cpu()
    return cpu_cluster(cpu.num_cores if num_cpu_ranks is None else num_cpu_ranks, cpu=cpu)


def detect_gpus() -> tuple[DetectedGpu, ...]:
    """GPUs visible to this process, in the order in which torch numbers them."""
    found = _gpus_by_torch()
    return _gpus_by_nvidia_smi(os.environ) if found is None else found


def cluster_of_gpus(gpus: tuple[DetectedGpu, ...]) -> Cluster:
    """One host of these GPUs; where types differ, a run of each as a host, joined by PCIe.

    The memory of a run is its smallest report, since a host's devices count as equal.
    """
    hosts = []
    for driver_name, run in groupby(gpus, key=lambda gpu: gpu.driver_name):
        members = list(run)
        entry = match_driver_name(driver_name)
        if entry is None:
            raise BadClusterFile(
                f"this machine's GPU {driver_name!r} is not in the catalog; describe it in a "
                f"cluster file, or use cpu:N"
            )
        device = _as_reported(entry, members)
        hosts.append(Host(device=device, num_devices=len(members), link=entry.host_link))
    name = "+".join(f"{host.num_devices}x{host.device.name}" for host in hosts)
    pcie = find_link("pcie3", where="detected machine")
    levels = ((len(hosts), pcie),) if len(hosts) > 1 else ()
    return Cluster(name=f"this machine: {name}", hosts=tuple(hosts), levels=levels)


def _as_reported(entry: CatalogEntry, members: list[DetectedGpu]) -> Device:
    memory_bytes = min(gpu.memory_bytes for gpu in members)
    return dataclasses.replace(
        entry.device,
        memory_bytes=memory_bytes,
        source=f"memory: reported by {members[0].reported_by}; else {entry.device.source}",
    )


def _gpus_by_torch() -> tuple[DetectedGpu, ...] | None:
    """What torch sees, or ``None`` where torch is not installed."""
    try:
        # By name, and only here: planning must not need torch, nor pay for its import.
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            DetectedGpu(
                driver_name=str(properties.name),
                memory_bytes=int(properties.total_memory),
                reported_by="torch",
            )
        )
    return tuple(found)


def _gpus_by_nvidia_smi(environ: Mapping[str, str]) -> tuple[DetectedGpu, ...]:
    """What ``nvidia-smi`` lists and ``CUDA_VISIBLE_DEVICES`` leaves; nothing where it is absent."""
    command = [
        "nvidia-smi",
        "--query-gpu=index,uuid,name,memory.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_nvidia_smi(answer.stdout, visible=environ.get("CUDA_VISIBLE_DEVICES"))


def parse_nvidia_smi(text: str, *, visible: str | None) -> tuple[DetectedGpu, ...]:
    """GPUs from the CSV of ``index, uuid, name, memory.total`` in MiB.

    ``visible`` is ``CUDA_VISIBLE_DEVICES``: indices or starts of uuids, in the order wanted; as in
    CUDA, the first entry that names no GPU ends the list. ``None`` shows all.
    """
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    gpus: list[tuple[str, str, DetectedGpu]] = []
    for row in rows:
        if len(row) != 4 or not row[3].isdigit():
            continue
        gpu = DetectedGpu(
            driver_name=row[2], memory_bytes=int(row[3]) * MIB, reported_by="nvidia-smi"
        )
        gpus.append((row[0], row[1], gpu))
    if visible is None:
        return tuple(gpu for _, _, gpu in gpus)
    chosen = []
    for wanted in (part.strip() for part in visible.split(",")):
        match = next(
            (
                gpu
                for index, uuid, gpu in gpus
                if wanted
                and (index == wanted or (not wanted.isdigit() and uuid.startswith(wanted)))
            ),
            None,
        )
        if match is None:
            break
        chosen.append(match)
    return tuple(chosen)
