"""Index rules: which factors an operator's dims are made of, and what sharding each does.

A rule writes every dim of every operand and result as a product of *factors*, outermost first.
Sharding a factor means: each rank gets its block of that factor in every tensor that has it, runs
the operator on what it got, and

* a result that has the factor comes out sharded along it;
* a result listed in the factor's ``partial_results`` comes out as a partial sum (or maximum);
* any other result comes out whole and equal on every rank.

A ``fixed`` factor cannot be sharded this way; one of variant ``HALO`` or ``RING`` can be with rows
of other ranks. Dims of size 1 have no factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from meshwright.graph.opgraph import Op, TensorSpec

__all__ = [
    "DimFactors",
    "Halo",
    "LocalArgKind",
    "LocalArgument",
    "OpFactor",
    "OpRule",
    "RuleFunction",
    "Variant",
    "einsum_rule",
]

DimFactors = tuple[tuple[int, ...], ...]
"""For each dim the indices of its factors, outermost first."""


class Variant(StrEnum):
    """How the local operator differs when the factor is sharded."""

    NONE = ""
    """The same operator on the local tensors."""
    OFFSET = "offset"
    """Indices count from this rank's first row; others' rows are masked."""
    REDUCE_INSIDE = "reduce_inside"
    """Needs collectives in the middle of the operator: an expansion replaces it."""
    HALO = "halo"
    """Each rank needs some rows of its neighbors too (arXiv 1712.04432, domain parallelism)."""
    RING = "ring"
    """Blocks of keys and values go around all ranks (ring attention, arXiv 2310.01889)."""


@dataclass(frozen=True, slots=True)
class Halo:
    """Rows a rank reads next to its own when a spatial dim is cut into equal blocks.

    Output row ``p`` reads rows ``stride p - before`` and on; a rank with ``n`` output rows has
    ``stride n`` input rows, reads ``before`` rows of the rank before it and ``after`` of the one
    behind it, and none where there is no rank: padding stands there. A negative ``after``: the last
    own rows are not read.
    """

    stride: int
    before: int
    after: int

    def allows(self, num_outputs: int) -> bool:
        """Whether blocks of so many output rows find all they need at their neighbors."""
        return self.stride * num_outputs >= max(self.before, self.after, -self.after)


class LocalArgKind(StrEnum):
    """Where a size written into an operator's arguments comes from on a rank."""

    SHAPE = "shape"
    """The local shape of the result."""
    SIZE = "size"
    """One dim of the local shape of the result (or operand)."""
    SPLIT_SIZES = "split_sizes"
    """For each result its local size along a dim."""


@dataclass(frozen=True, slots=True)
class LocalArgument:
    """``args[position]`` is replaced by a local size of kind ``kind``."""

    position: int
    kind: LocalArgKind
    tensor: int = 0
    """Result number, or ``-1 - n`` for operand n."""
    dim: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpFactor:
    """One factor of an operator's index space."""

    size: int
    fixed: bool = False
    partial_results: frozenset[int] = frozenset()
    """Results that hold only a part once the factor is sharded."""
    reduction: str = "sum"
    """``sum`` or ``max``: what makes the parts whole."""
    variant: Variant = Variant.NONE
    averaged: bool = False
    """The local operator divides by the local size (a mean): its result must be scaled by
    local size / full size."""
    halo: Halo | None = None
    """Of variant ``HALO``: what is exchanged."""
    partner: int | None = None
    """Of variant ``HALO``: the factor of the dims that hold ``stride`` times as many rows, which
    are cut with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRule:
    """The rule of one operator at its shapes."""

    factors: tuple[OpFactor, ...]
    operands: tuple[DimFactors, ...]
    """One for each value in ``Op.inputs``."""
    results: tuple[DimFactors, ...]
    """One for each entry of ``Op.outputs``."""
    linear: tuple[frozenset[int], ...] = ()
    """Sets of operands in which the operator is jointly linear: partial sums in exactly one of
    these sets give partial sums in every result."""
    additive: frozenset[int] = frozenset()
    """Operands added to a contraction (a bias): when a contracted factor is sharded only one rank
    may add them."""
    ignored: frozenset[int] = frozenset()
    """Operands whose values the operator does not read."""
    local_arguments: tuple[LocalArgument, ...] = ()
    random: bool = False
    is_view: bool = False
    """The result shares the operand's storage and costs nothing."""


