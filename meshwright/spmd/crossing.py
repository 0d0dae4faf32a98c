"""What every stage needs from the others, found before any stage is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from meshwright.errors import PlanRefused
from meshwright.graph.opgraph import OutputRole
from meshwright.spmd.sharded import ConvertNode, Node, OpNode, ShardedGraph, ShardedPhase

__all__ = ["Crossing", "StageMap", "find_crossings", "operands_of"]


def operands_of(node: Node) -> tuple[int, ...]:
    """Sharded values a node reads."""
    return (node.source,) if isinstance(node, ConvertNode) else node.operands


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A sharded value that one stage makes and another reads."""

    value: int
    source_stage: int
    target_stage: int
    phase: ShardedPhase


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMap:
    """Which stage runs which node, and what passes between stages."""

    stage_of_segment: tuple[int, ...]
    needed: frozenset[int]
    """Nodes the outputs depend on."""
    crossings: tuple[Crossing, ...]
    output_stage: tuple[tuple[int, ...], ...]
    """For each graph output and each of its terms the stage that returns it."""
    stages_of_parameter: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Sharded value of a parameter to the stages that use it."""
    segments_of_parameter: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Likewise the segments whose forward operators use it, in order."""

    @property
    def num_stages(self) -> int:
        """Stages of the plan."""
        return max(self.stage_of_segment) + 1

    @property
    def stage_inputs(self) -> tuple[tuple[int, ...], ...]:
        """For each stage the earlier ones that it shares a value with."""
        inputs: list[set[int]] = [set() for _ in range(self.num_stages)]
        for crossing in self.crossings:
            low, high = sorted((crossing.source_stage, crossing.target_stage))
            inputs[high].add(low)
        return tuple(tuple(sorted(found)) for found in inputs)

    def stage_of(self, node: Node) -> int | None:
        """The stage of a node; ``None`` for one that any stage computes for itself."""
        return None if node.segment < 0 else self.stage_of_segment[node.segment]


def find_crossings(sharded: ShardedGraph, stage_of_segment: Sequence[int]) -> StageMap:
    """Needed nodes, and every value that passes from one stage to another.

    Raises:
        PlanRefused: a forward value is needed by an earlier stage.
    """
    stages = tuple(stage_of_segment)
    needed = _needed(sharded)
    last = max(stages)

    def stage_of_value(value: int) -> int | None:
        index = sharded.producer[value]
        if index < 0 or sharded.nodes[index].segment < 0:
            return None
        return stages[sharded.nodes[index].segment]

    crossings: dict[tuple[int, int], Crossing] = {}
    users: dict[int, set[int]] = defaultdict(set)
    segments: dict[int, set[int]] = defaultdict(set)
    graph = sharded.analysis.graph
    parameters = {sharded.inputs[item.value] for item in graph.parameters}
    for index, node in enumerate(sharded.nodes):
        if index not in needed or node.segment < 0:
            continue
        here = stages[node.segment]
        for value in operands_of(node):
            if value in parameters:
                users[value].add(here)
                if node.phase == ShardedPhase.FORWARD:
                    segments[value].add(node.segment)
                continue
            there = stage_of_value(value)
            if there is None or there == here:
                continue
            phase = sharded.nodes[sharded.producer[value]].phase
            if (phase == ShardedPhase.FORWARD) != (there < here):
                raise PlanRefused(_order_message(sharded, node, there, here))
            crossings[value, here] = Crossing(
                value=value, source_stage=there, target_stage=here, phase=phase
            )
    for value in parameters:
        if not users[value]:
            users[value].add(last)
    output_stage = tuple(
        tuple(last if (s := stage_of_value(term)) is None else s for term in terms)
        for terms in sharded.outputs
    )
    return StageMap(
        stage_of_segment=stages,
        needed=frozenset(needed),
        crossings=tuple(sorted(crossings.values(), key=lambda c: (c.value, c.target_stage))),
        output_stage=output_stage,
        stages_of_parameter={value: tuple(sorted(stages)) for value, stages in users.items()},
        segments_of_parameter={value: tuple(sorted(found)) for value, found in segments.items()},
    )


def _needed(sharded: ShardedGraph) -> set[int]:
    waiting = [
        sharded.producer[term]
        for output, terms in zip(sharded.analysis.graph.outputs, sharded.outputs, strict=True)
        for term in terms
        if output.role in set(OutputRole)
    ]
    needed: set[int] = set()
    while waiting:
        index = waiting.pop()
        if index < 0 or index in needed:
            continue
        needed.add(index)
        waiting += [sharded.producer[value] for value in operands_of(sharded.nodes[index])]
    return needed


def _order_message(sharded: ShardedGraph, node: Node, there: int, here: int) -> str:
    name = "a redistribution"
    if isinstance(node, OpNode):
        op = sharded.analysis.graph.ops[node.op]
        name = f"operator {op.target} in {op.module_path or 'the model'}"
    return (
        f"{name} on stage {here} needs a value that only stage {there} makes; "
        "put the segments between them on one stage"
    )
