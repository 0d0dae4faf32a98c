"""What is remembered of an operator is what ``FakeTensorMode`` says each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.capture import captured, forward_log
from meshwright.capture.references import resolve_model
from meshwright.capture.remembered import RememberedResults, bare_fake
from meshwright.graph.opgraph import OpGraph


class _Memory(TorchDispatchMode):
    """Answers every operator from memory where it can."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results = RememberedResults(mode)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.results.call(func, args, kwargs or {})


def _two_linear(x: Tensor) -> tuple[Tensor, ...]:
    return (nn.functional.linear(x, x[:2]), x.transpose(0, 1)[1:], *torch.split(x, 2, dim=1))


def _in_place(x: Tensor) -> tuple[Tensor, ...]:
    y = x + 1
    y.add_(x)
    y.t_()
    return y, y + 1, y.t()


def _numbers(x: Tensor) -> tuple[Tensor, ...]:
    return x + 1, x.int() + 1, x.int() + 1.0, x.int() + True, x.bool() + True, x.bool() + 1


def _factories(x: Tensor) -> tuple[Tensor, ...]:
    return torch.zeros(3), torch.arange(3), torch.zeros_like(x, dtype=torch.int32), x.new_ones(2)


def _slices(x: Tensor) -> tuple[Tensor, ...]:
    return x[1], x[2], x[1:3, 2:], x[1:3, 2:].contiguous(), x.expand(2, 4, 4), x.unbind()[3]


@pytest.mark.parametrize("calls", [_two_linear, _in_place, _numbers, _factories, _slices])
def test_remembered_results_are_like_new_ones(
    calls: Callable[[Tensor], tuple[Tensor, ...]],
) -> None:
    mode = FakeTensorMode()
    x = bare_fake(mode, torch.Size((4, 4)), (4, 1), torch.float32, torch.device("cpu"))
    with mode:
        expected = calls(x)
    with mode, _Memory(mode):
        calls(x)
        found = calls(x)

    assert [_facts(tensor) for tensor in expected] == [_facts(tensor) for tensor in found]
    assert {FakeTensor} == {type(tensor) for tensor in found}


def _facts(tensor: Tensor) -> tuple[object, ...]:
    return (
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.storage_offset(),
        tensor.device,
        tensor.requires_grad,
    )


def test_a_view_shows_the_memory_of_its_base() -> None:
    mode = FakeTensorMode()
    x = bare_fake(mode, torch.Size((4, 4)), (4, 1), torch.float32, torch.device("cpu"))
    with mode, _Memory(mode):
        first, again, copy = x[1], x[1], x + 0

    storage = x.untyped_storage()._cdata
    assert [True, True] == [view.untyped_storage()._cdata == storage for view in (first, again)]
    assert storage != copy.untyped_storage()._cdata


def test_every_result_is_a_tensor_of_its_own() -> None:
    mode = FakeTensorMode()
    x = bare_fake(mode, torch.Size((4,)), (1,), torch.float32, torch.device("cpu"))
    with mode, _Memory(mode):
        results = [x + 1 for _ in range(3)]

    assert 3 == len({id(result) for result in results})


def test_gradients_flow_through_remembered_results() -> None:
    mode = FakeTensorMode()
    weight = bare_fake(
        mode,
        torch.Size((4, 4)),
        (4, 1),
        torch.float32,
        torch.device("cpu"),
        parameter=True,
        requires_grad=True,
    )
    with mode, _Memory(mode), torch.enable_grad():
        for _ in range(2):
            (gradient,) = torch.autograd.grad((weight @ weight).sum(), [weight])

    assert isinstance(weight, nn.Parameter)
    assert torch.Size((4, 4)) == gradient.shape


@pytest.mark.parametrize("reference", ["tiny-gpt", "tiny-llama", "tiny-t5", "tiny-moe"])
def test_log_is_that_without_memory(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = _log(reference)
    monkeypatch.setattr(
        RememberedResults, "call", lambda _self, func, args, kwargs: func(*args, **kwargs)
    )

    assert repr(_log(reference)) == repr(remembered)


def _log(reference: str) -> OpGraph:
    source = resolve_model(reference)
    model = source.build()
    args, kwargs = source.example_inputs(2)
    with captured._tracing(model, captured._call(args, kwargs), None) as (mode, call, found):
        return forward_log.forward_log(model, call, found, mode)
