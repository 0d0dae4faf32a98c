"""Fits the cost model: parts trained one after another, in a folder a killed fit goes on from."""

from __future__ import annotations

from meshwright.gnn_cost.fitting.folder import require_fresh
from meshwright.gnn_cost.fitting.orchestrate import CARD_NAME, FitResult, fit
from meshwright.gnn_cost.fitting.parts import (
    FitData,
    FitSettings,
    Part,
    PartContext,
    PartResult,
    SplitError,
    WorstCases,
)

__all__ = [
    "CARD_NAME",
    "FitData",
    "FitResult",
    "FitSettings",
    "Part",
    "PartContext",
    "PartResult",
    "SplitError",
    "WorstCases",
    "fit",
    "require_fresh",
]
