"""From what an operator is wanted to shard to the factors it does, and to its layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from meshwright.graph.factors import LeafFactor, Place
from meshwright.graph.rules.base import OpRule, Variant
from meshwright.spmd.layout import MICRO, Layout
from meshwright.spmd.wanted import fits

__all__ = ["chosen_factors", "operand_layout", "result_layout"]


def chosen_factors(
    factors: Sequence[LeafFactor],
    wanted: Mapping[str, Iterable[int]],
    axes: Sequence[str],
    sizes: Mapping[str, int],
) -> dict[str, int]:
    """For each axis the leaf factor of an operator it shards; none where it shards nothing.

    The first wanted class that some factor has and its size allows; of several such factors the
    first that leaves no partial sums.
    """
    left = [factor.size for factor in factors]
    choice: dict[str, int] = {}
    for axis in axes:
        ways = sizes[axis]
        for dimension_class in wanted.get(axis, ()):
            able = [
                index
                for index, factor in enumerate(factors)
                if fits(factor, dimension_class)
                and factor.divides(left[index], ways)
                and not (axis == MICRO and factor.variant == Variant.REDUCE_INSIDE)
            ]
            if able:
                best = min(able, key=lambda index: (bool(factors[index].partial_results), index))
                choice[axis] = best
                left[best] //= ways
                break
    return choice


def operand_layout(
    position: int,
    rule: OpRule,
    factors: Sequence[LeafFactor],
    choice: Mapping[str, int],
    carried: Mapping[str, frozenset[int]],
) -> Layout:
    """What the operand at ``position`` must have.

    Args:
        position: of the operand.
        rule: of the operator.
        factors: of the operator.
        choice: axis to the factor it shards.
        carried: axes over which partial sums pass through, to the operands that are partial.
    """
    shards: dict[Place, list[str]] = {}
    partial = {axis: "sum" for axis, where in carried.items() if position in where}
    for axis, index in choice.items():
        place = factors[index].operands[position]
        if place is not None:
            shards.setdefault(place, []).append(axis)
        elif position in rule.additive and factors[index].partial_results:
            partial[axis] = "sum"
    return Layout.of(shards, partial)


def result_layout(
    number: int,
    factors: Sequence[LeafFactor],
    choice: Mapping[str, int],
    carried: Iterable[str],
) -> Layout:
    """What result ``number`` has; ``choice`` and ``carried`` as in ``operand_layout``."""
    shards: dict[Place, list[str]] = {}
    partial = dict.fromkeys(carried, "sum")
    for axis, index in choice.items():
        place = factors[index].results[number]
        if place is not None:
            shards.setdefault(place, []).append(axis)
        elif number in factors[index].partial_results:
            partial[axis] = factors[index].reduction
    return Layout.of(shards, partial)
