"""A step over slices equals a step over everything, with bounded temporaries."""

from __future__ import annotations

import pytest
import torch

from meshwright.plans.plan import OptimizerName, OptimizerSpec
from meshwright.profiling.optimizers import make_optimizer
from meshwright.runtime.stepping import SlicedOptimizer

SHAPES = {"weight": (7, 5), "bias": (3,), "scale": ()}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("name", list(OptimizerName))
@pytest.mark.parametrize("elements", [1, 4, 38, 1000])
def test_slices_give_the_same_numbers_bit_for_bit(name: OptimizerName, elements: int) -> None:
    spec = OptimizerSpec(name=name)
    whole, cut = tensors(0), tensors(0)
    expected = make_optimizer(spec, list(whole.values()))
    assert expected is not None
    sliced = SlicedOptimizer(spec, cut, step_bytes=8 * elements)
    for step in range(3):
        gradients = tensors(1 + step)
        for key, tensor in whole.items():
            tensor.grad = gradients[key]
        expected.step()
        sliced.step(gradients)

    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_no_step_works_on_more_than_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """39 elements, 4 at a time: ten steps, and the state is of all elements."""
    sizes = []
    original = torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW) -> None:
        sizes.append(sum(p.numel() for group in self.param_groups for p in group["params"]))
        original(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    sliced = SlicedOptimizer(OptimizerSpec(), tensors(0), step_bytes=8 * 4)
    sliced.step(tensors(1))

    assert [4] * 9 + [3] == sizes
    assert 2 * 8 * 39 == sliced.state_bytes(SHAPES)


def test_what_has_no_gradient_stays() -> None:
    held = tensors(0)
    sliced = SlicedOptimizer(OptimizerSpec(), held)
    sliced.step({"bias": torch.ones(3, dtype=torch.float64)})

    assert torch.equal(tensors(0)["weight"], held["weight"])
    assert not torch.equal(tensors(0)["bias"], held["bias"])
