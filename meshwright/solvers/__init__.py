"""What decides a plan: rules of thumb, enumeration, and the portfolio around them."""

from __future__ import annotations

from meshwright.solvers.exhaustive import Exhaustive
from meshwright.solvers.layerwise import LayerwiseDP, LayerwiseILP
from meshwright.solvers.planner import (
    PlanningResult,
    RunnerUp,
    SearchSummary,
    make_context,
    plan_graph,
)
from meshwright.solvers.portfolio import Alternative, PortfolioResult, run_portfolio
from meshwright.solvers.rules import RULES, Rule

__all__ = [
    "RULES",
    "Alternative",
    "Exhaustive",
    "LayerwiseDP",
    "LayerwiseILP",
    "PlanningResult",
    "PortfolioResult",
    "Rule",
    "RunnerUp",
    "SearchSummary",
    "make_context",
    "plan_graph",
    "run_portfolio",
]
