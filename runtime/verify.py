"""Is the distributed step the single-device step? Largest relative differences.

The reference runs the whole OpGraph on one device, operator by operator, and steps the same
optimizer. Differences are relative to the largest magnitude of the reference *tensor*, not of the
element: a sum of numbers that cancel has no better accuracy than its largest terms. A tensor whose
largest magnitude is below a fraction of the largest among all tensors compared is measured against
that fraction instead. For gradients the fraction is ``GRADIENT_FLOOR``: one that is zero in exact
arithmetic (of the bias of an attention key) is nothing but rounding on both sides. For parameters
it is 1, so all are measured against the largest: a young bias is no larger than a few steps.

AdamW divides a gradient by its own size, so where a gradient is itself rounding, the direction of
the step is too. Elements whose gradient is ever below ``sqrt(machine epsilon)`` of its tensor's
(floored as above) are *unsteady*: of them only what exceeds the longest way such steps can go
counts as a difference. SGD has no unsteady elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from meshwright.capture.execute import execute
from meshwright.graph.opgraph import InputRole, OpGraph
from meshwright.plans.plan import OptimizerName, OptimizerSpec, ScheduleName
from meshwright.profiling.optimizers import make_optimizer
from meshwright.records.report import Verified, finite_or_none
from meshwright.runtime.mesh import Layout
from meshwright.runtime.state import TensorSource
from meshwright.runtime.virtual import VirtualCluster
from meshwright.spmd.program import StageProgram

__all__ = [
    "GRADIENT_FLOOR",
    "Steps",
    "compare",
    "differences",
    "largest_difference",
    "reference_steps",
    "source_of",
    "verify_virtual",
    "virtual_steps",
]

GRADIENT_FLOOR = 1e-3

_ADAMW_LONGEST_STEP = 10.0
"""In learning rates. AdamW's step is at most ``(1 - beta1) / sqrt(1 - beta2)`` of one, 3.2 with the
usual constants (Kingma and Ba, arXiv 1412.6980, section 2.1); weight decay adds less than one."""

_LOW_PRECISION = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What some optimizer steps on one batch gave; full tensors by parameter name."""

    losses: tuple[float, ...]
    """Before each optimizer step."""
    gradients: Mapping[str, Tensor]
    """Of the first step."""
    parameters: Mapping[str, Tensor]
    """After the last step; the fp32 copies in bf16 and fp16."""
    steady: Mapping[str, Tensor] = field(default_factory=dict)
    """Of the reference: which elements had a gradient above rounding in every step."""
    unsteady_reach: float = 0.0
    """How far apart two unsteady elements may be."""


def source_of(model: nn.Module, constants: Mapping[str, Tensor] | None = None) -> TensorSource:
    """Full tensors by name from a real module: parameters, buffers, captured constants."""
    named: dict[str, Tensor] = {
        **dict(model.named_parameters()),
        **dict(model.named_buffers()),
        **(constants or {}),
    }
    return named.__getitem__


def reference_steps(
    graph: OpGraph,
    source: TensorSource,
    data: Mapping[str, Tensor],
    *,
    optimizer: OptimizerSpec,
    num_steps: int,
) -> Steps:
    """``num_steps`` steps of the whole graph on one device, always on the same batch."""
    inputs: dict[int, Tensor] = {}
    updated: dict[str, Tensor] = {}
    for item in graph.inputs:
        if item.role is InputRole.DATA:
            inputs[item.value] = data[item.name]
            continue
        inputs[item.value] = source(item.name).detach().clone()
        if item.role is InputRole.PARAMETER:
            parameter = inputs[item.value]
            is_low = parameter.dtype in _LOW_PRECISION
            updated[item.name] = parameter.float() if is_low else parameter
    stepper = make_optimizer(optimizer, list(updated.values()))
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    steady: dict[str, Tensor] = {}
    for step in range(num_steps):
        result = execute(graph, inputs)
        _note_steady(steady, result.gradients)
        losses.append(float(result.loss))
        if step == 0:
            gradients = {name: gradient.clone() for name, gradient in result.gradients.items()}
        for name, parameter in updated.items():
            gradient = result.gradients.get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        if stepper is not None:
            stepper.step()
        for item in graph.inputs:
            if item.name in updated and inputs[item.value] is not updated[item.name]:
                inputs[item.value].copy_(updated[item.name])
            if item.name in result.buffer_updates:
                inputs[item.value] = result.buffer_updates[item.name]
    adapts = optimizer.name is OptimizerName.ADAMW
    return Steps(
        losses=tuple(losses),
        gradients=gradients,
        parameters=updated,
        steady=steady if adapts else {},
        unsteady_reach=2 * _ADAMW_LONGEST_STEP * optimizer.learning_rate * num_steps,
    )


