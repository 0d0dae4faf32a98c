"""The terms of gradients that autograd sums, one for each use of a parameter."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from meshwright.graph.opgraph import OpGraph, OutputRole

__all__ = ["GradientTerms", "gradient_terms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientTerms:
    """Gradients taken apart into what their sums add."""

    of_value: dict[int, tuple[int, ...]]
    """Value of a gradient to the values whose sum it is; one value where autograd adds none."""
    additions: frozenset[int]
    """Operators that add them: each stage adds its own terms, so nobody runs these."""


def gradient_terms(graph: OpGraph) -> GradientTerms:
    """The terms of every gradient of ``graph``.

    An addition is taken apart where nothing but the gradient reads its result.
    """
    uses = Counter(value for op in graph.ops for value in op.inputs)
    uses.update(output.value for output in graph.outputs)
    makers = {value: op for op in graph.ops for value in op.results}
    additions: set[int] = set()

    def terms(value: int) -> tuple[int, ...]:
        op = makers.get(value)
        if (
            op is None
            or op.target != "aten.add.Tensor"
            or op.forward_op is not None
            or len(op.inputs) != 2
            or op.kwargs
            or uses[value] > 1
        ):
            return (value,)
        additions.add(op.index)
        return tuple(term for operand in op.inputs for term in terms(operand))

    of_value = {
        output.value: terms(output.value)
        for output in graph.outputs
        if output.role == OutputRole.GRADIENT
    }
    return GradientTerms(of_value=of_value, additions=frozenset(additions))
