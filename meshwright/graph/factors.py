"""Dimension classes: which dims of which tensors must be cut alike, found by propagation.

Every dim of every value is a product of *leaves*. Each operator's rule equates the dims of its
operands with its own factors; equating two products splits leaves into common divisors and merges
equal ones. What remains are the classes: all dims that contain a leaf of one class move together.
Nothing is named: batch, heads or vocabulary come out because the operators tie them.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.graph.kinds import OpKinds, op_kinds
from meshwright.graph.opgraph import Op, OpGraph
from meshwright.graph.rules.base import Halo, OpFactor, OpRule, Variant
from meshwright.graph.rules.table import rule_of

__all__ = ["FactorAnalysis", "LeafFactor", "Place", "analyze_factors", "rules_of"]

Place = tuple[int, int]
"""``(dim, position)``: the position-th leaf of a dim of a value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafFactor:
    """A factor of an operator after all splits: one leaf."""

    dimension_class: int
    size: int
    fixed: bool
    partial_results: frozenset[int]
    reduction: str
    variant: Variant
    averaged: bool
    operands: tuple[Place | None, ...]
    """Where the leaf sits in each operand."""
    results: tuple[Place | None, ...]
    halo: Halo | None = None
    """Of variant ``HALO``, whose size is that of the output."""

    def divides(self, local_size: int, ways: int) -> bool:
        """Whether ``local_size`` of the factor can be cut ``ways`` ways.

        A halo must lie with the next neighbors.
        """
        if local_size % ways:
            return False
        if self.variant is Variant.HALO:
            return self.halo is not None and self.halo.allows(local_size // ways)
        return not self.fixed or self.variant is Variant.RING


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorAnalysis:
    """Rules and classes of a whole graph."""

    graph: OpGraph
    rules: tuple[OpRule, ...]
    leaf_factors: tuple[tuple[LeafFactor, ...], ...]
    """For each operator."""
    value_dims: tuple[tuple[tuple[int, ...], ...], ...]
    """For each value and dim, the classes of its leaves, outermost first."""
    class_size: dict[int, int]
    operators_without_rule: tuple[str, ...]
    """Targets that run on whole tensors because no rule is known."""


class _Leaves:
    """Union-find over leaves that can be split into an outer and an inner part."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._parts: list[tuple[int, int] | None] = []
        self.size: list[int] = []

    def new(self, size: int) -> int:
        self._parent.append(len(self._parent))
        self._parts.append(None)
        self.size.append(size)
        return len(self._parent) - 1

    def find(self, node: int) -> int:
        root = node
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[node] != root:
            self._parent[node], node = root, self._parent[node]
        return root

    def expand(self, nodes: tuple[int, ...]) -> tuple[int, ...]:
        """The leaves that ``nodes`` consist of now, outermost first."""
        leaves: list[int] = []
        stack = list(reversed(nodes))
        while stack:
            root = self.find(stack.pop())
            parts = self._parts[root]
            if parts is None:
                leaves.append(root)
            else:
                stack += [parts[1], parts[0]]
        return tuple(leaves)

    def _split(self, root: int, outer_size: int) -> None:
        outer = self.new(outer_size)
        self._parts[root] = (outer, self.new(self.size[root] // outer_size))

    def _pop(self, stack: list[int]) -> int:
        leaves = self.expand((stack.pop(),))
        stack.extend(reversed(leaves[1:]))
        return leaves[0]

    def equate(self, first: tuple[int, ...], second: tuple[int, ...]) -> bool:
        """Make two products of equal size the same; ``False`` where they have no common split."""
        if not _compatible(
            [self.size[leaf] for leaf in self.expand(first)],
            [self.size[leaf] for leaf in self.expand(second)],
        ):
            return False
        left, right = list(reversed(first)), list(reversed(second))
        while left and right:
            a, b = self._pop(left), self._pop(right)
            if a == b:
                continue
            if self.size[a] == self.size[b]:
                self._parent[b] = a
            elif self.size[a] % self.size[b] == 0:
                self._split(a, self.size[b])
                left.append(a)
                right.append(b)
            elif self.size[b] % self.size[a] == 0:
                self._split(b, self.size[a])
                left.append(a)
                right.append(b)
            else:
                return False
        return not left and not right


def _compatible(first: list[int], second: list[int]) -> bool:
    left, right = first[::-1], second[::-1]
    while left and right:
        a, b = left.pop(), right.pop()
        if a == b:
            continue
        big, small, stack = (a, b, left) if a > b else (b, a, right)
        if big % small:
            return False
        stack.append(big // small)
    return not left and not right


def rules_of(graph: OpGraph, kinds: OpKinds) -> tuple[tuple[OpRule, ...], tuple[str, ...]]:
    """The rule of every operator, and the targets that have none; equal kinds share a rule."""
    found: dict[int, OpRule] = {}
    missing: set[str] = set()
    for op, kind in zip(graph.ops, kinds.kind, strict=True):
        if kind not in found:
            found[kind], known = rule_of(op, graph.values)
            if not known:
                missing.add(op.target)
    return tuple(map(found.__getitem__, kinds.kind)), tuple(sorted(missing))


def analyze_factors(graph: OpGraph) -> FactorAnalysis:
    """Rules, leaves and dimension classes of ``graph``."""
    rules, missing = rules_of(graph, op_kinds(graph))
    leaves = _Leaves()
    dims_of: list[tuple[tuple[int, ...], ...]] = [()] * len(graph.values)
    for item in graph.inputs:
        dims_of[item.value] = tuple(
            (leaves.new(size),) if size > 1 else () for size in graph.values[item.value].shape
        )
    nodes_of_op: list[tuple[int, ...]] = []
    blocked: list[frozenset[int]] = []
    for op, rule in zip(graph.ops, rules, strict=True):
        nodes, bad = _apply(op, rule, leaves, dims_of)
        nodes_of_op.append(nodes)
        blocked.append(bad)
    value_dims = tuple(tuple(leaves.expand(dim) for dim in dims) for dims in dims_of)
    leaf_factors = tuple(
        _leaf_factors(op, rule, nodes, bad, leaves, value_dims)
        for op, rule, nodes, bad in zip(graph.ops, rules, nodes_of_op, blocked, strict=True)
    )
    used = {leaf for dims in value_dims for dim in dims for leaf in dim}
    used |= {factor.dimension_class for factors in leaf_factors for factor in factors}
    return FactorAnalysis(
        graph=graph,
        rules=rules,
        leaf_factors=leaf_factors,
        value_dims=value_dims,
        class_size={leaf: leaves.size[leaf] for leaf in sorted(used)},
        operators_without_rule=missing,
    )


def _apply(
    op: Op, rule: OpRule, leaves: _Leaves, dims_of: list[tuple[tuple[int, ...], ...]]
) -> tuple[tuple[int, ...], frozenset[int]]:
    """Tie the operator's factors to its operands and give its results their dims.

    Returns the node of each factor, and the factors that cannot be sharded because an operand's
    dims have no common split with what the rule expects.
    """
    nodes = tuple(leaves.new(factor.size) for factor in rule.factors)
    bad: set[int] = set()
    for value, dims in zip(op.inputs, rule.operands, strict=True):
        for own, theirs in zip(dims, dims_of[value], strict=True):
            if not leaves.equate(theirs, tuple(nodes[factor] for factor in own)):
                bad.update(own)
    for result, dims in zip(op.outputs, rule.results, strict=True):
        if result is not None:
            dims_of[result] = tuple(tuple(nodes[factor] for factor in dim) for dim in dims)
    return nodes, frozenset(bad)


def _leaf_factors(
    op: Op,
    rule: OpRule,
    nodes: tuple[int, ...],
    bad: frozenset[int],
    leaves: _Leaves,
    value_dims: tuple[tuple[tuple[int, ...], ...], ...],
) -> tuple[LeafFactor, ...]:
    expanded = [leaves.expand((node,)) for node in nodes]
    is_whole = [len(parts) == 1 and index not in bad for index, parts in enumerate(expanded)]
    operand_places = [
        _places(dims, expanded, value_dims[value])
        for value, dims in zip(op.inputs, rule.operands, strict=True)
    ]
    result_places = [
        {} if value is None else _places(dims, expanded, value_dims[value])
        for value, dims in zip(op.outputs, rule.results, strict=True)
    ]
    found: list[LeafFactor] = []
    for index, factor in enumerate(rule.factors):
        keeps_halo = _keeps_halo(factor, index, is_whole)
        for part, leaf in enumerate(expanded[index]):
            key = (index, part)
            # A halo cuts its partner, the dims with ``stride`` times as many rows, as well.
            other = key if factor.partner is None or not keeps_halo else (factor.partner, 0)
            found.append(
                LeafFactor(
                    dimension_class=leaf,
                    size=leaves.size[leaf],
                    # Row numbers count whole rows, so only the outermost part can be cut.
                    fixed=factor.fixed
                    or index in bad
                    or (factor.variant == Variant.OFFSET and part > 0),
                    partial_results=factor.partial_results,
                    reduction=factor.reduction,
                    variant=factor.variant if keeps_halo else Variant.NONE,
                    averaged=factor.averaged,
                    operands=tuple(places.get(key, places.get(other)) for places in operand_places),
                    results=tuple(places.get(key, places.get(other)) for places in result_places),
                    halo=factor.halo if keeps_halo else None,
                )
            )
    return tuple(found)


def _keeps_halo(factor: OpFactor, index: int, is_whole: list[bool]) -> bool:
    """Whether a factor of variant ``HALO`` or ``RING`` was not split; true for all others."""
    if factor.variant not in {Variant.HALO, Variant.RING}:
        return True
    return is_whole[index] and (factor.partner is None or is_whole[factor.partner])


def _places(
    dims: tuple[tuple[int, ...], ...],
    expanded: list[tuple[int, ...]],
    value_dims: tuple[tuple[int, ...], ...],
) -> dict[tuple[int, int], Place]:
    """Where each (factor, part) of an operator sits in one of its tensors."""
    places: dict[tuple[int, int], Place] = {}
    for dim, factors in enumerate(dims):
        keys = [(factor, part) for factor in factors for part in range(len(expanded[factor]))]
        if len(keys) != len(value_dims[dim]):
            continue
        for position, key in enumerate(keys):
            places[key] = (dim, position)
    return places
