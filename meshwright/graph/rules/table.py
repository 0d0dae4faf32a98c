"""The one table of rules: from an operator to how it may be sharded."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.graph.opgraph import Op, TensorSpec
from meshwright.graph.rules.base import OpFactor, OpRule, RuleFunction
from meshwright.graph.rules.indexing import INDEXING_RULES
from meshwright.graph.rules.matmul import MATMUL_RULES
from meshwright.graph.rules.nn import NN_RULES
from meshwright.graph.rules.pointwise import POINTWISE, RANDOM_POINTWISE, pointwise_rule
from meshwright.graph.rules.reductions import REDUCTION_RULES
from meshwright.graph.rules.spatial import SPATIAL_RULES
from meshwright.graph.rules.views import VIEW_RULES

__all__ = ["has_rule", "rule_names", "rule_of"]

_TABLE: dict[str, RuleFunction] = {
    **VIEW_RULES,
    **REDUCTION_RULES,
    **MATMUL_RULES,
    **NN_RULES,
    **SPATIAL_RULES,
    **INDEXING_RULES,
}


def rule_names() -> frozenset[str]:
    """Every rule: overloads (``aten.mm.default``), and element-wise operators by bare name."""
    return frozenset(_TABLE) | POINTWISE | RANDOM_POINTWISE


def has_rule(target: str) -> bool:
    """Whether an ATen overload can be sharded at all."""
    return target in _TABLE or target.split(".")[1] in POINTWISE | RANDOM_POINTWISE


def rule_of(op: Op, values: Sequence[TensorSpec]) -> tuple[OpRule, bool]:
    """The rule of ``op`` in a graph with these ``values``, and whether it is a real one.

    An operator without a rule gets one in which every dim is fixed: it runs on whole tensors.
    """
    operands = [values[value] for value in op.inputs]
    results = [None if value is None else values[value] for value in op.outputs]
    function = _TABLE.get(op.target)
    if function is None and has_rule(op.target):
        function = pointwise_rule
    rule = function(op, operands, results) if function is not None else None
    return (rule, True) if rule is not None else (_replicated(operands, results), False)


def _replicated(operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]) -> OpRule:
    factors: list[OpFactor] = []

    def dims(spec: TensorSpec | None) -> tuple[tuple[int, ...], ...]:
        named: list[tuple[int, ...]] = []
        for size in spec.shape if spec is not None else ():
            named.append((len(factors),) if size > 1 else ())
            if size > 1:
                factors.append(OpFactor(size=size, fixed=True))
        return tuple(named)

    return OpRule(
        operands=tuple(dims(spec) for spec in operands),
        results=tuple(dims(spec) for spec in results),
        factors=tuple(factors),
    )
