"""Runs an OpGraph on real tensors, one operator after the other.

The plainest meaning of a graph: what distributed programs are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.graph.opgraph import Arg, Literal, Op, OpGraph, OutputRole, Ref

__all__ = ["StepResult", "call_op", "execute", "resolve_target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step returns."""

    loss: Tensor
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    """By parameter name; a parameter the loss does not depend on has none."""
    buffer_updates: dict[str, Tensor]


def resolve_target(target: str) -> Any:
    """The torch operator called ``target``, e.g. ``"aten.mm.default"``."""
    namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def execute(graph: OpGraph, inputs: Mapping[int, Tensor]) -> StepResult:
    """Results of ``graph`` for the tensors in ``inputs``, by value number.

    All inputs lie on one device, where everything is computed. A value is freed
    after its last reader. Random operators draw from torch's global generator.
    """
    held = dict(inputs)
    device = next((tensor.device for tensor in inputs.values()), torch.device("cpu"))
    kept = {item.value for item in graph.outputs}
    last_reader = {value: op.index for op in graph.ops for value in op.inputs}
    with torch.no_grad():
        for op in graph.ops:
            for value, tensor in zip(op.outputs, call_op(op, held, device), strict=True):
                if value is not None and (value in kept or value in last_reader):
                    held[value] = tensor
            for value in set(op.inputs):
                if last_reader[value] == op.index and value not in kept:
                    del held[value]

    def by_name(role: OutputRole) -> dict[str, Tensor]:
        return {item.name: held[item.value] for item in graph.outputs_of(role)}

    return StepResult(
        loss=by_name(OutputRole.LOSS)["loss"],
        outputs=by_name(OutputRole.OUTPUT),
        gradients=by_name(OutputRole.GRADIENT),
        buffer_updates=by_name(OutputRole.BUFFER_UPDATE),
    )


def call_op(op: Op, held: Mapping[int, Tensor], device: torch.device) -> Sequence[Any]:
    """What one operator returns for the values in ``held``, one item for each of its outputs."""
    result = resolve_target(op.target)(
        *(_argument(arg, held, device) for arg in op.args),
        **{key: _argument(arg, held, device) for key, arg in op.kwargs},
    )
    return result if isinstance(result, list | tuple) else (result,)


def _argument(arg: Arg, held: Mapping[int, Tensor], device: torch.device) -> Any:
    """The Python object an operator is called with."""
    if isinstance(arg, Ref):
        return held[arg.value]
    if isinstance(arg, tuple):
        return [_argument(item, held, device) for item in arg]
    if isinstance(arg, Literal):
        return device if arg.kind == "device" else getattr(torch, arg.name)
    return arg
