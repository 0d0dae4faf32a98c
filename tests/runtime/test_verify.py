"""Comparing with one device, on captured models."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.capture.captured import CapturedModel, capture
from meshwright.plans.plan import OptimizerName, OptimizerSpec, ScheduleName
from meshwright.runtime.dryrun import dry_run
from meshwright.runtime.verify import (
    Steps,
    compare,
    differences,
    reference_steps,
    source_of,
    verify_virtual,
)
from tests.runtime.single import LAYOUT, single_program


class Net(nn.Module):
    """Batch normalization (a buffer that changes), a skip, a dictionary and a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 3)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = batch["x"] + torch.relu(self.norm(self.first(batch["x"])))
        logits = self.last(hidden)
        return {"loss": F.cross_entropy(logits, batch["y"]), "logits": logits}


def _captured() -> tuple[Net, CapturedModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Net().double()
    batch = {"x": torch.randn(8, 6, dtype=torch.float64), "y": torch.randint(0, 3, (8,))}
    captured = capture(model, (batch,))
    return model, captured, captured.flatten_data((batch,))


def test_reference_steps_equal_the_eager_module() -> None:
    model, captured, data = _captured()
    spec = OptimizerSpec(name=OptimizerName.SGD, learning_rate=0.1, weight_decay=0.0)
    found = reference_steps(
        captured.graph, source_of(model, captured.constants), data, optimizer=spec, num_steps=3
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model({"x": data["args.0.x"], "y": data["args.0.y"]})["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses == pytest.approx(found.losses, rel=1e-13)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert max(differences(parameters, found.parameters).values()) < 1e-13


def test_one_virtual_rank_equals_the_reference() -> None:
    model, captured, data = _captured()
    verified = verify_virtual(
        captured.graph,
        [single_program(captured.graph)],
        LAYOUT,
        source_of(model, captured.constants),
        data,
        schedule=ScheduleName.GPIPE,
        num_microbatches=1,
        optimizer=OptimizerSpec(),
    )

    assert verified.within(1e-14)


def test_a_wrong_backward_is_found() -> None:
    """One operator of the backward is left out: its gradient is passed on unchanged."""
    model, captured, data = _captured()
    program = single_program(captured.graph)
    body = tuple(
        dataclasses.replace(item, target="aten.add.Tensor", args=(item.args[0], 0))
        if item.target == "aten.threshold_backward.default"
        else item
        for item in program.backward_final.body
    )
    wrong = dataclasses.replace(
        program, backward_final=dataclasses.replace(program.backward_final, body=body)
    )
    verified = verify_virtual(
        captured.graph,
        [wrong],
        LAYOUT,
        source_of(model, captured.constants),
        data,
        schedule=ScheduleName.GPIPE,
        num_microbatches=1,
        optimizer=OptimizerSpec(),
    )

    assert verified.gradients is not None
    assert verified.gradients > 1e-3


def test_a_captured_program_passes_the_dry_run() -> None:
    _, captured, _ = _captured()
    found = dry_run(
        single_program(captured.graph),
        LAYOUT,
        rank=0,
        schedule=ScheduleName.GPIPE,
        num_microbatches=1,
    )

    assert {} == found.collectives


def test_differences_are_relative_to_the_tensor() -> None:
    """0.1 of a tensor whose largest is 10, and noise in one that is zero beside it."""
    expected = {"a": torch.tensor([10.0, 0.0]), "zero": torch.tensor([0.0])}
    found = {"a": torch.tensor([10.0, 0.1]), "zero": torch.tensor([1e-6])}

    result = differences(expected, found)

    assert pytest.approx(0.01, rel=1e-5) == result["a"]
    assert pytest.approx(1e-6 / 1e-2, rel=1e-5) == result["zero"]


@pytest.mark.parametrize(
    "found",
    [{}, {"a": torch.tensor([math.nan])}, {"a": torch.zeros(2)}],
    ids=["missing", "not a number", "another shape"],
)
def test_what_cannot_be_compared_is_infinitely_wrong(found: dict[str, Tensor]) -> None:
    expected = {"a": torch.tensor([1.0])}
    verified = compare(
        Steps(losses=(1.0,), gradients=expected, parameters=expected),
        Steps(losses=(1.0,), gradients=found, parameters=expected),
    )

    assert verified.gradients is None
    assert not verified.within(1e9)


def test_an_element_whose_gradient_is_rounding_may_differ_by_its_steps_and_no_more() -> None:
    """Element 0 is unsteady with a reach of 0.02, element 1 steady; the largest parameter is 2."""
    expected = Steps(
        losses=(1.0,),
        gradients={},
        parameters={"w": torch.tensor([0.0, 2.0])},
        steady={"w": torch.tensor([False, True])},
        unsteady_reach=0.02,
    )

    def parameters_off_by(first: float, second: float) -> float | None:
        moved = {"w": torch.tensor([first, 2.0 + second])}
        return compare(expected, Steps(losses=(1.0,), gradients={}, parameters=moved)).parameters

    assert parameters_off_by(0.01, 0.0) == 0.0
    assert parameters_off_by(0.04, 0.0) == pytest.approx(0.02)
    assert parameters_off_by(0.0, 0.01) == pytest.approx(0.005, rel=1e-4)


def test_steady_elements_are_those_with_a_gradient_above_rounding() -> None:
    """The bias before a batch norm has no influence on the loss: its gradient is rounding."""
    model, captured, data = _captured()
    found = reference_steps(
        captured.graph,
        source_of(model, captured.constants),
        data,
        optimizer=OptimizerSpec(),
        num_steps=2,
    )

    assert not found.steady["first.bias"].any()
    assert found.steady["last.weight"].all()
