"""What a program must not do, whoever runs it."""

from __future__ import annotations

import torch

from meshwright.errors import PlanRefused
from meshwright.runtime.kernels import resolve_target
from meshwright.runtime.mesh import program_functions
from meshwright.spmd.program import Compute, Function, StageProgram

__all__ = ["check_program", "draws_random"]

_PROBABILITY_ARGUMENTS = frozenset({"dropout_p", "p"})


def check_program(program: StageProgram) -> None:
    """Refuse a program that would draw random numbers twice for one operator.

    Recomputing a dropout gives another mask than the forward pass used, and so a wrong gradient.

    Raises:
        PlanRefused: naming the operator.
    """
    drawn = {item.op_index for item in _random(program.forward)} - {-1}
    for function in (program.backward, program.backward_final):
        for item in _random(function):
            if item.op_index in drawn:
                raise PlanRefused(
                    f"stage {program.stage}: operator {item.op_index} ({item.target}) draws random "
                    "numbers and is recomputed, which would draw others; set recompute to none "
                    "there, or dropout to 0"
                )


def draws_random(program: StageProgram) -> bool:
    """Whether a step draws random numbers, so that its result depends on the order of drawing."""
    return any(_random(function) for function in program_functions(program).values())


def _random(function: Function) -> list[Compute]:
    """Operators that draw random numbers."""
    return [item for item in function.body if isinstance(item, Compute) and _is_random(item)]


def _is_random(item: Compute) -> bool:
    if item.target.startswith("meshwright."):
        return False
    op = resolve_target(item.target)
    if torch.Tag.nondeterministic_seeded not in op.tags:  # type: ignore[attr-defined]
        return False
    arguments = op._schema.arguments  # type: ignore[attr-defined]
    given = {argument.name: argument.default_value for argument in arguments}
    given |= {argument.name: value for argument, value in zip(arguments, item.args, strict=False)}
    given |= dict(item.kwargs)
    probabilities = [given[name] for name in _PROBABILITY_ARGUMENTS & given.keys()]
    return not probabilities or any(value != 0 for value in probabilities)
