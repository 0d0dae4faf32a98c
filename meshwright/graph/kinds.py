"""What each operator reads and writes, and which operators are alike, found in one walk.

Two operators are of one *kind* where they have the same target and phase, read and write tensors of
the same shapes and dtypes, repeat the same values among what they read, and have the same other
arguments. Which values they read does not matter, except for what role an input of the graph has.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.graph.opgraph import Arg, InputRole, Literal, OpGraph, Ref

__all__ = ["OpKinds", "op_kinds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpKinds:
    """One entry for each operator of a graph."""

    inputs: tuple[tuple[int, ...], ...]
    """``Op.inputs``."""
    results: tuple[tuple[int, ...], ...]
    """``Op.results``."""
    kind: tuple[int, ...]
    """Equal numbers for operators of one kind, from 0 in order of appearance."""


def op_kinds(graph: OpGraph) -> OpKinds:
    """The kinds of all operators of ``graph``."""
    specs: dict[tuple[object, ...], int] = {}
    spec_of = [specs.setdefault((spec.shape, spec.dtype), len(specs)) for spec in graph.values]
    # What an input is counts as part of its description.
    roles = {role: number for number, role in enumerate(InputRole)}
    for item in graph.inputs:
        spec_of[item.value] += (1 + roles[item.role]) * (len(specs) + 1)
    numbers: dict[tuple[object, ...], int] = {}
    inputs: list[tuple[int, ...]] = []
    results: list[tuple[int, ...]] = []
    kind: list[int] = []
    for op in graph.ops:
        refs: list[int] = []
        local: dict[int, int] = {}
        key = (
            op.target,
            op.phase,
            _shape(op.args, refs, local, spec_of),
            tuple([(name, _shape(arg, refs, local, spec_of)) for name, arg in op.kwargs]),
            tuple([-1 if value is None else spec_of[value] for value in op.outputs]),
        )
        inputs.append(tuple(refs))
        results.append(tuple([value for value in op.outputs if value is not None]))
        kind.append(numbers.setdefault(key, len(numbers)))
    return OpKinds(inputs=tuple(inputs), results=tuple(results), kind=tuple(kind))


def _shape(arg: Arg, refs: list[int], local: dict[int, int], spec_of: list[int]) -> object:
    """``arg`` with each value replaced by its description; appends the values to ``refs``."""
    if isinstance(arg, Ref):
        value = arg.value
        refs.append(value)
        return (Ref, local.setdefault(value, len(local)), spec_of[value])
    if isinstance(arg, tuple):
        return tuple([_shape(item, refs, local, spec_of) for item in arg])
    if isinstance(arg, Literal):
        return (Literal, arg.kind, arg.name)
    # Numbers that are equal may still be of different types (1 and True) or signs (0.0, -0.0).
    return repr(arg) if isinstance(arg, float) else (type(arg), arg)
