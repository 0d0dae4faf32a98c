"""Measurements of this machine; they come out as Records."""

from __future__ import annotations

from meshwright.profiling.timer import measure

__all__ = ["measure"]
