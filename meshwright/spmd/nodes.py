"""The sharded graph as data: every operator's sharding and every redistribution of one plan."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from meshwright.graph.factors import FactorAnalysis
from meshwright.graph.segments import Segmentation
from meshwright.spmd.layout import Layout
from meshwright.spmd.redistribute import Step

__all__ = ["ConvertNode", "Node", "OpNode", "ShardedGraph", "ShardedPhase"]


class ShardedPhase(StrEnum):
    """Which function of a stage a node belongs to."""

    PROLOGUE = "prologue"
    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpNode:
    """One operator on local tensors."""

    op: int
    choice: tuple[tuple[str, int], ...]
    """``(axis, leaf factor)`` for every axis that shards the operator."""
    operands: tuple[int, ...]
    """Sharded values, in the order of ``Op.inputs``."""
    results: tuple[int | None, ...]
    segment: int
    """-1: depends on no parameter; every segment computes it for itself."""
    phase: ShardedPhase


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertNode:
    """One redistribution."""

    source: int
    result: int
    steps: tuple[Step, ...]
    segment: int
    phase: ShardedPhase


Node = OpNode | ConvertNode


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedGraph:
    """All nodes in execution order; values are numbered anew, one for each layout a value takes."""

    analysis: FactorAnalysis
    segmentation: Segmentation
    axis_sizes: dict[str, int]
    graph_value: tuple[int, ...]
    """For each sharded value the graph's value."""
    layouts: tuple[Layout, ...]
    nodes: tuple[Node, ...]
    producer: tuple[int, ...]
    """For each sharded value its node; -1 for inputs."""
    inputs: dict[int, int]
    """Graph input value to sharded value."""
    prologue_inputs: dict[int, int]
    """The same for inputs the prologue reads whole, over all micro-batches."""
    outputs: tuple[tuple[int, ...], ...]
    """For each graph output its sharded value, in the layout it leaves in; a gradient has one for
    each use of its parameter (the terms of its sum, so that stages can hold them apart)."""
    marks: tuple[tuple[int, int], ...] = ()
    """How many nodes and values there were before each input, each operator and each output of the
    graph, in this order, and at the end of them. Parameters that nothing uses come behind."""
