"""The captured program and what can be said of it without running it."""

from __future__ import annotations

from meshwright.graph.factors import FactorAnalysis, LeafFactor, analyze_factors
from meshwright.graph.opgraph import (
    GraphInput,
    GraphOutput,
    InputRole,
    Op,
    OpGraph,
    OutputRole,
    Phase,
    Ref,
    TensorSpec,
)

__all__ = [
    "FactorAnalysis",
    "GraphInput",
    "GraphOutput",
    "InputRole",
    "LeafFactor",
    "Op",
    "OpGraph",
    "OutputRole",
    "Phase",
    "Ref",
    "TensorSpec",
    "analyze_factors",
]
