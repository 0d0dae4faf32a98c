"""Operators whose work grows with the product of two lengths of the sequence."""

from __future__ import annotations

from meshwright.graph.factors import FactorAnalysis
from meshwright.graph.opgraph import InputRole, Op, Phase

__all__ = ["AttentionFinder", "is_sliceable"]

_FUSED = "scaled_dot_product"


class AttentionFinder:
    """Tells attention from what works token by token.

    Fused attention goes by its name. Written out it is what reads or makes scores: a tensor with
    the dim of the sequence and another dim of the same length that no parameter has.
    """

    def __init__(self, analysis: FactorAnalysis) -> None:
        """The sequence is the second dim of the integer data inputs."""
        graph = analysis.graph
        self._values, self._dims = graph.values, analysis.value_dims
        self._tokens, self._sequence = 0, -1
        for item in graph.inputs_of(InputRole.DATA):
            spec = graph.values[item.value]
            if len(spec.shape) == 2 and spec.dtype in {"int64", "int32"}:
                self._tokens = spec.shape[1]
                self._sequence = analysis.value_dims[item.value][1][-1]
                break
        self._of_parameters = {
            leaf
            for item in graph.inputs_of(InputRole.PARAMETER)
            for leaves in analysis.value_dims[item.value]
            for leaf in leaves
        } - {self._sequence}

    def __call__(self, op: Op) -> bool:
        """Whether ``op`` is attention."""
        if _FUSED in op.target:
            return True
        return self._tokens > 1 and any(map(self._is_scores, (*op.inputs, *op.results)))

    def _is_scores(self, value: int) -> bool:
        shape = self._values[value].shape
        if shape.count(self._tokens) < 2:
            return False
        long = [
            leaves[-1]
            for size, leaves in zip(shape, self._dims[value], strict=True)
            if size == self._tokens and len(leaves) == 1
        ]
        other = [leaf for leaf in long if leaf not in self._of_parameters]
        return self._sequence in long and len(other) >= 2


def is_sliceable(analysis: FactorAnalysis, sequence: int | None) -> bool:
    """Whether tokens depend on earlier ones only, and through causal attention only.

    Then slices of a sequence can run one after the other (arXiv 2102.07988). ``sequence`` is the
    dimension class of tokens.
    """
    num_attention = 0
    for op in analysis.graph.ops:
        if op.phase != Phase.FORWARD:
            continue
        if _FUSED in op.target:
            # query, key, value, dropout_p, is_causal
            if len(op.args) < 5 or op.args[4] is not True:
                return False
            num_attention += 1
            continue
        dims = (leaves for value in op.inputs for leaves in analysis.value_dims[value])
        if any(sequence in leaves for leaves in dims) and all(
            factor.dimension_class != sequence or factor.fixed
            for factor in analysis.leaf_factors[op.index]
        ):
            return False
    return num_attention > 0
