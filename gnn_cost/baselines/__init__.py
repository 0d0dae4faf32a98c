"""Plain models of what operators cost, kept beside the network: roofline, per-family MLP, trees."""

from __future__ import annotations

from meshwright.gnn_cost.baselines.base import OperatorModel
from meshwright.gnn_cost.baselines.mlp import FamilyMlp
from meshwright.gnn_cost.baselines.roofline import FittedRoofline, PlainRoofline
from meshwright.gnn_cost.baselines.trees import BoostedTrees

__all__ = ["BoostedTrees", "FamilyMlp", "FittedRoofline", "OperatorModel", "PlainRoofline"]
