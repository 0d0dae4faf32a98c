"""Measurements of this machine; they come out as Records."""

from __future__ import annotations

from meshwright.profiling.timer import Effort, Measured, Timer, clock_of, measure

__all__ = ["Effort", "Measured", "Timer", "clock_of", "measure"]
