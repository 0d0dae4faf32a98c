"""Runs of equal units, and short graphs that stand for deep ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.graph.analyzed import analyze_graph
from meshwright.graph.dimensions import label_dimensions
from meshwright.graph.factors import analyze_factors
from meshwright.graph.kinds import op_kinds
from meshwright.graph.opgraph import OpGraph
from meshwright.graph.periods import NUM_KEPT, Run, find_periods
from meshwright.graph.segments import Segmentation, find_segments
from meshwright.graph.serialize import graph_from_json, graph_text, graph_to_json
from meshwright.graph.shorten import Short, shortened
from tests.graph.deep import Gathered, Shared, captured, stack


def segmented(graph: OpGraph) -> Segmentation:
    return find_segments(graph, analyze_factors(graph).rules)


def runs_of(graph: OpGraph) -> tuple[Run, ...]:
    return find_periods(graph, segmented(graph), op_kinds(graph)).runs


def short_of(graph: OpGraph, colors: list[object] | None = None) -> Short | None:
    segmentation = segmented(graph)
    periods = find_periods(graph, segmentation, op_kinds(graph))
    classes = [segment.segment_class for segment in segmentation.segments]
    return shortened(graph, segmentation, periods, classes if colors is None else colors)


def test_a_stack_of_equal_blocks_is_one_run() -> None:
    """But for the first or last, which what stands before or behind may join."""
    (run,) = runs_of(stack(*(16,) * 9))

    assert 1 == run.period
    assert run.num_units in {7, 8}


@pytest.mark.parametrize("depth", [8, 11, 40])
def test_the_short_graph_does_not_depend_on_the_depth(depth: int) -> None:
    """Without names it is the short graph of nine blocks, operator by operator."""
    expected, found = short_of(stack(*(16,) * 9)), short_of(stack(*(16,) * depth))

    assert expected is not None
    assert found is not None
    assert graph_text(expected.graph) == graph_text(found.graph)
    assert expected.segmentation.segment_of_op == found.segmentation.segment_of_op


def test_the_short_graph_is_the_graph_of_a_shallow_module() -> None:
    """Seven blocks, whose run of five is too short to cut, or nine with the run cut to five."""
    whole = stack(*(16,) * 9)
    short = short_of(whole)
    assert short is not None
    (run,) = runs_of(whole)
    shallow = stack(*(16,) * (9 - run.num_units + NUM_KEPT))

    assert graph_text(shallow) == graph_text(short.graph)
    assert segmented(shallow).segment_of_op == short.segmentation.segment_of_op


def test_a_short_graph_is_consistent() -> None:
    """Reading a graph checks that every value is made once, before it is read."""
    short = short_of(stack(*(16,) * 12))
    assert short is not None

    assert short.graph == graph_from_json(graph_to_json(short.graph))


def test_what_stands_for_an_operator_is_of_its_kind() -> None:
    """Every operator of the deep graph, with its segment's class."""
    graph = stack(*(16,) * 12)
    short, segmentation = short_of(graph), segmented(graph)
    assert short is not None
    source = short.ops.source.tolist()

    assert len(short.graph.ops) < len(graph.ops)
    for op in graph.ops:
        like = short.graph.ops[source[op.index]]
        assert (op.target, op.flop, op.phase) == (like.target, like.flop, like.phase)
        segment = segmentation.segment_of_op[op.index]
        assert segment < 0 or (
            segmentation.segments[segment].segment_class
            == short.segmentation.segments[short.segments.source[segment]].segment_class
        )


def test_the_analysis_of_a_deep_graph_is_that_of_the_whole() -> None:
    """Rules, labels and sizes are equal; only classes of equal blocks may be shared."""
    graph = stack(*(16,) * 12)
    found, whole = analyze_graph(graph), analyze_factors(graph)
    segmentation = find_segments(graph, whole.rules)
    labels = label_dimensions(whole, segmentation)

    assert whole.rules == found.analysis.rules
    assert segmentation == found.segmentation
    assert [
        {name: whole.class_size[leaf] for name, leaf in names.items()}
        for names in labels.by_segment
    ] == [
        {name: found.analysis.class_size[leaf] for name, leaf in names.items()}
        for names in found.labels.by_segment
    ]
    for op in graph.ops:
        assert [replace(f, dimension_class=0) for f in whole.leaf_factors[op.index]] == [
            replace(f, dimension_class=0) for f in found.analysis.leaf_factors[op.index]
        ]


def test_a_block_that_differs_ends_a_run() -> None:
    """Six blocks before it are too few once the first is not like the others."""
    runs = runs_of(stack(*(16,) * 9, 24, *(16,) * 9))

    assert 2 == len(runs)
    assert () == runs_of(stack(*(16,) * 4, 24, *(16,) * 4))


def test_colors_cut_a_run_into_stretches() -> None:
    """The run's first eight segments are treated in one way, the others in another."""
    graph = stack(*(16,) * 20)
    (run,) = runs_of(graph)
    count = len(segmented(graph).segments)
    colors: list[object] = [number < run.first_segment + 8 for number in range(count)]
    short = short_of(graph, colors)
    assert short is not None

    assert (8, run.num_units - 8) == short.stretches
    assert count - run.num_units + 2 * NUM_KEPT == len(short.segmentation.segments)
    assert short_of(graph, list(range(count))) is None


def test_units_that_are_read_at_the_end_are_no_run() -> None:
    """Every block's result is an operand of the last operator."""
    assert () == runs_of(captured(Gathered((16,) * 9)))


def test_blocks_with_one_parameter_are_a_run() -> None:
    """They repeat operator by operator; that their gradients come together is for others to see."""
    (run,) = runs_of(captured(Shared(9)))

    assert 8 == run.num_units
