"""What a person reads: plans, predictions and measurements as words and tables."""

from __future__ import annotations

from meshwright.report.summary import DemoRun, DemoSummary, demo_markdown, speed_up_words
from meshwright.report.tables import (
    alternatives_table,
    breakdown_tables,
    facts_table,
    measured_table,
    plans_table,
    segments_table,
)
from meshwright.report.words import (
    cause_words,
    correction_words,
    memory_margin_words,
    mesh_words,
    prediction_words,
    schedule_words,
    shard_words,
    source_of,
)

__all__ = [
    "DemoRun",
    "DemoSummary",
    "alternatives_table",
    "breakdown_tables",
    "cause_words",
    "correction_words",
    "demo_markdown",
    "facts_table",
    "measured_table",
    "memory_margin_words",
    "mesh_words",
    "plans_table",
    "prediction_words",
    "schedule_words",
    "segments_table",
    "shard_words",
    "source_of",
    "speed_up_words",
]
