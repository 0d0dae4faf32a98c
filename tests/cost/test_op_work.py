"""Operators of captured graphs as families and sizes, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from meshwright.cost.op_work import OpWork, OpWorks, family_of
from meshwright.cost.work import DTYPES, Family
from meshwright.graph.opgraph import (
    Arg,
    GraphInput,
    InputRole,
    Op,
    OpGraph,
    Phase,
    Ref,
    TensorSpec,
    contiguous_stride,
)
from meshwright.graph.rules.table import rule_of
from tests.cost.graphs import tiny_gpt, two_linear, zoo

Shape = tuple[int, ...]


def work_of(
    target: str,
    operands: Sequence[Shape],
    results: Sequence[Shape | None],
    *arguments: Arg,
    dtypes: tuple[str, ...] = (),
) -> OpWork:
    """Work of one operator whose first arguments are its operands.

    ``dtypes`` are those of the operands and the results, ``bfloat16`` where none is given.
    """
    shapes = [*operands, *(shape for shape in results if shape is not None)]
    names = (*dtypes, *("bfloat16",) * (len(shapes) - len(dtypes)))
    values = tuple(
        TensorSpec(shape=shape, dtype=name, stride=contiguous_stride(shape))
        for shape, name in zip(shapes, names, strict=True)
    )
    numbers = iter(range(len(operands), len(shapes)))
    op = Op(
        index=0,
        target=target,
        args=(*(Ref(number) for number in range(len(operands))), *arguments),
        outputs=tuple(None if shape is None else next(numbers) for shape in results),
        phase=Phase.FORWARD,
    )
    inputs = tuple(
        GraphInput(value=number, name=f"x{number}", role=InputRole.DATA)
        for number in range(len(operands))
    )
    graph = OpGraph(name="one", values=values, inputs=inputs, ops=(op,), outputs=())
    return OpWorks(graph).of(op)


def sizes(work: OpWork) -> tuple[float, ...]:
    return tuple(size.whole for size in work.sizes)


def test_products() -> None:
    assert (1, 16, 8, 4) == sizes(work_of("aten.mm.default", [(16, 4), (4, 8)], [(16, 8)]))
    assert (1, 16, 8, 4) == sizes(work_of("aten.addmm.default", [(8,), (16, 4), (4, 8)], [(16, 8)]))
    assert (1, 16, 1, 4) == sizes(work_of("aten.mv.default", [(16, 4), (4,)], [(16,)]))
    assert (1, 1, 1, 4) == sizes(work_of("aten.dot.default", [(4,), (4,)], [()]))
    assert (3, 16, 8, 4) == sizes(
        work_of("aten.bmm.default", [(3, 16, 4), (3, 4, 8)], [(3, 16, 8)])
    )


def test_rows_of_experts_are_shared_evenly() -> None:
    forward = work_of("aten._grouped_mm.default", [(24, 4), (3, 4, 8)], [(24, 8)])
    weights = work_of("aten._grouped_mm.default", [(4, 24), (24, 8)], [(3, 4, 8)])

    assert (Family.GROUPED_MATMUL, (3, 8, 8, 4)) == (forward.family, sizes(forward))
    assert (3, 4, 8, 8) == sizes(weights)


def test_causal_attention_counts_attended_pairs() -> None:
    """Of 4 x 4 pairs a causal mask leaves 10; with 2 queries and 4 keys 3 of 8; with 4 and 2 7."""
    name = "aten._scaled_dot_product_flash_attention_for_cpu"

    def forward(queries: int, keys: int, causal: bool) -> OpWork:
        shapes = [(2, 3, queries, 8), (2, 3, keys, 8), (2, 3, keys, 8)]
        results: list[Shape | None] = [(2, 3, queries, 8), (2, 3, queries)]
        return work_of(f"{name}.default", shapes, results, 0.0, causal)

    assert (6, 4, 4, 8) == sizes(forward(4, 4, True))
    assert 1.0 == forward(4, 4, False).flop_factor
    assert 10 / 16 == forward(4, 4, True).flop_factor
    assert 3 / 8 == forward(2, 4, True).flop_factor
    assert 7 / 8 == forward(4, 2, True).flop_factor
    each = [(2, 3, 4, 8)] * 5
    backward = work_of(f"{name}_backward.default", [*each, (2, 3, 4)], [*each[:3]], 0.0, True)
    assert (Family.ATTENTION_BACKWARD, (6, 4, 4, 8)) == (backward.family, sizes(backward))
    assert 10 / 16 * 5 / 4 == backward.flop_factor


def test_captured_attention_keeps_its_flop_in_the_graph() -> None:
    """2 products of 4 heads, 8 x 8 pairs and 8 elements, for 16 samples, in each of 2 blocks."""
    graph = tiny_gpt()
    works = OpWorks(graph)
    forward = [op for op in graph.ops if works_family(works, op, graph) is Family.ATTENTION]

    assert [2 * 2 * 16 * 4 * 8 * 8 * 8] * 2 == [op.flop for op in forward]
    assert [36 / 64] * 2 == [works.of(op).flop_factor for op in forward]
    assert sum(op.flop for op in graph.ops) == graph.num_flop


def test_convolutions_by_group() -> None:
    """8 images of 6 channels, 12 results of 5 x 5, windows of 3 x 3, 2 groups."""
    given: tuple[Arg, ...] = (None, (1, 1), (0, 0), (1, 1), False, (0, 0), 2)
    image, weight, result = (8, 6, 7, 7), (12, 3, 3, 3), (8, 12, 5, 5)
    forward = work_of("aten.convolution.default", [image, weight], [result], *given)
    backward = work_of(
        "aten.convolution_backward.default",
        [result, image, weight],
        [image, weight, None],
        *(None, (1, 1), (0, 0), (1, 1), False, (0, 0), 2, (True, True, False)),
    )

    assert (2, 200, 6, 27) == sizes(forward)
    assert (2, 200, 6, 27) == sizes(backward)
    assert Family.CONVOLUTION_BACKWARD is backward.family


def test_embeddings() -> None:
    forward = work_of("aten.embedding.default", [(50, 8), (4, 3)], [(4, 3, 8)])
    backward = work_of("aten.embedding_dense_backward.default", [(4, 3, 8), (4, 3)], [(50, 8)])

    assert (1, 12, 8, 50) == sizes(forward)
    assert (1, 12, 8, 50) == sizes(backward)
    assert Family.EMBEDDING_BACKWARD is backward.family


@pytest.mark.parametrize(
    ("target", "operands", "results", "expected"),
    [
        ("aten.gelu.default", [(4, 3, 8)], [(4, 3, 8)], (12, 8, 2)),
        ("aten.add.Tensor", [(4, 3, 8), (4, 3, 8)], [(4, 3, 8)], (12, 8, 3)),
        ("aten.add.Tensor", [(4, 3, 8), (8,)], [(4, 3, 8)], (12, 8, 2)),
        ("aten.gelu_backward.default", [(4, 8), (4, 8)], [(4, 8)], (4, 8, 3)),
        (
            "aten.native_layer_norm.default",
            [(4, 8), (8,), (8,)],
            [(4, 8), (4, 1), (4, 1)],
            (4, 8, 2),
        ),
        ("aten.sum.default", [(4, 8)], [()], (4, 8, 1)),
        ("aten.cat.default", [(4, 8), (4, 8)], [(4, 16)], (4, 16, 3)),
        ("aten.full.default", [], [(4, 8)], (4, 8, 1)),
        ("aten.exp.default", [()], [()], (1, 1, 2)),
    ],
)
def test_rows_of_the_largest_tensor(
    target: str, operands: list[Shape], results: list[Shape | None], expected: Shape
) -> None:
    assert (1, *expected) == sizes(work_of(target, operands, results))


def test_masks_do_not_count_and_an_operand_read_twice_counts_once() -> None:
    dropout = work_of(
        "aten.native_dropout.default",
        [(4, 8)],
        [(4, 8), (4, 8)],
        dtypes=("bfloat16", "bfloat16", "bool"),
    )
    square = work_of("aten.mul.Tensor", [(4, 8)], [(4, 8)], Ref(0))

    assert (Family.RANDOM, (1, 4, 8, 2)) == (dropout.family, sizes(dropout))
    assert (1, 4, 8, 2) == sizes(square)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("bfloat16", "bfloat16"), "bfloat16"),
        (("float16", "float16"), "float16"),
        (("float64", "float64"), "float64"),
        (("int64", "bool"), "float32"),
        (("int64", "bfloat16"), "bfloat16"),
        (("float8_e5m2", "float8_e5m2"), "float8_e4m3fn"),
    ],
)
def test_dtype_of_the_arithmetic(dtypes: tuple[str, ...], expected: str) -> None:
    found = work_of("aten.mul.Scalar", [(4, 8)], [(4, 8)], 2, dtypes=dtypes)

    assert expected == DTYPES[found.dtype]


def test_operations_for_each_element() -> None:
    """A backward does twice its forward's, an operator without a figure one."""
    shapes: list[Shape] = [(4, 8), (4, 8)]

    assert 8.0 == work_of("aten.gelu.default", shapes[:1], [(4, 8)]).flop_factor
    assert 16.0 == work_of("aten.gelu_backward.default", shapes, [(4, 8)]).flop_factor
    assert 1.0 == work_of("aten.add.Tensor", shapes, [(4, 8)]).flop_factor
    assert 2.0 == work_of("aten.threshold_backward.default", shapes, [(4, 8)]).flop_factor
    assert 0.0 == work_of("aten.clone.default", shapes[:1], [(4, 8)]).flop_factor