def _note_steady(steady: dict[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    """Keep as steady the elements whose gradient is above rounding in this step too."""
    largest = max((_magnitude(gradient) for gradient in gradients.values()), default=0.0)
    for name, gradient in gradients.items():
        scale = max(_magnitude(gradient), GRADIENT_FLOOR * largest)
        above = gradient.abs() >= math.sqrt(torch.finfo(gradient.dtype).eps) * scale
        steady[name] = steady[name] & above if name in steady else above


def virtual_steps(cluster: VirtualCluster, data: Mapping[str, Tensor], *, num_steps: int) -> Steps:
    """``num_steps`` steps of every virtual rank, always on the same global batch."""
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(num_steps):
        results = cluster.step(data)
        losses += [float(result.loss[0]) for result in results if result.loss is not None]
        if step == 0:
            gradients = cluster.full_gradients(results)
    return Steps(losses=tuple(losses), gradients=gradients, parameters=cluster.full_parameters())


def verify_virtual(
    graph: OpGraph,
    programs: Sequence[StageProgram],
    layout: Layout,
    source: TensorSource,
    data: Mapping[str, Tensor],
    *,
    schedule: ScheduleName,
    num_microbatches: int,
    optimizer: OptimizerSpec,
    num_steps: int = 3,
) -> Verified:
    """Differences between all virtual ranks of a plan and one device, on a global batch."""
    cluster = VirtualCluster(
        programs,
        layout,
        source,
        schedule=schedule,
        num_microbatches=num_microbatches,
        optimizer=optimizer,
    )
    found = virtual_steps(cluster, data, num_steps=num_steps)
    expected = reference_steps(graph, source, data, optimizer=optimizer, num_steps=num_steps)
    return compare(expected, found)


def compare(expected: Steps, found: Steps) -> Verified:
    """Largest relative differences; see the module docstring."""
    return Verified(
        loss=finite_or_none(
            largest_difference(_losses(expected), _losses(found), floor_fraction=0.0)
        ),
        gradients=finite_or_none(largest_difference(expected.gradients, found.gradients)),
        parameters=finite_or_none(
            largest_difference(
                expected.parameters, _without_unsteady(expected, found), floor_fraction=1.0
            )
        ),
    )


def _without_unsteady(expected: Steps, found: Steps) -> dict[str, Tensor]:
    """``found.parameters`` with unsteady elements that are within reach taken from ``expected``."""
    result = dict(found.parameters)
    for name, steady in expected.steady.items():
        if name not in result or result[name].shape != steady.shape:
            continue
        wanted, got = expected.parameters[name], result[name]
        near = (wanted.double() - got.double()).abs() <= expected.unsteady_reach
        result[name] = torch.where(steady | ~near, got, wanted.to(got.dtype))
    return result


def _losses(steps: Steps) -> dict[str, Tensor]:
    return {
        str(step): torch.tensor(loss, dtype=torch.float64) for step, loss in enumerate(steps.losses)
    }


def largest_difference(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    *,
    floor_fraction: float = GRADIENT_FLOOR,
) -> float:
    """Largest difference between tensors of one name; infinite where a name is missing."""
    return max(differences(expected, found, floor_fraction=floor_fraction).values(), default=0.0)


def differences(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    *,
    floor_fraction: float = GRADIENT_FLOOR,
) -> dict[str, float]:
    """Relative difference by name; infinite for a name that only one side has."""
    magnitudes = {name: _magnitude(tensor) for name, tensor in expected.items()}
    floor = floor_fraction * max(magnitudes.values(), default=0.0)
    result: dict[str, float] = dict.fromkeys({*expected} ^ {*found}, math.inf)
    for name in {*expected} & {*found}:
        left, right = expected[name].double(), found[name].double()
        if left.shape != right.shape:
            result[name] = math.inf
            continue
        difference = _magnitude(left - right)
        scale = max(magnitudes[name], floor)
        if math.isnan(difference) or math.isnan(scale):
            result[name] = math.inf
        else:
            result[name] = 0.0 if difference == 0 else difference / scale if scale else math.inf
    return result


def _magnitude(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0
