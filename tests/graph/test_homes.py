"""Segments are named after, and pinned by, the modules whose work they do."""

from __future__ import annotations

import pytest

from meshwright.graph.homes import SegmentHome, home_path, segment_homes
from meshwright.graph.opgraph import Op, OpGraph, Phase
from tests.cost.graphs import tiny_gpt


def op(path: str, *, flop: int = 0, moved_bytes: int = 0) -> Op:
    return Op(
        index=0,
        target="aten.x",
        args=(),
        outputs=(None,),
        phase=Phase.FORWARD,
        module_path=path,
        flop=flop,
        bytes_read=moved_bytes,
    )


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        # A norm and an addition beside the attention.
        ([op("l.0.norm"), op("l.0.attn.q", flop=5), op("l.0.attn.k", flop=5)], "l.0.attn"),
        # Nothing holds nine tenths: what all have in common.
        ([op("l.0.attn", flop=50), op("l.0.mlp", flop=50)], "l.0"),
        ([op("l.0.attn", flop=91), op("l.0.mlp", flop=9)], "l.0.attn"),
        # The loss at the root says nothing where there is other work.
        ([op(""), op("norm"), op("head", flop=1)], "head"),
        ([op("a", flop=1), op("", flop=9)], "a"),
        # Bytes count where there is no flop.
        ([op("table", moved_bytes=99), op("table.inner", moved_bytes=1)], "table"),
        ([op("")], ""),
        ([], ""),
    ],
)  # fmt: skip
def test_home_path(ops: list[Op], expected: str) -> None:
    assert expected == home_path(ops)


def test_most_of_the_work_or_of_the_parameters() -> None:
    home = SegmentHome(work={"a": 0.5, "b": 0.25, "c": 0.25}, parameters={"d": 1.0})

    assert home.is_mostly({"a"})
    assert home.is_mostly({"b", "c"})
    assert home.is_mostly({"d"})
    assert not home.is_mostly({"b"})
    assert not SegmentHome(work={}, parameters={}).is_mostly({"a"})


def test_a_tied_parameter_belongs_to_its_first_reader() -> None:
    graph: OpGraph = tiny_gpt(16)
    readers = {
        number: tuple(op.index for op in graph.ops if number in op.inputs and op.phase == "forward")
        for number in [item.value for item in graph.parameters][:1]
    }
    ((number, ops),) = readers.items()
    name = next(item.name for item in graph.parameters if item.value == number)
    first, again = segment_homes(graph, [ops, ops])

    assert {name.rpartition(".")[0]: 1.0} == first.parameters
    assert {} == again.parameters
