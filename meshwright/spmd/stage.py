"""Writing the functions of one stage.

A function is written on demand: asking for the local value of a sharded value writes whatever makes
it, or names it an input. The forward function keeps what the backward function asks for; with
recompute the backward function writes forward nodes again instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshwright.errors import PlanRefused
from meshwright.graph.opgraph import GraphInput, InputRole, contiguous_stride
from meshwright.plans.plan import Recompute
from meshwright.spmd.body import Body, ValueTable
from meshwright.spmd.crossing import StageMap, operands_of
from meshwright.spmd.emit import Emitter
from meshwright.spmd.layout import MICRO
from meshwright.spmd.parameters import (
    ZERO_AXIS,
    LocalParameter,
    cuts_like_zero,
    finish_gather,
    launch_gather,
    new_parameter,
    zero_refusal,
)
from meshwright.spmd.program import DataSlot, Instruction
from meshwright.spmd.redistribute import StepKind
from meshwright.spmd.sharded import ConvertNode, Node, OpNode, ShardedGraph, ShardedPhase
from meshwright.spmd.specs import LocalSpecs

__all__ = ["KEPT_BY_SELECTIVE", "FunctionWriter", "SegmentChoices", "StageContext"]

KEPT_BY_SELECTIVE = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "mv", "convolution", "embedding"}
    | {"_scaled_dot_product_flash_attention_for_cpu"}
)
"""Operators whose results selective recompute keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentChoices:
    """What the plan says of one segment, apart from sharding."""

    zero_stage: int
    recompute: Recompute
    offload: bool = False


class StageContext:
    """What the functions of one stage share: numbered values, parameters, data, saved values."""

    def __init__(
        self,
        stage: int,
        sharded: ShardedGraph,
        stages: StageMap,
        choices: Sequence[SegmentChoices],
    ) -> None:
        self.stage = stage
        self.sharded = sharded
        self.stages = stages
        self.choices = choices
        self.specs = LocalSpecs(sharded)
        self.emitter = Emitter(sharded, self.specs)
        self.values = ValueTable()
        graph = sharded.analysis.graph
        self.input_of: dict[int, GraphInput] = {
            sharded.inputs[item.value]: item
            for item in graph.inputs
            if item.value in sharded.inputs
        }
        by_value = {item.value: item for item in graph.inputs}
        self.whole_input_of = {
            value: by_value[graph_value] for graph_value, value in sharded.prologue_inputs.items()
        }
        self.data: dict[str, DataSlot] = {}
        self.parameters: dict[int, LocalParameter] = {}
        for value, users in stages.stages_of_parameter.items():
            if stage in users:
                self.parameters[value] = self._parameter(value)
        self.received = {
            crossing.value: self.values.new(self.specs.spec(crossing.value))
            for crossing in stages.crossings
            if crossing.target_stage == stage
        }

    def _parameter(self, value: int) -> LocalParameter:
        segments = self.stages.segments_of_parameter.get(value, ())
        choice = self.choices[segments[0]] if segments else None
        is_cut = cuts_like_zero(self.sharded.layouts[value])
        if choice is not None and choice.zero_stage and is_cut:
            name = self.input_of[value].name
            raise PlanRefused(zero_refusal(name, zero_stage=choice.zero_stage, segment=segments[0]))
        return new_parameter(
            self.values,
            name=self.input_of[value].name,
            full=self.specs.full(value),
            shard=self.specs.shard_spec(value),
            spec=self.specs.spec(value),
            zero_stage=0 if choice is None else choice.zero_stage,
            offload=choice is not None and choice.offload,
            zero_ways=self.sharded.axis_sizes[ZERO_AXIS],
        )

    def gathered_with(self, segment: int) -> list[int]:
        """ZeRO-3 parameters of a segment, gathered together."""
        return [
            value
            for value, parameter in self.parameters.items()
            if parameter.zero_stage == 3
            and segment in self.stages.segments_of_parameter.get(value, ())
        ]

    def data_slot(self, item: GraphInput) -> DataSlot:
        """The slot of a buffer, constant or data input."""
        if item.name not in self.data:
            sharded_value = self.sharded.inputs[item.value]
            spec = self.specs.spec(sharded_value)
            batch_dim = self.specs.micro_dim(sharded_value)
            value = batch_value = self.values.new(spec)
            if batch_dim is not None:
                whole = self.sharded.layouts[sharded_value].without(MICRO)
                shape = self.specs.shape(sharded_value, whole)
                batch_value = self.values.new(
                    type(spec)(shape=shape, dtype=spec.dtype, stride=contiguous_stride(shape))
                )
            self.data[item.name] = DataSlot(
                name=item.name,
                role=item.role.value,
                full=self.specs.full(sharded_value),
                shard=self.specs.shard_spec(sharded_value),
                value=value,
                batch_value=batch_value,
                batch_dim=batch_dim,
            )
        return self.data[item.name]

    def is_from_parameters(self, value: int) -> bool:
        """Whether a value only looks at, or redistributes, parameters."""
        while value not in self.parameters:
            index = self.sharded.producer[value]
            if index < 0:
                return False
            node = self.sharded.nodes[index]
            if isinstance(node, OpNode) and not (
                self.sharded.analysis.rules[node.op].is_view and len(node.operands) == 1
            ):
                return False
            value = operands_of(node)[0]
        return True


