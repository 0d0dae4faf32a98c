"""Compiled functions: late waits, in-place reductions, freed inputs, refusals."""

from __future__ import annotations

import weakref

import pytest
import torch

from meshwright.errors import PlanRefused
from meshwright.graph.opgraph import Ref, TensorSpec
from meshwright.runtime import adapter
from meshwright.runtime.compile import CompiledFunction, compile_function
from meshwright.runtime.mesh import Coordinate, Group
from meshwright.spmd.program import (
    Collective,
    CollectiveKind,
    Compute,
    CoordinateInt,
    Function,
    Instruction,
)

COORDINATE = Coordinate(shape=(1, 2, 1, 1, 3), index=(0, 1, 0, 0, 2))
SPEC = TensorSpec(shape=(4,), dtype="float32", stride=(1,))


def _compile(
    body: tuple[Instruction, ...], outputs: tuple[int, ...], *, group_size: int = 2
) -> CompiledFunction:
    return compile_function(
        Function(name="f", inputs=(0,), outputs=outputs, body=body),
        values=(SPEC,) * 10,
        coordinate=COORDINATE,
        groups={("tp",): Group(name="g", size=group_size)},
        device=torch.device("cpu"),
    )


def _op(target: str, output: int, *args: object) -> Compute:
    return Compute(target=target, args=args, outputs=(output,))


def _all_reduce(operand: int, output: int) -> Collective:
    return Collective(
        kind=CollectiveKind.ALL_REDUCE,
        axes=("tp",),
        reduction="sum",
        input=operand,
        output=output,
        num_bytes=16,
    )


def _names(compiled: CompiledFunction) -> list[str]:
    """Operators in order, without their namespace and overload."""
    return [
        str(node.target).split(".")[-2] if "." in str(node.target) else node.name
        for node in compiled.module.graph.nodes
        if node.op == "call_function"
    ]


def test_a_collective_is_awaited_just_before_its_first_use() -> None:
    """The ReLU that does not need the sum runs while it travels; the last sum waits at the end."""
    body = (
        _op("aten.neg.default", 1, Ref(0)),
        _all_reduce(1, 2),
        _op("aten.relu.default", 3, Ref(0)),
        _op("aten.add.Tensor", 4, Ref(2), Ref(3)),
        _all_reduce(4, 5),
        _op("aten.relu.default", 6, Ref(3)),
    )

    assert [
        "neg",
        "contiguous",
        "all_reduce_",
        "relu",
        "wait_tensor",
        "add",
        "contiguous",
        "all_reduce_",
        "relu",
        "wait_tensor",
    ] == _names(_compile(body, (6, 5)))


@pytest.mark.parametrize(
    "body",
    [
        (_all_reduce(0, 1),),
        (_op("aten.view.default", 2, Ref(0), (4,)), _all_reduce(2, 1)),
        (
            _op("aten.neg.default", 2, Ref(0)),
            _all_reduce(2, 1),
            _op("aten.neg.default", 3, Ref(2)),
        ),
        (_op("meshwright.pack", 2, (Ref(0),), (4,)), _all_reduce(2, 1)),
    ],
    ids=["an input", "a view of one", "read again", "a pack of one input"],
)
def test_a_reduction_in_place_spares_memory_that_others_see(body: tuple[Instruction, ...]) -> None:
    assert "all_reduce" in _names(_compile(body, (1,)))


def test_a_group_of_one_needs_no_collective() -> None:
    compiled = _compile((_all_reduce(0, 1),), (1,), group_size=1)

    assert [] == _names(compiled)
    assert [1.0] == compiled.run([torch.ones(1)])[0].tolist()


def test_coordinates_become_integers() -> None:
    """Position of (dp_shard 1, tp 2) over both axes is 1 * 3 + 2 = 5: start 1 + 2 * 5."""
    start = CoordinateInt(axes=("dp_shard", "tp"), scale=2, offset=1)
    compiled = _compile((_op("meshwright.narrow", 1, Ref(0), 0, start, 2),), (1,))

    assert [11, 12] == compiled.run([torch.arange(20)])[0].tolist()


def test_inputs_are_freed_after_their_last_use() -> None:
    compiled = _compile(
        (_op("aten.neg.default", 1, Ref(0)), _op("meshwright.zero_unless", 2, Ref(1), 0)), (2,)
    )
    tensor = torch.ones(3)
    is_alive = weakref.ref(tensor)
    arguments = [tensor]
    del tensor
    compiled.run(arguments)

    assert is_alive() is None
    assert [] == arguments


def test_operators_with_several_results() -> None:
    """A list of tensors and a tuple, of which only some are used; nested lists of tensors."""
    split = Compute(target="aten.split.Tensor", args=(Ref(0), 2), outputs=(1, None))
    best = Compute(target="aten.max.dim", args=(Ref(1), 0), outputs=(None, 4))
    compiled = _compile(
        (
            split,
            best,
            _op("aten.unsqueeze.default", 2, Ref(4), 0),
            Compute(target="aten.index.Tensor", args=(Ref(1), (Ref(2),)), outputs=(3,)),
        ),
        (3,),
    )

    assert [7.0] == compiled.run([torch.tensor([5.0, 7.0, 9.0, 1.0])])[0].tolist()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ((_op("aten.neg.default", 1, Ref(7)),), "value 7 is read before it is made"),
        ((_op("aten.no_such_op.default", 1, Ref(0)),), "operator aten.no_such_op.default"),
    ],
)
def test_wrong_programs_are_refused(body: tuple[Instruction, ...], message: str) -> None:
    with pytest.raises(PlanRefused, match=message):
        _compile(body, (1,))


def test_results_below_autograd_are_ordinary_tensors() -> None:
    weight = torch.ones(2, requires_grad=True)
    with adapter.below_autograd():
        result = torch.ops.aten.mul.Tensor(weight, 2)

    assert not result.requires_grad
    assert not result.is_inference()
