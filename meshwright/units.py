"""Units used at the edges; inside, everything is SI base units and bytes."""

from __future__ import annotations

__all__ = ["GB", "GIB", "KIB", "MIB", "format_bytes", "format_seconds"]

KIB = 2**10
MIB = 2**20
GIB = 2**30
GB = 10**9


def format_bytes(num_bytes: float) -> str:
    """``num_bytes`` for a person, in binary units: ``"1.5 GiB"``."""
    for size_bytes, name in ((2**40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= size_bytes:
            return f"{num_bytes / size_bytes:.1f} {name}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """``seconds`` for a person, with three significant digits: ``"12.3 ms"``."""
    for scale, name in ((1.0, "s"), (1e-3, "ms")):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {name}"
    return f"{seconds / 1e-6:.3g} us"
