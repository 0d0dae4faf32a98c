"""Where the program is cut."""

from __future__ import annotations

import pytest

from meshwright.graph.analyzed import analyze_graph
from meshwright.graph.factors import analyze_factors
from meshwright.graph.segments import find_segments
from meshwright.graph.simplify import with_explicit_factories
from tests.cost.graphs import zoo
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


@pytest.mark.parametrize("model", ["tiny-t5", "tiny-clip", "tiny-unet", "tiny-gpt-moe"])
def test_no_segment_joins_operators_that_have_nothing_to_do_with_each_other(model: str) -> None:
    """Within a segment every two forward operators are connected by values made in it."""
    graph = with_explicit_factories(zoo(model, 4))
    found = analyze_graph(graph).segmentation
    maker = {value: op.index for op in graph.ops for value in op.results if value is not None}
    parts = {}
    for segment in found.segments:
        mine = set(segment.forward_ops)
        pieces = [{op} for op in mine]
        for op in mine:
            for value in graph.ops[op].inputs:
                if maker.get(value) in mine:
                    one, other = (next(p for p in pieces if end in p) for end in (op, maker[value]))
                    if one is not other:
                        one |= other
                        pieces.remove(other)
        parts[segment.name] = len(pieces)

    assert {name: 1 for name in parts} == parts


def test_encoder_and_decoder_share_no_segment() -> None:
    """The encoder's last norm is light and the decoder's embedding is heavy: not one segment."""
    graph = with_explicit_factories(zoo("tiny-t5", 4))
    sides = [
        {graph.ops[op].module_path.split(".")[0] for op in segment.forward_ops}
        & {"encoder", "decoder"}
        for segment in analyze_graph(graph).segmentation.segments
    ]

    assert all(len(found) <= 1 for found in sides)
    assert {"encoder"} in sides
    assert {"decoder"} in sides
