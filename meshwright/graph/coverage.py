"""How much of a graph the factor rules cover, and which dimension classes they find."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from meshwright.graph.dimensions import DimensionLabels
from meshwright.graph.factors import FactorAnalysis
from meshwright.graph.segments import Segmentation

__all__ = ["OperatorCoverage", "RuleCoverage", "SegmentDimensions", "rule_coverage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCoverage:
    """All operators of one target."""

    target: str
    count: int
    flop: int
    flop_fraction: float
    """Of all floating-point operations of the step."""
    has_rule: bool
    """Otherwise it runs whole on every device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentDimensions:
    """What a class of equal segments may be cut along."""

    segment_class: int
    name: str
    """Module path of the first."""
    count: int
    sizes: dict[str, int]
    """Label to the size that must divide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleCoverage:
    """What the rules make of one graph."""

    operators: tuple[OperatorCoverage, ...]
    """Most work first, then most operators."""
    covered_fraction: float
    """Of operators."""
    covered_flop_fraction: float
    segments: tuple[SegmentDimensions, ...]

    @property
    def without_rule(self) -> tuple[str, ...]:
        """Targets that are replicated."""
        return tuple(item.target for item in self.operators if not item.has_rule)


def rule_coverage(
    analysis: FactorAnalysis, segmentation: Segmentation, labels: DimensionLabels
) -> RuleCoverage:
    """Operators by target with and without a rule, and the labels of every segment class."""
    ops = analysis.graph.ops
    counts = Counter(op.target for op in ops)
    flop: Counter[str] = Counter()
    for op in ops:
        flop[op.target] += op.flop
    total = max(sum(flop.values()), 1)
    missing = frozenset(analysis.operators_without_rule)
    operators = tuple(
        OperatorCoverage(
            target=target,
            count=count,
            flop=flop[target],
            flop_fraction=flop[target] / total,
            has_rule=target not in missing,
        )
        for target, count in sorted(
            counts.items(), key=lambda item: (-flop[item[0]], -item[1], item[0])
        )
    )
    return RuleCoverage(
        operators=operators,
        covered_fraction=1 - sum(counts[target] for target in missing) / max(len(ops), 1),
        covered_flop_fraction=1 - sum(flop[target] for target in missing) / total,
        segments=tuple(
            SegmentDimensions(
                segment_class=segment.segment_class,
                name=segment.name,
                count=count,
                sizes={
                    label: analysis.class_size[leaf]
                    for label, leaf in labels.by_segment[segment.index].items()
                },
            )
            for segment, count in zip(
                segmentation.representatives(), segmentation.multiplicity(), strict=True
            )
        ),
    )
