from __future__ import annotations

import json
from dataclasses import replace

import pytest

from meshwright.errors import BadRequest
from meshwright.graph.opgraph import (
    GraphInput,
    GraphOutput,
    InputRole,
    Literal,
    Op,
    OpGraph,
    OutputRole,
    Phase,
    Ref,
    TensorSpec,
)
from meshwright.graph.serialize import graph_from_json, graph_sha256, graph_text, graph_to_json

ROW = TensorSpec(shape=(2,), dtype="float32", stride=(1,))
SCALAR = TensorSpec(shape=(), dtype="float32", stride=())


def toy() -> OpGraph:
    """A graph with every kind of argument; it would not run."""
    return OpGraph(
        name="toy",
        values=(ROW, ROW, ROW, SCALAR, ROW),
        inputs=(
            GraphInput(value=0, name="w", role=InputRole.PARAMETER, tied_names=("also_w",)),
            GraphInput(value=1, name="args.0", role=InputRole.DATA),
        ),
        ops=(
            Op(
                index=0,
                target="aten.clamp.default",
                args=(Ref(0), float("-inf"), 1.0),
                outputs=(2,),
                phase=Phase.FORWARD,
                module_path="layer",
                source="toy.py:3",
                bytes_read=8,
                bytes_written=8,
            ),
            Op(
                index=1,
                target="aten.sum.default",
                args=(Ref(2),),
                kwargs=(("dtype", Literal("dtype", "float32")),),
                outputs=(3, None),
                phase=Phase.FORWARD,
                flop=2,
            ),
            Op(
                index=2,
                target="aten.full.default",
                args=((2, (Ref(3), None)), 1, True, "tanh"),
                outputs=(4,),
                phase=Phase.BACKWARD,
                forward_op=1,
            ),
        ),
        outputs=(
            GraphOutput(value=3, name="loss", role=OutputRole.LOSS),
            GraphOutput(value=4, name="w", role=OutputRole.GRADIENT),
        ),
    )


def test_json_gives_the_graph_back() -> None:
    assert toy() == graph_from_json(graph_to_json(toy()))


def test_json_has_no_nan_or_infinity_literals() -> None:
    document = json.loads(graph_to_json(toy()), parse_constant=pytest.fail)

    assert {"float": "-inf"} == document["ops"][0]["args"][1]


def test_text_shows_values_operators_and_outputs() -> None:
    expected = (
        "%0:float32[2](1) = parameter\n"
        "%1:float32[2](1) = data\n"
        "%2:float32[2](1) = aten.clamp.default(%0, -inf, 1.0) forward\n"
        "%3:float32[](), none = aten.sum.default(%2, dtype=dtype:float32) forward\n"
        '%4:float32[2](1) = aten.full.default([2, [%3, None]], 1, True, "tanh") backward of op 1\n'
        "loss %3\n"
        "gradient %4 of %0\n"
    )

    assert expected == graph_text(toy())


def test_the_digest_ignores_names_but_nothing_that_is_computed() -> None:
    graph = toy()
    renamed = replace(
        graph,
        name="other",
        inputs=(
            replace(graph.inputs[0], name="v", tied_names=("also_v",)),
            replace(graph.inputs[1], name="kwargs.x"),
        ),
        ops=tuple(replace(op, module_path="elsewhere", source="") for op in graph.ops),
        outputs=(graph.outputs[0], replace(graph.outputs[1], name="v")),
    )
    changed = replace(graph, ops=(replace(graph.ops[0], args=(Ref(0), 0.0)), *graph.ops[1:]))

    assert graph_sha256(graph) == graph_sha256(renamed)
    assert graph_sha256(graph) != graph_sha256(changed)


def _edited(*path: str | int, to: object) -> str:
    document = json.loads(graph_to_json(toy()))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        (_edited("version", to=2), "version 1, got 'meshwright.opgraph' version 2"),
        (_edited("values", 0, to=["float99", [2], [1]]), "bad tensor description"),
        (_edited("ops", 0, "args", to=[{"ref": -1}]), "-1 is not a number from 0 up"),
        (_edited("ops", 0, "args", to=[{"ref": 4}]), "operator 0 .* reads a value made after it"),
        (_edited("ops", 0, "args", to=[{"code": "x"}]), "unknown kind of argument 'code'"),
        (_edited("ops", 0, "outputs", to=[9]), "makes value 9"),
        (_edited("ops", 0, "phase", to="sideways"), "sideways"),
        (_edited("ops", 2, "forward_op", to=2), "operator 2 .* differentiates a later one"),
        (_edited("outputs", 0, "value", to=8), "output loss is value 8"),
    ],
)
def test_a_damaged_document_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        graph_from_json(text)

    assert "\n" not in str(caught.value)
