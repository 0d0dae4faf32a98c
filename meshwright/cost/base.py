"""What a cost model is, and the estimate it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from meshwright.plans.plan import ParallelPlan, Prediction

__all__ = ["CostEstimate", "CostModel", "Source"]


class Source(StrEnum):
    """Where a number comes from."""

    MEASURED = "measured"
    LEARNED = "learned"
    ANALYTIC = "analytic"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostEstimate:
    """Time of something, by cause, and where the figure comes from."""

    breakdown_s: Mapping[str, float]
    """Seconds by cause; they sum to ``time_s``."""
    source: frozenset[Source]

    @property
    def time_s(self) -> float:
        """Sum over the causes."""
        return sum(self.breakdown_s.values())

    def then(self, other: CostEstimate) -> CostEstimate:
        """``self`` and then ``other`` on the same devices."""
        causes = dict.fromkeys((*self.breakdown_s, *other.breakdown_s))
        return CostEstimate(
            breakdown_s={
                cause: self.breakdown_s.get(cause, 0.0) + other.breakdown_s.get(cause, 0.0)
                for cause in causes
            },
            source=self.source | other.source,
        )


class CostModel(Protocol):
    """Predicts what one training step of a plan costs, for one graph on one cluster."""

    def predict(self, plan: ParallelPlan) -> Prediction:
        """Step time and peak memory of ``plan``.

        Raises:
            PlanRefused: the plan cannot be carried out on the graph.
        """
        ...
