"""Every sharding a rule allows gives the whole operator's results, in fp64 on virtual ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meshwright.capture import capture
from meshwright.capture.execute import resolve_target
from meshwright.capture.references import resolve_model
from meshwright.graph.opgraph import InputRole, OpGraph, Ref
from meshwright.graph.rules.base import OpRule, Variant, einsum_rule
from meshwright.graph.rules.table import has_rule
from meshwright.graph.rules.views import match_shapes
from meshwright.graph.simplify import with_explicit_factories
from tests.graph.exchanged import exchanged_results
from tests.graph.one_op import (
    Instance,
    analysis_of,
    instance,
    instance_in,
    run_whole,
    sharded_results,
    spec_of,
)

ZOO = (
    "tiny-gpt",
    "tiny-llama",
    "tiny-moe",
    "tiny-gpt-moe",
    "tiny-bert",
    "tiny-t5",
    "tiny-vit",
    "tiny-clip",
    "tiny-resnet",
    "tiny-unet",
    "tiny-dlrm",
    "tiny-mlp",
)
PER_TARGET = 2
"""Instances of one operator taken from one model, of different shapes."""


def check(case: Instance) -> int:
    """Try all shardings of one operator; returns how many there are."""
    analysis = analysis_of(case)
    whole = run_whole(case)
    num_tried = 0
    for index, factor in enumerate(analysis.leaf_factors[0]):
        for ways in (2, 3):
            if not factor.divides(factor.size, ways):
                continue
            if factor.variant in {Variant.HALO, Variant.RING}:
                found = exchanged_results(case, factor, ways)
            else:
                found = sharded_results(case, analysis, index, ways)
            num_tried += 1
            for expected, result in zip(whole, found, strict=True):
                if expected is not None:
                    assert result is not None
                    assert_same(expected, result, f"{case.op.target}, factor {index} by {ways}")
    check_linear(case, analysis.rules[0], whole)
    return num_tried


def check_linear(case: Instance, rule: OpRule, whole: list[Tensor | None]) -> None:
    """Results of the parts of a jointly linear set of operands add up to the whole."""
    generator = torch.Generator().manual_seed(3)
    for positions in rule.linear:
        values = {case.op.inputs[position] for position in positions}
        parts = {
            value: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            for value in values
            if (tensor := case.tensors[value]).is_floating_point()
        }
        # A value read by an operand outside the set too is not split by a plan either.
        if set(parts) != values or any(
            value in values and position not in positions
            for position, value in enumerate(case.op.inputs)
        ):
            continue
        rests = {value: case.tensors[value] - part for value, part in parts.items()}
        sums = zip(run_whole(case, parts), run_whole(case, rests), whole, strict=True)
        for one, other, expected in sums:
            if expected is not None:
                assert one is not None
                assert other is not None
                assert_same(expected, one + other, f"{case.op.target} linear in {positions}")


def assert_same(expected: Tensor, found: Tensor, what: str) -> None:
    assert expected.shape == found.shape, what
    if not expected.is_floating_point():
        assert torch.equal(expected, found), what
        return
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5
    finite = expected[expected.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    torch.testing.assert_close(
        found,
        expected,
        rtol=tolerance,
        atol=tolerance * scale,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


# Operators as the built-in models meet them -------------------------------------------------------


def captured(name: str) -> tuple[OpGraph, dict[int, Tensor]]:
    """A small model's graph with every value it computes, in fp64."""
    source = resolve_model(name)
    model = source.build("float64", "cpu", seed=0)
    args, kwargs = source.example_inputs(6, None, "cpu", seed=1, dtype="float64")
    taken = capture(model, args, kwargs, name=name)
    graph = with_explicit_factories(taken.graph)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers()), **taken.constants}
    data = taken.flatten_data(args, kwargs)
    values = {
        item.value: (data if item.role == InputRole.DATA else named)[item.name].detach()
        for item in graph.inputs
    }
    with torch.no_grad():
        for op in graph.ops:
            results = resolve_target(op.target)(
                *(_real(arg, values) for arg in op.args),
                **{key: _real(arg, values) for key, arg in op.kwargs},
            )
            results = results if isinstance(results, list | tuple) else (results,)
            for value, result in zip(op.outputs, results, strict=True):
                if value is not None:
                    values[value] = result
    return graph, values


