"""Every rule of the table is executed: cut, run on each rank, put together, in fp64.

The table is enumerated, so a rule without a case here or in ``test_rules`` fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meshwright.graph.rules.table import rule_names
from tests.graph.one_op import Instance, analysis_of, instance, sharded_results
from tests.graph.test_rules import CASES, check, index, rand


@pytest.fixture(autouse=True, scope="module")
def rms_norm_backward_on_cpu() -> Iterator[None]:
    """PyTorch has no such kernel: its own decomposition stands in."""
    name = torch.ops.aten._fused_rms_norm_backward.default
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(name, torch._decomp.decomposition_table[name], "CPU")
        yield


SIZE = st.sampled_from([2, 3, 4, 6])
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"


def first_of(case: Instance, position: int = 0) -> Tensor:
    """A result of an operator."""
    return case.tensors[case.op.results[position]]


def _layer_norm(a: int, b: int, c: int) -> Instance:
    return instance("aten.native_layer_norm.default", rand(a, b, c), [c], rand(c), rand(c), 1e-5)


def _layer_norm_backward(a: int, b: int, c: int) -> Instance:
    made = _layer_norm(a, b, c)
    x, weight, bias = (made.tensors[value] for value in range(3))
    args = (rand(a, b, c), x, [c], first_of(made, 1), first_of(made, 2), weight, bias)
    return instance("aten.native_layer_norm_backward.default", *args, [True, True, True])


def _rms_norm(a: int, b: int, c: int) -> Instance:
    return instance("aten._fused_rms_norm.default", rand(a, b, c), [c], rand(c), 1e-5)


def _rms_norm_backward(a: int, b: int, c: int) -> Instance:
    made = _rms_norm(a, b, c)
    args = (rand(a, b, c), made.tensors[0], [c], first_of(made, 1), made.tensors[1])
    return instance("aten._fused_rms_norm_backward.default", *args, [True, True])


def _group_norm(a: int, b: int, c: int) -> Instance:
    args = (rand(a, 2 * b, c, c), rand(2 * b), rand(2 * b), a, 2 * b, c * c, 2, 1e-5)
    return instance("aten.native_group_norm.default", *args)


def _group_norm_backward(a: int, b: int, c: int) -> Instance:
    made = _group_norm(a, b, c)
    x, weight = made.tensors[0], made.tensors[1]
    args = (torch.randn_like(x), x, first_of(made, 1), first_of(made, 2), weight)
    sizes = (a, 2 * b, c * c, 2, [True, True, True])
    return instance("aten.native_group_norm_backward.default", *args, *sizes)


def _attention(a: int, b: int, c: int) -> Instance:
    return instance(f"{ATTENTION}.default", *(rand(a, b, 4, c) for _ in range(3)), 0.0, True)


def _attention_backward(a: int, b: int, c: int) -> Instance:
    made = _attention(a, b, c)
    operands = [made.tensors[value] for value in range(3)]
    args = (torch.randn_like(operands[0]), *operands, first_of(made), first_of(made, 1))
    return instance(f"{ATTENTION}_backward.default", *args, 0.0, True)


def _max_pool(a: int, b: int, c: int) -> Instance:
    args = (rand(a, b, 2 * c, 4), [3, 3], [2, 2], [1, 1])
    return instance("aten.max_pool2d_with_indices.default", *args)


def _max_pool_backward(a: int, b: int, c: int) -> Instance:
    made = _max_pool(a, b, c)
    args = (torch.randn_like(first_of(made)), made.tensors[0], [3, 3], [2, 2], [1, 1], [1, 1])
    name = "aten.max_pool2d_with_indices_backward.default"
    return instance(name, *args, False, first_of(made, 1))


def _softmax_backward(name: str) -> Callable[[int, int, int], Instance]:
    def case(a: int, b: int, c: int) -> Instance:
        made = instance(f"aten.{name}.default", rand(a, b, c), 1, False)
        args = (rand(a, b, c), first_of(made), 1, torch.float64)
        return instance(f"aten.{name}_backward_data.default", *args)

    return case


F64 = {"dtype": torch.float64}

MADE: dict[str, Callable[[int, int, int], Instance]] = {
    "aten.native_layer_norm.default": _layer_norm,
    "aten.native_layer_norm_backward.default": _layer_norm_backward,
    "aten._fused_rms_norm.default": _rms_norm,
    "aten._fused_rms_norm_backward.default": _rms_norm_backward,
    "aten.native_group_norm.default": _group_norm,
    "aten.native_group_norm_backward.default": _group_norm_backward,
    f"{ATTENTION}.default": _attention,
    f"{ATTENTION}_backward.default": _attention_backward,
    "aten.max_pool2d_with_indices.default": _max_pool,
    "aten.max_pool2d_with_indices_backward.default": _max_pool_backward,
    "aten._softmax_backward_data.default": _softmax_backward("_softmax"),
    "aten._log_softmax_backward_data.default": _softmax_backward("_log_softmax"),
}

CALLS: dict[str, Callable[[int, int, int], tuple[Any, ...]]] = {
    "aten._adaptive_avg_pool2d_backward.default": lambda a, b, c: (
        rand(a, b, 1, 1),
        rand(a, b, c, c),
    ),
    "aten._safe_softmax.default": lambda a, b, c: (rand(a, b, c), 1),
    "aten._unsafe_view.default": lambda a, b, c: (rand(a, b, c), [a * b, c]),
    "aten.all.default": lambda a, b, c: (rand(a, b, c) > 0,),
    "aten.any.default": lambda a, b, c: (rand(a, b, c) > 0,),
    "aten.any.dim": lambda a, b, c: (rand(a, b, c) > 0, 1),
    "aten.arange.start": lambda a, b, c: (a, a + b),
    "aten.arange.start_step": lambda a, b, c: (0, a * b, b),
    "aten.argmax.default": lambda a, b, c: (rand(a, b, c), 1),
    "aten.argmin.default": lambda a, b, c: (rand(a, b, c), 1),
    "aten.argsort.default": lambda a, b, c: (rand(a, b, c), 1),
    "aten.avg_pool2d_backward.default": lambda a, b, c: (
        *(rand(a, b, c, c), rand(a, b, 2 * c, 2 * c), [2, 2], [2, 2], [0, 0], False, True, None),
    ),
    "aten.bmm.default": lambda a, b, c: (rand(a, b, c), rand(a, c, b)),
    "aten.cumprod.default": lambda a, b, c: (rand(a, b, c), 1),
    "aten.empty.memory_format": lambda a, b, c: ([a, b, c],),
    "aten.expand.default": lambda a, b, c: (rand(a, 1, c), [a, b, c]),
    "aten.eye.default": lambda a, b, c: (a,),
    "aten.eye.m": lambda a, b, c: (a, b),
    "aten.huber_loss.default": lambda a, b, c: (rand(a, b, c), rand(a, b, c), 1, 0.5),
    "aten.linspace.default": lambda a, b, c: (0.0, 1.0, a),
    "aten.mean.default": lambda a, b, c: (rand(a, b, c),),
    "aten.min.dim": lambda a, b, c: (rand(a, b, c), 1),
    "aten.mm.default": lambda a, b, c: (rand(a, b), rand(b, c)),
    "aten.new_empty.default": lambda a, b, c: (rand(a), [b, c]),
    "aten.new_full.default": lambda a, b, c: (rand(a), [b, c], 2.0),
    "aten.new_ones.default": lambda a, b, c: (rand(a), [b, c]),
    "aten.new_zeros.default": lambda a, b, c: (rand(a), [b, c]),
    "aten.ones.default": lambda a, b, c: ([a, b, c],),
    "aten.permute.default": lambda a, b, c: (rand(a, b, c), [2, 0, 1]),
    "aten.prod.default": lambda a, b, c: (rand(a, b, c),),
    "aten.reshape.default": lambda a, b, c: (rand(a, b, c), [a, b * c]),
    "aten.scalar_tensor.default": lambda a, b, c: (2.0,),
    "aten.scatter.src": lambda a, b, c: (rand(a, b, c), 1, index(b, a, b, c), rand(a, b, c)),
    "aten.scatter.value": lambda a, b, c: (rand(a, b, c), 1, index(b, a, 1, c), 2.0),
    "aten.select_backward.default": lambda a, b, c: (rand(a, c), [a, b, c], 1, 1),
    "aten.slice_backward.default": lambda a, b, c: (rand(a, 2, c), [a, b + 2, c], 1, 1, 3, 1),
    "aten.squeeze.default": lambda a, b, c: (rand(a, 1, c),),
    "aten.squeeze.dim": lambda a, b, c: (rand(a, 1, c), 1),
    "aten.squeeze.dims": lambda a, b, c: (rand(a, 1, c, 1), [1, 3]),
    "aten.stack.default": lambda a, b, c: ([rand(a, b, c), rand(a, b, c)], 1),
    "aten.std.correction": lambda a, b, c: (rand(a, b, c), [1]),
    "aten.sum.default": lambda a, b, c: (rand(a, b, c),),
    "aten.t.default": lambda a, b, c: (rand(a, b),),
    "aten.transpose.int": lambda a, b, c: (rand(a, b, c), 0, 2),
    "aten.triu.default": lambda a, b, c: (rand(a, b, c),),
    "aten.unsqueeze.default": lambda a, b, c: (rand(a, b, c), 1),
    "aten.upsample_bilinear2d_backward.default": lambda a, b, c: (
        *(rand(a, b, 2 * c, 2 * c), [2 * c, 2 * c], [a, b, c, c], False, None, None),
    ),
    "aten.upsample_nearest2d.default": lambda a, b, c: (rand(a, b, c, c), [2 * c, 2 * c]),
    "aten.upsample_nearest2d.vec": lambda a, b, c: (rand(a, b, c, c), None, [2.0, 2.0]),
    "aten.upsample_nearest2d_backward.default": lambda a, b, c: (
        *(rand(a, b, 2 * c, 2 * c), [2 * c, 2 * c], [a, b, c, c]),
    ),
    "aten.view.default": lambda a, b, c: (rand(a, b, c), [a * b * c]),
    "aten.zeros.default": lambda a, b, c: ([a, b, c],),
}
_DOUBLE = frozenset({"ones", "zeros", "empty", "eye", "linspace", "scalar_tensor"})

UNDEFINED = frozenset({"aten.empty.memory_format", "aten.new_empty.default"})
"""Nothing may be read from their results: only shapes are compared."""


def case_of(target: str, a: int, b: int, c: int) -> Instance:
    """An operator at random sizes."""
    if target in MADE:
        return MADE[target](a, b, c)
    kwargs = F64 if target.split(".")[1] in _DOUBLE else {}
    return instance(target, *CALLS[target](a, b, c), **kwargs)


@pytest.mark.parametrize("target", [*MADE, *CALLS])
@settings(max_examples=4, deadline=None)
@given(SIZE, SIZE, SIZE)
def test_rule_at_random_sizes(target: str, a: int, b: int, c: int) -> None:
    case = case_of(target, a, b, c)
    if target in UNDEFINED:
        assert 0 < run_without_values(case)
        return
    check(case)


def run_without_values(case: Instance) -> int:
    """Run all shardings of an operator with undefined results; local shapes are checked."""
    analysis = analysis_of(case)
    able = [i for i, f in enumerate(analysis.leaf_factors[0]) if not f.fixed]
    for number in able:
        factor = analysis.leaf_factors[0][number]
        if factor.size % 2 == 0:
            sharded_shapes(case, number)
    return len(able)


def sharded_shapes(case: Instance, number: int) -> None:
    """Run on two ranks; copies of what nobody defined need not agree."""
    whole = sharded_results(case, analysis_of(case), number, 2)
    assert all(found is None or found.numel() for found in whole)


# Element-wise operators ---------------------------------------------------------------------------

INTEGERS = frozenset({"bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor"})
DRAWN = frozenset({"bernoulli", "native_dropout", "rand_like", "randn_like", "randint_like"})
UNSET = frozenset({"empty_like"})
TRUTHS = frozenset({"mask", "condition"})
ELEMENTWISE = sorted(name for name in rule_names() if "." not in name)
NEEDED: dict[str, dict[str, Any]] = {
    "clamp": {"min": -0.5},
    "_to_copy": {"dtype": torch.float32},
    "gelu_backward": {"approximate": "tanh"},
    "native_dropout": {"train": True},
    "randint_like": {"low": 0, "high": 3},
}


def elementwise_cases(name: str, shape: tuple[int, ...]) -> list[Instance]:
    """Every overload that takes tensors and plain numbers, called by its schema."""
    packet = getattr(torch.ops.aten, name)
    found = []
    for overload in packet.overloads():
        call = _call(getattr(packet, overload)._schema, name, shape)
        if overload.endswith("out") or call is None:
            continue
        args, kwargs = call
        found.append(instance(f"aten.{name}.{overload}", *args, **kwargs))
    return found


def _call(
    schema: Any, name: str, shape: tuple[int, ...]
) -> tuple[list[Any], dict[str, Any]] | None:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    has_tensor = False
    for item in schema.arguments:
        given = NEEDED.get(name, {}).get(item.name)
        if given is not None and "Tensor" in str(item.type):
            given = torch.tensor(given)
        if given is None and item.has_default_value():
            if not item.kwarg_only:
                args.append(item.default_value)
            continue
        value = _value(str(item.type), item.name, name, shape) if given is None else given
        if value is None:
            return None
        has_tensor |= isinstance(value, Tensor) and item.name not in TRUTHS
        if item.kwarg_only:
            kwargs[item.name] = value
        else:
            args.append(value)
    return (args, kwargs) if has_tensor else None


def _value(kind: str, argument: str, name: str, shape: tuple[int, ...]) -> Any:
    if kind == "Tensor":
        if argument == "value" and name in {"fill", "masked_fill"}:
            return torch.tensor(3.0)
        if name in INTEGERS:
            return index(8, *shape)
        return rand(*shape) > 0 if argument in TRUTHS else 0.1 + 0.8 * torch.rand(shape).double()
    number = 1 if name in INTEGERS else 0.5
    known = {"number": number, "Scalar": number, "float": 0.5, "int": 2, "bool": False}
    known["SymInt"] = 2
    return known.get(kind)


@pytest.mark.parametrize("name", ELEMENTWISE)
@settings(max_examples=2, deadline=None)
@given(st.tuples(SIZE, SIZE))
def test_elementwise_rule_at_random_shapes(name: str, shape: tuple[int, ...]) -> None:
    cases = elementwise_cases(name, shape)

    assert cases
    for case in cases:
        if name in UNSET | DRAWN:
            assert name in UNSET or analysis_of(case).rules[0].random
            assert len(shape) == run_without_values(case)
        else:
            assert len(shape) == len([f for f in analysis_of(case).leaf_factors[0] if not f.fixed])
            check(case)


def test_every_rule_has_a_case() -> None:
    executed = {case.op.target for case in CASES.values()} | {*MADE, *CALLS, *ELEMENTWISE}

    assert [] == sorted(rule_names() - executed)
