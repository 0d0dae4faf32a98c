"""Runs a plan: programs become code, ranks become processes, and the result is checked."""

from __future__ import annotations

from meshwright.runtime.compile import CompiledFunction, compile_function
from meshwright.runtime.dryrun import DryRun, Traffic, dry_run, expected_traffic
from meshwright.runtime.executor import StageExecutor, StepResult
from meshwright.runtime.job import PlannedRun, open_plan
from meshwright.runtime.launch import launch
from meshwright.runtime.mesh import Coordinate, Group, Layout, layout_of, make_groups
from meshwright.runtime.rank import RankEngine
from meshwright.runtime.session import RankSession, process_group
from meshwright.runtime.state import RankState, assemble_parameter, slice_tensor
from meshwright.runtime.verify import Steps, compare, reference_steps, source_of, verify_virtual
from meshwright.runtime.virtual import VirtualCluster

__all__ = [
    "CompiledFunction",
    "Coordinate",
    "DryRun",
    "Group",
    "Layout",
    "PlannedRun",
    "RankEngine",
    "RankSession",
    "RankState",
    "StageExecutor",
    "StepResult",
    "Steps",
    "Traffic",
    "VirtualCluster",
    "assemble_parameter",
    "compare",
    "compile_function",
    "dry_run",
    "expected_traffic",
    "launch",
    "layout_of",
    "make_groups",
    "open_plan",
    "process_group",
    "reference_steps",
    "slice_tensor",
    "source_of",
    "verify_virtual",
]
