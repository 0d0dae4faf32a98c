from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.capture import capture
from meshwright.errors import CaptureFailed
from tests.capture.small_models import as_eager

X = torch.zeros(2, 3)


class Function(nn.Module):
    """A linear layer whose result goes through ``then``."""

    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.linear(x))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def branch(y: Tensor) -> Tensor:
    return y.sum() if y.sum() > 0 else y.mean()


def reads_a_value(y: Tensor) -> Tensor:
    return y.sum() * y.max().item()


def selects(y: Tensor) -> Tensor:
    return y[y > 0].sum()


def rounds(y: Tensor) -> Any:
    return Straight.apply(y).sum()


def multiplies_wrong_shapes(y: Tensor) -> Tensor:
    return (y @ y).sum()


def complains(y: Tensor) -> Tensor:
    raise RuntimeError("no tokens\nat all")


def is_sparse(y: Tensor) -> Tensor:
    return y.sum() * torch.eye(3).to_sparse().sum().to_dense()


@pytest.mark.parametrize(
    ("then", "parts"),
    [
        (branch, ("aten.item.default at test_capture_errors.py:", "depend on data")),
        (reads_a_value, ("aten._local_scalar_dense.default at test_capture_errors.py:", ".item()")),
        (selects, ("aten.nonzero.default at test_capture_errors.py:", "shape depends on data")),
        (rounds, ("Straight at test_capture_errors.py:", "autograd.Function")),
        (multiplies_wrong_shapes, ("at test_capture_errors.py:", "aten.mm.default", "[2, 3]")),
        (complains, ("RuntimeError at test_capture_errors.py:", "no tokens")),
    ],
)
def test_the_message_names_operator_and_line(
    then: Callable[[Tensor], Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(CaptureFailed) as caught:
        capture(Function(then), (X,))

    message = str(caught.value)
    assert [] == [part for part in parts if part not in message], message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (lambda y: (y, y), r"no result is a scalar loss \(found 0 \[2, 3\], 1 \[2, 3\]\); return"),
        (lambda y: {"loss": y, "other": y.sum()}, "no result is a scalar loss"),
        (lambda y: {"a": y.sum(), "b": y.mean()}, "no result is a scalar loss"),
        (lambda y: y.argmax(), "no result is a scalar loss"),
        (lambda y: None, "returns no tensor; return a floating scalar"),
        (lambda y: y.detach().sum(), "does not depend on any parameter"),
    ],
)
def test_a_module_without_a_loss_is_told_how_to_give_one(
    then: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(CaptureFailed, match=message):
        capture(Function(then), (X,))


@pytest.mark.parametrize(
    "then",
    [
        lambda y: y.sum(),
        lambda y: (y.sum(), y.mean()),
        lambda y: {"other": y.mean(), "loss": y.sum()},
        lambda y: [y, y.sum()],
    ],
)
def test_a_loss_is_found_alone_first_by_name_or_as_the_only_scalar(
    then: Callable[[Tensor], Any],
) -> None:
    graph = capture(Function(then), (X,)).graph
    producer = {value: op.target for op in graph.ops for value in op.results}

    assert "aten.sum.default" == producer[graph.outputs[0].value]


def test_wrong_inputs_and_wrong_models_are_refused() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.table = torch.zeros(3, device="meta")

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x) + self.table).sum()

    with pytest.raises(CaptureFailed, match="takes 2 positional arguments but 3 were given"):
        capture(Function(branch), (X, X))
    with pytest.raises(CaptureFailed, match=r"expected an nn\.Module, got function"):
        capture(branch, (X,))  # type: ignore[arg-type]
    with pytest.raises(CaptureFailed, match=r"input args\.0 is a torch\.sparse_coo tensor"):
        capture(Function(branch), (X.to_sparse(),))
    with pytest.raises(CaptureFailed, match="parameter weight has no shape yet"):
        capture(nn.LazyLinear(3), (X,))
    with pytest.raises(CaptureFailed, match="attribute table is a tensor without values"):
        capture(Holder(), (X,))


def test_torch_says_nothing_to_the_user(capfd: pytest.CaptureFixture[str]) -> None:
    noisy = logging.getLogger("torch.noisy_for_test")

    def then(y: Tensor) -> Tensor:
        warnings.warn("a warning", stacklevel=1)
        noisy.warning("a log line")
        return branch(y)

    with pytest.raises(CaptureFailed):
        capture(Function(then), (X,))

    assert ("", "") == capfd.readouterr()
    assert not noisy.disabled


def test_a_failed_capture_leaves_the_module_as_it_was() -> None:
    model = Function(branch)
    weight = model.linear.weight
    with pytest.raises(CaptureFailed):
        capture(model, (X,))

    assert model.linear.weight is weight
    assert 0.0 == model(X).item() - branch(model.linear(X)).item()


@torch.library.custom_op("meshwright_test::double", mutates_args=())
def _double(x: Tensor) -> Tensor:
    return x * 2


_double.register_fake(torch.empty_like)
_double.register_autograd(lambda _ctx, grad: grad * 2)


def test_an_operator_of_torch_library_is_kept_whole_with_its_backward() -> None:
    captured, _ = as_eager(Function(lambda y: _double(y).sum()).double(), (X.double(),))

    assert 1 == sum("meshwright_test.double" in op.target for op in captured.graph.ops)