class FunctionWriter:
    """One function of a stage under construction."""

    def __init__(
        self,
        context: StageContext,
        *,
        fallback: Callable[[int, int], int | None] | None = None,
        prologue: FunctionWriter | None = None,
    ) -> None:
        """Start a function.

        Args:
            context: the stage's shared state.
            fallback: asked for a value made by a forward node before that node is written here;
                gives the kept local value, or ``None`` to write it here.
            prologue: where values that belong to the prologue are made; ``None`` for itself.
        """
        self.context = context
        self.body = Body(context.values)
        self.local: dict[int, int] = {}
        self.inputs: dict[int, None] = {}
        self._fallback = fallback
        self._prologue = prologue
        self._gathered: dict[tuple[int, int], int] = {}
        self._launches: list[tuple[int, int]] = []

    def use(self, local_value: int) -> int:
        """Name a program value as an input of this function."""
        self.inputs.setdefault(local_value)
        return local_value

    def get(self, value: int, segment: int) -> int:
        """The local value of a sharded value, for a node of ``segment``."""
        context = self.context
        if value in context.parameters:
            return self._parameter(value, segment)
        if value in self.local:
            return self.local[value]
        if value in context.whole_input_of:
            return self.use(context.data_slot(context.whole_input_of[value]).batch_value)
        if value in context.input_of:
            item = context.input_of[value]
            assert item.role != InputRole.PARAMETER, f"{item.name} is not on this stage"
            return self.use(context.data_slot(item).value)
        node = context.sharded.nodes[context.sharded.producer[value]]
        if node.phase == ShardedPhase.PROLOGUE and self._prologue is not None:
            self.local[value] = self.use(self._prologue.get(value, -1))
        elif value in context.received and node.phase == ShardedPhase.BACKWARD:
            self.local[value] = self.use(context.received[value])
        else:
            kept = None if self._fallback is None else self._fallback(value, segment)
            if kept is not None:
                self.local[value] = self.use(kept)
            elif value in context.received:
                self.local[value] = self.use(context.received[value])
            else:
                self.write(node)
        return self.local[value]

    def write(self, node: Node) -> None:
        """Write one node, and first what it needs."""
        operands = tuple(self.get(value, node.segment) for value in operands_of(node))
        if isinstance(node, ConvertNode):
            self.local[node.result] = self.context.emitter.convert(self.body, node, operands[0])
            return
        outputs = self.context.emitter.op(self.body, node, operands)
        for value, output in zip(node.results, outputs, strict=True):
            if value is not None and output is not None:
                self.local[value] = output

    def _parameter(self, value: int, segment: int) -> int:
        parameter = self.context.parameters[value]
        if parameter.zero_stage < 3:
            return self.use(parameter.local)
        if (value, segment) not in self._gathered:
            together = self.context.gathered_with(segment)
            if value not in together:
                together = [value]
            members = [self.context.parameters[item] for item in together]
            self.body.segment = segment
            start = len(self.body.instructions)
            pending = launch_gather(
                self.body,
                members,
                [self.use(member.stored) for member in members],
                ways=self.context.sharded.axis_sizes[ZERO_AXIS],
            )
            self._launches.append((start, len(self.body.instructions)))
            for item, full in zip(together, finish_gather(self.body, pending), strict=True):
                self._gathered[item, segment] = full
        return self._gathered[value, segment]

    def instructions(self) -> tuple[Instruction, ...]:
        """The body, with every parameter gather started one gather early."""
        launches = {start: stop for start, stop in self._launches}
        order = [start for start, _ in self._launches]
        following = dict(itertools.pairwise(order))
        result: list[Instruction] = []
        position = 0
        while position < len(self.body.instructions):
            if position not in launches:
                result.append(self.body.instructions[position])
                position += 1
                continue
            if position == order[0]:
                result += self.body.instructions[position : launches[position]]
            if position in following:
                early = following[position]
                result += self.body.instructions[early : launches[early]]
            position = launches[position]
        return tuple(result)


def keeps_by_selective(sharded: ShardedGraph, node: Node) -> bool:
    """Whether selective recompute keeps what a node makes."""
    if isinstance(node, ConvertNode):
        return any(step.kind not in {StepKind.SLICE, StepKind.MASK} for step in node.steps)
    op = sharded.analysis.graph.ops[node.op]
    return op.target.split(".")[1] in KEPT_BY_SELECTIVE


def draws_random(sharded: ShardedGraph, node: Node) -> bool:
    """Whether a node draws random numbers; its results are kept, for it would draw others."""
    return isinstance(node, OpNode) and sharded.analysis.rules[node.op].random
