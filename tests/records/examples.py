"""Records for the tests of the store."""

from __future__ import annotations

from typing import Any

from meshwright import records

__all__ = ["MACHINE", "SOFTWARE", "record"]

MACHINE = records.Machine(
    processor="a cpu", num_cores=2, memory_bytes=8, accelerators=(), system="Linux x86_64"
)
SOFTWARE = records.Software(python="3.11.0", packages={"torch": "2.13.0"})


def record(**changes: Any) -> records.Record:
    fields: dict[str, Any] = {
        "kind": "operator",
        "name": "linear",
        "device": "cpu",
        "writer": "meshwright 0.1.0 profile ops",
        "machine": MACHINE,
        "software": SOFTWARE,
        "method": "perf_counter",
        "num_repeats": 3,
        "median": 2.0,
        "p10": 1.0,
        "p90": 3.0,
        "unit": "s",
        "measured_utc": "2026-01-01T00:00:00+00:00",
        "extra": {"direction": "fwd", "dtype": "fp32", "m": 4, "causal": True, "flops": 1.5},
    }
    return records.Record(**fields | changes)