RuleFunction = Callable[[Op, Sequence[TensorSpec], Sequence[TensorSpec | None]], OpRule | None]
"""From the operator, the specs of ``op.inputs`` and of ``op.outputs`` to its rule."""


def einsum_rule(
    equation: str,
    operands: Sequence[TensorSpec],
    results: Sequence[TensorSpec | None],
    *,
    fixed: str = "",
    partial: dict[str, frozenset[int]] | None = None,
    variants: dict[str, Variant] | None = None,
    averaged: str = "",
    halos: dict[str, tuple[Halo, str]] | None = None,
    linear: tuple[frozenset[int], ...] = (),
    additive: frozenset[int] = frozenset(),
    ignored: frozenset[int] = frozenset(),
    local_arguments: tuple[LocalArgument, ...] = (),
    random: bool = False,
    is_view: bool = False,
) -> OpRule:
    """Rule from an index equation, one letter a dim: ``"mk,kn->mn"``.

    ``"."`` is a dim without factor. A letter missing in a result makes that result partial, unless
    ``partial`` says which results are. Dims of size 1 lose their factor; a letter takes the largest
    size it meets, so a broadcast operand simply lacks it. ``halos`` names the letter of a halo's
    inputs too, the same one where they are as many as the outputs.
    """
    operand_names, result_names = _tensor_names(equation)
    size_of = _letter_sizes(equation, [*operand_names, *result_names], [*operands, *results])
    index_of = {name: index for index, name in enumerate(size_of)}
    kept = {
        name: halo
        for name, halo in (halos or {}).items()
        if name in index_of and halo[1] in index_of
    }
    factors = tuple(
        OpFactor(
            size=size,
            fixed=name in fixed,
            partial_results=partial[name]
            if partial is not None and name in partial
            else _results_without(name, result_names, results),
            variant=Variant.HALO if name in kept else (variants or {}).get(name, Variant.NONE),
            averaged=name in averaged,
            halo=kept[name][0] if name in kept else None,
            partner=index_of[kept[name][1]] if name in kept and kept[name][1] != name else None,
        )
        for name, size in size_of.items()
    )
    return OpRule(
        factors=factors,
        operands=tuple(
            _dims(names, spec, index_of)
            for names, spec in zip(operand_names, operands, strict=True)
        ),
        results=tuple(
            _dims(names, spec, index_of) for names, spec in zip(result_names, results, strict=True)
        ),
        linear=linear,
        additive=additive,
        ignored=ignored,
        local_arguments=local_arguments,
        random=random,
        is_view=is_view,
    )


def _tensor_names(equation: str) -> tuple[list[str], list[str]]:
    """Letters of each operand and of each result."""
    left, right = equation.split("->")
    return left.split(",") if left else [], right.split(",")


def _letter_sizes(
    equation: str, tensors: Sequence[str], specs: Sequence[TensorSpec | None]
) -> dict[str, int]:
    """Size of every letter that is larger than 1 somewhere, in order of appearance."""
    size_of: dict[str, int] = {}
    for names, spec in zip(tensors, specs, strict=True):
        if spec is None:
            continue
        assert len(names) == len(spec.shape), f"{equation}: {names} against shape {spec.shape}"
        for name, size in zip(names, spec.shape, strict=True):
            if name != "." and size > 1:
                known = size_of.setdefault(name, size)
                assert known == size, f"{equation}: {name} is {known} and {size}"
    return size_of


def _dims(names: str, spec: TensorSpec | None, index_of: dict[str, int]) -> DimFactors:
    if spec is None:
        return ()
    return tuple(
        (index_of[name],) if name != "." and size > 1 else ()
        for name, size in zip(names, spec.shape, strict=True)
    )


def _results_without(
    name: str, result_names: Sequence[str], results: Sequence[TensorSpec | None]
) -> frozenset[int]:
    """Results that lose a dim: parts of a sum once it is sharded."""
    return frozenset(
        position
        for position, (names, spec) in enumerate(zip(result_names, results, strict=True))
        if spec is not None and name not in names
    )
