"""Operators: what there is to measure, with which sizes, and in which order."""

from __future__ import annotations

from meshwright.profiling.operators.candidate import Candidate, Direction, DtypeName, Work
from meshwright.profiling.operators.catalog import FAMILIES
from meshwright.profiling.operators.running import OperatorBench
from meshwright.profiling.operators.sampling import Limits, sampled_candidates
from meshwright.profiling.operators.sweep import SweepPlan, SweepResult, measured_here, run_sweep
from meshwright.profiling.operators.uncertainty import NeighborUncertainty, Uncertainty

__all__ = [
    "FAMILIES",
    "Candidate",
    "Direction",
    "DtypeName",
    "Limits",
    "NeighborUncertainty",
    "OperatorBench",
    "SweepPlan",
    "SweepResult",
    "Uncertainty",
    "Work",
    "measured_here",
    "run_sweep",
    "sampled_candidates",
]
