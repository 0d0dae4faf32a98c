"""What published figures say of their machine, in the words of Records."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from meshwright.cluster.catalog import find_device, match_driver_name
from meshwright.errors import BadClusterFile
from meshwright.records import Machine, Software
from meshwright.strict_json import one_line

__all__ = ["UNKNOWN", "device_name", "unknown_host", "unknown_software"]

UNKNOWN = "unknown"
"""Of what the source does not tell, where a Record must have a word."""


@cache
def device_name(gpu: str) -> str:
    """The catalog's name of a GPU as tables (``h100_sxm_80gb``) or drivers name it.

    As its source names it where the catalog does not know it; ``unknown`` for an empty name.
    """
    entry = match_driver_name(gpu)
    if entry is None:
        try:
            entry = find_device(gpu.replace("_", "-"), where="table")
        except BadClusterFile:
            return one_line(gpu.strip()) or UNKNOWN
    return entry.device.name


def unknown_host(gpus: Sequence[str]) -> Machine:
    """A host of which only the GPUs are known."""
    return _host(tuple(gpu for gpu in gpus if gpu))


@cache
def _host(gpus: tuple[str, ...]) -> Machine:
    return Machine(
        processor=UNKNOWN, num_cores=0, memory_bytes=0, accelerators=gpus, system=UNKNOWN
    )


@cache
def unknown_software() -> Software:
    """Software of which nothing is known."""
    return Software(python=UNKNOWN, packages={})
