"""What a plan costs: roofline, collectives, memory, pipelines, and tables to read it from."""

from __future__ import annotations

from meshwright.cost.base import CostEstimate, CostModel, Source
from meshwright.cost.collectives import CollectivePrices, collective_time_s
from meshwright.cost.memory import StageMemory
from meshwright.cost.model import StepCostModel, choice_of, split_of
from meshwright.cost.pipeline import finish_times_s, simulate_many
from meshwright.cost.roofline import Roofline, roofline_of
from meshwright.cost.step import TIME_CAUSES, Choice, StepCost, StepPricer
from meshwright.cost.table import CollectiveCount, CostTable, Split

__all__ = [
    "TIME_CAUSES",
    "Choice",
    "CollectiveCount",
    "CollectivePrices",
    "CostEstimate",
    "CostModel",
    "CostTable",
    "Roofline",
    "Source",
    "Split",
    "StageMemory",
    "StepCost",
    "StepCostModel",
    "StepPricer",
    "choice_of",
    "collective_time_s",
    "finish_times_s",
    "roofline_of",
    "simulate_many",
    "split_of",
]
