"""Rewrites that make a captured graph easier to shard, without changing what it computes."""

from __future__ import annotations

from dataclasses import replace

from meshwright.graph.opgraph import Literal, Op, OpGraph

__all__ = ["with_explicit_factories"]

_FILL = {"zeros_like": 0, "ones_like": 1, "empty_like": 0, "new_zeros": 0, "new_ones": 1}


def with_explicit_factories(graph: OpGraph) -> OpGraph:
    """``ones_like(x)`` and its kin become ``full(shape, value)``, which reads no tensor.

    So a gradient's seed does not make the loss whole, and a zero tensor does not depend on how the
    tensor it imitates is cut.
    """
    return replace(graph, ops=tuple(_explicit(op, graph) for op in graph.ops))


def _explicit(op: Op, graph: OpGraph) -> Op:
    name = op.target.split(".")[1]
    if name in _FILL:
        fill: int | float | bool = _FILL[name]
    elif name in {"full_like", "new_full"}:
        given = op.args[1 if name == "full_like" else 2]
        if not isinstance(given, int | float | bool):
            return op
        fill = given
    else:
        return op
    (result,) = op.results
    spec = graph.values[result]
    return replace(
        op,
        target="aten.full.default",
        args=(spec.shape, fill),
        kwargs=(
            ("dtype", Literal("dtype", spec.dtype)),
            *((key, arg) for key, arg in op.kwargs if key == "device"),
        ),
        bytes_read=0,
    )
