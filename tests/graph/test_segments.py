"""Where the program is cut."""

from __future__ import annotations

from meshwright.graph.factors import analyze_factors
from meshwright.graph.segments import find_segments
from meshwright.graph.simplify import with_explicit_factories
from tests.cost.towers import towers


def test_the_end_of_a_branch_stays_with_its_branch() -> None:
    """The last tanh of the left tower is light; the product after it is the right tower's."""
    analysis = analyze_factors(with_explicit_factories(towers()))

    segments = find_segments(analysis.graph, analysis.rules).segments

    towers_of = [
        {analysis.graph.ops[op].module_path.split(".")[0] for op in segment.forward_ops}
        & {"left", "right"}
        for segment in segments
    ]
    assert all(len(found) == 1 for found in towers_of)
    assert {"left"} in towers_of
    assert {"right"} in towers_of