def works_family(works: OpWorks, op: Op, graph: OpGraph) -> Family | None:
    """``None`` for a view."""
    return None if rule_of(op, graph.values)[0].is_view else works.of(op).family


@pytest.mark.parametrize(
    "reference",
    ["tiny-gpt", "tiny-t5", "tiny-moe", "tiny-clip", "tiny-unet", "tiny-dlrm", "tiny-resnet"],
)
def test_every_operator_of_the_zoo_has_a_family(reference: str) -> None:
    graph = zoo(reference, 8)
    works = OpWorks(graph)
    families = {op.target: works_family(works, op, graph) for op in graph.ops}

    assert [] == [target for target, family in families.items() if family is Family.OTHER]
    assert Family.MATMUL in families.values()


def test_unknown_operators_are_other_and_have_rows() -> None:
    found = work_of("aten.foo.default", [(4, 8)], [(4, 8)])

    assert (Family.OTHER, (1, 4, 8, 2)) == (found.family, sizes(found))
    assert Family.ATTENTION is family_of("aten._scaled_dot_product_cudnn_attention.default")


def test_names_of_modules_change_nothing() -> None:
    graph = two_linear()
    renamed = replace(
        graph,
        name="other",
        ops=tuple(replace(op, module_path="x", source="y.py:1") for op in graph.ops),
        inputs=tuple(replace(item, name=f"z{n}") for n, item in enumerate(graph.inputs)),
    )
    products = [op for op in graph.ops if op.target == "aten.mm.default"]

    assert 5 == len(products)
    assert [OpWorks(graph).of(op) for op in products] == [
        OpWorks(renamed).of(renamed.ops[op.index]) for op in products
    ]
