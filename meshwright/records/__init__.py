"""What was measured: Record, StepReport, and the store that keeps them."""

from __future__ import annotations

from meshwright.records.kinds import KINDS, Kind, KindKeys
from meshwright.records.pruning import Pruned
from meshwright.records.query import Query
from meshwright.records.record import (
    RECORD_SCHEMA_VERSION,
    Machine,
    Record,
    Scalar,
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
from meshwright.records.upkeep import Compacted, Merged, Verification
from meshwright.records.writing import make_record, record_of_timing, writer_name

__all__ = [
    "KINDS",
    "RECORD_SCHEMA_VERSION",
    "Compacted",
    "Kind",
    "KindKeys",
    "Machine",
    "Merged",
    "PredictedStep",
    "Pruned",
    "Query",
    "RankMemory",
    "Record",
    "RecordStore",
    "Scalar",
    "Software",
    "StepReport",
    "Timing",
    "Verification",
    "Verified",
    "describe_machine",
    "describe_software",
    "finite_or_none",
    "make_record",
    "read_step_report",
    "record_of_timing",
    "timing_of",
    "utc_now",
    "writer_name",
]
