"""Everything that is found out about a graph before planning, in a time nearly free of its depth.

Rules are looked up once for each kind of operator, and dimension classes and labels are found on a
graph whose runs of equal units are cut short (``shorten``). What remains for each operator is to
see of which kind it is and to which segment it belongs.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.graph.dimensions import DimensionLabels, label_dimensions
from meshwright.graph.factors import FactorAnalysis, analyze_factors, rules_of
from meshwright.graph.kinds import op_kinds
from meshwright.graph.opgraph import OpGraph
from meshwright.graph.periods import Periods, find_periods
from meshwright.graph.segments import Segmentation, find_segments
from meshwright.graph.shorten import shortened

__all__ = ["AnalyzedGraph", "analyze_graph"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzedGraph:
    """A graph with its rules, classes, segments, labels and runs of equal units."""

    analysis: FactorAnalysis
    """Units left out of the short graph share the classes inside them with the unit that stands
    for them; sizes, places and labels are those of a graph analyzed whole."""
    segmentation: Segmentation
    labels: DimensionLabels
    periods: Periods


def analyze_graph(graph: OpGraph) -> AnalyzedGraph:
    """Analyze ``graph``, whose factories are explicit (``with_explicit_factories``)."""
    kinds = op_kinds(graph)
    rules, _ = rules_of(graph, kinds)
    segmentation = find_segments(graph, rules, kinds)
    periods = find_periods(graph, segmentation, kinds)
    classes = [segment.segment_class for segment in segmentation.segments]
    short = shortened(graph, segmentation, periods, classes)
    if short is None:
        analysis = analyze_factors(graph)
        labels = label_dimensions(analysis, segmentation)
    else:
        short_analysis = analyze_factors(short.graph)
        labels = short.whole_labels(label_dimensions(short_analysis, short.segmentation))
        analysis = short.whole_analysis(short_analysis, graph)
    return AnalyzedGraph(
        analysis=analysis, segmentation=segmentation, labels=labels, periods=periods
    )
