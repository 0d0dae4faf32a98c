"""What was measured: Record, StepReport, and the store that keeps them."""

from __future__ import annotations

from meshwright.records.record import (
    Machine,
    Record,
    Software,
    Timing,
    describe_machine,
    describe_software,
    timing_of,
    utc_now,
)
from meshwright.records.report import (
    PredictedStep,
    RankMemory,
    StepReport,
    Verified,
    finite_or_none,
    read_step_report,
)
from meshwright.records.store import RecordStore

__all__ = [
    "Machine",
    "PredictedStep",
    "RankMemory",
    "Record",
    "RecordStore",
    "Software",
    "StepReport",
    "Timing",
    "Verified",
    "describe_machine",
    "describe_software",
    "finite_or_none",
    "read_step_report",
    "timing_of",
    "utc_now",
]
