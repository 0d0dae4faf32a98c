"""Who reads whom among segment classes: the program folded to one segment of each class.

An operator is known by its segment class and its number among the segment's forward and then
backward operators; the first segment of a class, its *representative*, stands for all of them, and
so do its values and parameters.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.graph.opgraph import Op, OpGraph, OutputRole
from meshwright.graph.segments import Segmentation
from meshwright.spmd.terms import gradient_terms

__all__ = ["Wiring", "wiring_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """The folded program."""

    producers: Mapping[tuple[int, int, int], Counter[int]]
    """Segment class, number and operand to the values of representatives it reads, and how often
    in the program. Data and what depends on no parameter are left out."""
    copies: Mapping[int, int]
    """Parameter of a representative to how many parameters it stands for."""
    terms: Mapping[int, tuple[int, ...]]
    """Parameter to the values whose sum its gradient is."""
    sums: frozenset[int]
    """Operators that only add such terms; ``spmd.sharded`` leaves them out."""


def wiring_of(graph: OpGraph, segmentation: Segmentation) -> Wiring:
    """The wiring of a graph's segment classes."""
    number_of: dict[int, tuple[int, int]] = {}
    leaders: dict[tuple[int, int], Op] = {}
    for segment in segmentation.segments:
        for number, index in enumerate((*segment.forward_ops, *segment.backward_ops)):
            number_of[index] = (segment.segment_class, number)
            leaders.setdefault(number_of[index], graph.ops[index])
    makers = {
        value: (op.index, result)
        for op in graph.ops
        for result, value in enumerate(op.outputs)
        if value is not None
    }
    parameters = {item.value for item in graph.parameters}
    stands_for: dict[int, int] = {}
    copies: defaultdict[int, set[int]] = defaultdict(set)
    producers: defaultdict[tuple[int, int, int], Counter[int]] = defaultdict(Counter)
    for index, own in number_of.items():
        for operand, value in enumerate(graph.ops[index].inputs):
            found: int | None = None
            if value in parameters:
                found = stands_for.setdefault(value, leaders[own].inputs[operand])
                copies[found].add(value)
            elif value in makers and makers[value][0] in number_of:
                origin, result = makers[value]
                found = leaders[number_of[origin]].outputs[result]
            if found is not None:
                producers[(*own, operand)][found] += 1
    gradients = gradient_terms(graph)
    value_of = {item.name: item.value for item in graph.parameters}
    terms = {
        value_of[output.name]: gradients.of_value[output.value]
        for output in graph.outputs
        if output.role == OutputRole.GRADIENT
    }
    return Wiring(
        producers=dict(producers),
        copies={value: len(found) for value, found in copies.items()},
        terms=terms,
        sums=gradients.additions,
    )
