"""ParallelPlan: what to run where, as a value and as a JSON file."""

from __future__ import annotations

from meshwright.plans.checks import check_plan, check_structure
from meshwright.plans.io import plan_json_schema, plan_sha256, plan_text, read_plan, write_plan
from meshwright.plans.plan import (
    AXIS_NAMES,
    SCHEMA_VERSION,
    SOURCES,
    CommunicationOptions,
    Compression,
    GraphReference,
    JobSpec,
    Mesh,
    OptimizerName,
    OptimizerSpec,
    ParallelPlan,
    Precision,
    Prediction,
    Provenance,
    Recompute,
    ScheduleName,
    SegmentPlan,
    Stage,
)
from meshwright.plans.runnable import check_runnable, unrunnable_reasons

__all__ = [
    "AXIS_NAMES",
    "SCHEMA_VERSION",
    "SOURCES",
    "CommunicationOptions",
    "Compression",
    "GraphReference",
    "JobSpec",
    "Mesh",
    "OptimizerName",
    "OptimizerSpec",
    "ParallelPlan",
    "Precision",
    "Prediction",
    "Provenance",
    "Recompute",
    "ScheduleName",
    "SegmentPlan",
    "Stage",
    "check_plan",
    "check_runnable",
    "check_structure",
    "plan_json_schema",
    "plan_sha256",
    "plan_text",
    "read_plan",
    "unrunnable_reasons",
    "write_plan",
]
