"""What collectives cost: a few constants of physical formulas, fitted to measurements.

``samples`` (what was measured) -> ``terms`` and ``model`` (the formulas) -> ``fit`` and
``training`` (their constants, on ``splits``) -> ``pricer`` (what the core is handed).
"""

from __future__ import annotations

from meshwright.gnn_cost.collectives.pricer import (
    CollectiveModel,
    LearnedCollectives,
    Range,
    load_collectives,
    parse_collectives,
    pretrained_collectives,
)

__all__ = [
    "CollectiveModel",
    "LearnedCollectives",
    "Range",
    "load_collectives",
    "parse_collectives",
    "pretrained_collectives",
]