def _real(arg: Any, values: dict[int, Tensor]) -> Any:
    if isinstance(arg, Ref):
        return values[arg.value]
    if isinstance(arg, tuple):
        return [_real(part, values) for part in arg]
    if hasattr(arg, "kind"):
        return torch.device("cpu") if arg.kind == "device" else getattr(torch, arg.name)
    return arg


@pytest.mark.parametrize("name", ZOO)
def test_operators_of_a_built_in_model(name: str) -> None:
    graph, values = captured(name)
    taken: Counter[str] = Counter()
    seen: set[object] = set()
    num_tried = 0
    for op in graph.ops:
        shapes = tuple(graph.values[value].shape for value in op.inputs)
        other = tuple(arg for arg in op.args if isinstance(arg, int | float | bool))
        if (op.target, shapes, other) in seen or taken[op.target] == PER_TARGET:
            continue
        seen.add((op.target, shapes, other))
        taken[op.target] += 1
        num_tried += check(instance_in(graph, op, values))

    assert num_tried > 2 * len(taken)
    assert [] == sorted(target for target in taken if not has_rule(target))


# Operators the built-in models do not have --------------------------------------------------------

torch.manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def index(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


FROM_WEIGHTS = (rand(6, 5), index(5, 6), rand(5).abs(), 2, -100)

CASES: dict[str, Instance] = {
    "flip": instance("aten.flip.default", rand(6, 4), [0]),
    "flip of two dims": instance("aten.flip.default", rand(6, 4), [0, 1]),
    "roll": instance("aten.roll.default", rand(6, 4), [1], [0]),
    "roll of all": instance("aten.roll.default", rand(6, 4), [1]),
    "sort": instance("aten.sort.default", rand(6, 4), 0),
    "sort by name of the dim": instance("aten.sort.stable", rand(6, 4), stable=True, dim=0),
    "topk": instance("aten.topk.default", rand(6, 4), 2, 1),
    "cumsum": instance("aten.cumsum.default", rand(6, 4), 0),
    "gather": instance("aten.gather.default", rand(6, 4), 1, index(4, 6, 2)),
    "gather of fewer rows": instance("aten.gather.default", rand(6, 4), 1, index(4, 4, 4)),
    "gather of one row": instance("aten.gather.default", rand(6, 4), 1, index(4, 1, 4)),
    "scatter of fewer rows": instance(
        "aten.scatter_add.default", rand(6, 4), 1, index(4, 2, 4), rand(6, 4)
    ),
    "index": instance("aten.index.Tensor", rand(6, 4, 8), [None, index(4, 6, 2)]),
    "index of two dims": instance("aten.index.Tensor", rand(6, 4, 8), [index(6, 6), index(4, 6)]),
    "index by apart dims": instance(
        "aten.index.Tensor", rand(6, 4, 8), [index(6, 6), None, index(8, 6)]
    ),
    "index_select": instance("aten.index_select.default", rand(6, 4), 1, index(4, 2)),
    "index_add": instance("aten.index_add.default", rand(6, 4), 1, index(4, 2), rand(6, 2)),
    "norm of all": instance("aten.linalg_vector_norm.default", rand(6, 4)),
    "norm of a dim": instance("aten.linalg_vector_norm.default", rand(6, 4), 2, [1]),
    "variance": instance("aten.var.correction", rand(6, 4), [1], correction=1, keepdim=True),
    "variance and mean": instance("aten.var_mean.correction", rand(6, 4), [0], correction=0),
    "amax": instance("aten.amax.default", rand(6, 4), [1]),
    "max": instance("aten.max.default", rand(6, 4)),
    "max of a dim": instance("aten.max.dim", rand(6, 4), 1),
    "amin": instance("aten.amin.default", rand(6, 4), [1], True),
    "mean of two dims": instance("aten.mean.dim", rand(6, 4, 3), [0, 2], True),
    "sum of truths": instance("aten.sum.dim_IntList", rand(6, 4) > 0, [0]),
    "all": instance("aten.all.dim", rand(6, 4) > 0, 0),
    "prod": instance("aten.prod.dim_int", rand(6, 4), 0),
    "logsumexp": instance("aten.logsumexp.default", rand(6, 4), [1]),
    "softmax": instance("aten._softmax.default", rand(6, 4), 1, False),
    "log-softmax": instance("aten._log_softmax.default", rand(6, 4), 0, False),
    "log-softmax of large numbers": instance(
        "aten._log_softmax.default", 1e4 * rand(2, 6), 1, False
    ),
    "smooth l1": instance("aten.smooth_l1_loss.default", rand(6, 4), rand(6, 4), 1, 0.5),
    "mse, summed": instance("aten.mse_loss.default", rand(6, 4), rand(6, 4), 2),
    "mse, each": instance("aten.mse_loss.default", rand(6, 4), rand(6, 4), 0),
    "mse backward": instance("aten.mse_loss_backward.default", rand(), rand(6, 4), rand(6, 4), 1),
    "entropy with logits": instance(
        "aten.binary_cross_entropy_with_logits.default", rand(6, 4), rand(6, 4).sigmoid()
    ),
    "entropy with logits, weighted, summed": instance(
        "aten.binary_cross_entropy_with_logits.default",
        rand(6, 4),
        rand(6, 4).sigmoid(),
        rand(6, 1).abs(),
        rand(4).abs(),
        2,
    ),
    "nll, summed": instance(
        "aten.nll_loss_forward.default", rand(6, 4), index(4, 6), None, 2, -100
    ),
    "nll, ignoring": instance("aten.nll_loss_forward.default", rand(6, 4), index(4, 6), None, 2, 1),
    "nll, each": instance("aten.nll_loss_forward.default", rand(6, 4), index(4, 6), None, 0, -100),
    "nll, weighted": instance("aten.nll_loss_forward.default", *FROM_WEIGHTS),
    "nll, weighted, mean": instance(
        "aten.nll_loss_forward.default", rand(6, 4), index(4, 6), rand(4).abs(), 1, -100
    ),
    "nll backward, weighted": instance(
        "aten.nll_loss_backward.default",
        rand(),
        rand(6, 4),
        index(4, 6),
        rand(4).abs(),
        2,
        -100,
        rand().abs(),
    ),
    "nll backward, each": instance(
        "aten.nll_loss_backward.default", rand(6), rand(6, 4), index(4, 6), None, 0, 1, rand()
    ),
    "embedding": instance("aten.embedding.default", rand(6, 4), index(6, 2, 3)),
    "embedding backward": instance(
        "aten.embedding_dense_backward.default", rand(2, 3, 4), index(6, 2, 3), 6, -1, False
    ),
    "embedding backward with padding": instance(
        "aten.embedding_dense_backward.default", rand(2, 3, 4), index(6, 2, 3), 6, 4, False
    ),
    "embedding backward by frequency": instance(
        "aten.embedding_dense_backward.default", rand(2, 6, 4), index(6, 2, 6), 6, -1, True
    ),
    "addmm": instance("aten.addmm.default", rand(4), rand(6, 8), rand(8, 4)),
    "addmm, scaled": instance(
        "aten.addmm.default", rand(6, 4), rand(6, 8), rand(8, 4), beta=0.5, alpha=2.0
    ),
    "baddbmm": instance("aten.baddbmm.default", rand(2, 1, 4), rand(2, 6, 8), rand(2, 8, 4)),
    "mv": instance("aten.mv.default", rand(6, 4), rand(4)),
    "dot": instance("aten.dot.default", rand(6), rand(6)),
    "convolution of a line": instance(
        "aten.convolution.default",
        *(rand(2, 4, 8), rand(6, 4, 3), rand(6), [1], [1], [1], False, [0], 1),
    ),
    "convolution of groups": instance(
        "aten.convolution.default",
        *(rand(2, 4, 8, 8), rand(4, 2, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 2),
    ),
    "convolution transposed": instance(
        "aten.convolution.default",
        *(rand(2, 4, 8, 8), rand(4, 6, 3, 3), rand(6), [2, 2], [1, 1], [1, 1], True, [1, 1], 1),
    ),
    "convolution transposed, backward": instance(
        "aten.convolution_backward.default",
        *(rand(2, 6, 8, 8), rand(2, 4, 4, 4), rand(4, 6, 2, 2), [6], [2, 2], [0, 0], [1, 1], True),
        *([0, 0], 1, [True, True, True]),
    ),
    "convolution of a room, backward": instance(
        "aten.convolution_backward.default",
        *(rand(2, 6, 4, 4, 4), rand(2, 4, 4, 4, 4), rand(6, 4, 1, 1, 1), None, [1, 1, 1]),
        *([0, 0, 0], [1, 1, 1], False, [0, 0, 0], 1, [True, True, False]),
    ),
    "batch norm with running statistics": instance(
        "aten._native_batch_norm_legit_functional.default",
        *(rand(4, 6, 3), rand(6), rand(6), rand(6), rand(6).abs(), False, 0.1, 1e-5),
    ),
    "batch norm without weights": instance(
        "aten._native_batch_norm_legit_functional.default",
        *(rand(4, 6, 3), None, None, rand(6), rand(6).abs(), True, 0.1, 1e-5),
    ),
    "batch norm backward with running statistics": instance(
        "aten.native_batch_norm_backward.default",
        *(rand(4, 6, 3), rand(4, 6, 3), rand(6), rand(6), rand(6).abs(), rand(0), rand(0)),
        *(False, 1e-5, [True, True, True]),
    ),
    "average pool": instance("aten.avg_pool2d.default", rand(2, 4, 8, 8), [2, 2]),
    "adaptive pool": instance("aten._adaptive_avg_pool2d.default", rand(2, 4, 8, 8), [1, 1]),
    "bilinear": instance("aten.upsample_bilinear2d.default", rand(2, 4, 4, 4), [8, 8], False),
    "tril": instance("aten.tril.default", rand(4, 6, 6)),
    "pad": instance("aten.constant_pad_nd.default", rand(4, 6), [0, 2], 1.5),
    "split unequal": instance("aten.split_with_sizes.default", rand(4, 6), [4, 2], 1),
    "split with a rest": instance("aten.split.Tensor", rand(4, 6), 4, 1),
    "unbind": instance("aten.unbind.int", rand(4, 6), 0),
    "cat unequal": instance("aten.cat.default", [rand(4, 6), rand(2, 6)], 0),
    "cat of one": instance("aten.cat.default", [rand(4, 6)], 0),
    "slice by steps": instance("aten.slice.Tensor", rand(4, 6), 1, 0, 6, 2),
    "slice of all": instance("aten.slice.Tensor", rand(4, 6), 1, 0, 2**62),
    "select from one": instance("aten.select.int", rand(4, 1), 1, 0),
    "to truth": instance("aten._to_copy.default", rand(4, 6), dtype=torch.bool),
    "quotient of a number": instance("aten.div.Tensor", 2.0, rand(4, 6)),
    "sum with a number": instance("aten.add.Tensor", rand(4, 6), 1.0),
    "masked fill of infinity": instance(
        "aten.masked_fill.Scalar", rand(4, 6), rand(4, 6) > 0, -float("inf")
    ),
    "where of numbers": instance("aten.where.ScalarOther", rand(4, 6) > 0, rand(4, 6), 0.0),
    "full": instance("aten.full.default", [4, 6], 2.0, dtype=torch.float64),
    "arange": instance("aten.arange.default", 6),
    "square by itself": instance("aten.mul.Tensor", *([rand(4, 6)] * 2)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_operators_written_by_hand(case: Instance) -> None:
    check(case)


@pytest.mark.parametrize(
    ("name", "free_dims"),
    [
        ("gather of fewer rows", set()),
        ("gather", {0}),
        ("flip", {1}),
        ("sort by name of the dim", {1}),
        ("norm of a dim", set()),
        ("nll, weighted", {0}),
        ("nll, summed", {0, 1}),
        ("nll, weighted, mean", set()),
        ("batch norm with running statistics", {0, 1, 2}),
        ("split unequal", {0}),
    ],
)
def test_which_dims_of_the_first_operand_may_be_cut(name: str, free_dims: set[int]) -> None:
    (factors,) = analysis_of(CASES[name]).leaf_factors

    found = {f.operands[0][0] for f in factors if not f.fixed and f.operands[0] is not None}
    assert free_dims == found


def test_a_number_added_is_not_linear() -> None:
    """X + 1 of two parts would add 2."""
    assert () == analysis_of(CASES["sum with a number"]).rules[0].linear
    assert () == analysis_of(CASES["to truth"]).rules[0].linear
    assert () == analysis_of(CASES["quotient of a number"]).rules[0].linear
    assert () == analysis_of(CASES["masked fill of infinity"]).rules[0].linear


# Rules for random shapes ------------------------------------------------------------------------

SIZES = st.sampled_from([1, 2, 3, 4, 6, 8])
SHAPES = st.lists(SIZES, min_size=1, max_size=4).map(tuple)


@st.composite
def shape_pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two groupings of one list of factors."""
    factors = draw(st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=5))

    def grouped() -> tuple[int, ...]:
        dims, size = [], 1
        for factor in factors:
            size *= factor
            if draw(st.booleans()):
                dims.append(size)
                size = 1
        if size > 1 or not dims:
            dims.append(size)
        if draw(st.booleans()):
            dims.insert(draw(st.integers(0, len(dims))), 1)
        return tuple(dims)

    return grouped(), grouped()


@settings(max_examples=20, deadline=None)
@given(shape_pairs())
def test_views_of_random_shapes(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    source, target = pair
    factors, before, after = match_shapes(source, target)

    for shape, dims in ((source, before), (target, after)):
        for size, dim in zip(shape, dims, strict=True):
            product = 1
            for factor in dim:
                product *= factors[factor].size
            assert size == product
    check(instance("aten.view.default", rand(*source), list(target)))


@settings(max_examples=20, deadline=None)
@given(st.tuples(SIZES, SIZES, SIZES, SIZES))
def test_products_of_random_shapes(sizes: tuple[int, int, int, int]) -> None:
    b, m, k, n = sizes

    check(instance("aten.mm.default", rand(m, k), rand(k, n)))
    check(instance("aten.bmm.default", rand(b, m, k), rand(b, k, n)))
    check(instance("aten.addmm.default", rand(1, n), rand(m, k), rand(k, n)))


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.data())
def test_splits_and_joins_of_random_shapes(shape: tuple[int, ...], data: st.DataObject) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    part = data.draw(st.integers(1, shape[dim]))

    check(instance("aten.split.Tensor", rand(*shape), part, dim))
    check(instance("aten.unbind.int", rand(*shape), dim))
    check(instance("aten.cat.default", [rand(*shape), rand(*shape)], dim))
    check(instance("aten.stack.default", [rand(*shape), rand(*shape)], dim))
    check(instance("aten.slice.Tensor", rand(*shape), dim, 0, part))
    check(instance("aten.sum.dim_IntList", rand(*shape), [dim], data.draw(st.booleans())))


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.data())
def test_broadcasting_of_random_shapes(shape: tuple[int, ...], data: st.DataObject) -> None:
    narrow = tuple(size if data.draw(st.booleans()) else 1 for size in shape)
    narrow = narrow[data.draw(st.integers(0, len(shape) - 1)) :]

    check(instance("aten.add.Tensor", rand(*shape), rand(*narrow)))
    check(instance("aten.mul.Tensor", rand(*narrow), rand(*shape)))
    check(instance("aten.expand.default", rand(*narrow), list(shape)))


def test_an_index_equation() -> None:
    """``k`` is contracted: it is in no result, which a sharded ``k`` leaves partial."""
    rule = einsum_rule(
        "mk,kn->mn",
        [spec_of(rand(4, 6)), spec_of(rand(6, 1))],
        [spec_of(rand(4, 1))],
        variants={"k": Variant.OFFSET},
    )

    assert [4, 6] == [factor.size for factor in rule.factors]
    assert [frozenset(), {0}] == [factor.partial_results for factor in rule.factors]
    assert [Variant.NONE, Variant.OFFSET] == [factor.variant for factor in rule.factors]
    assert (((0,), (1,)), ((1,), ())) == rule.operands
    assert (((0,), ()),) == rule.results
