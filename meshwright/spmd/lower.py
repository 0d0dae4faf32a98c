"""From a sharded graph and a choice of stages to the local program of every stage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from meshwright.graph.opgraph import OutputRole, Ref
from meshwright.plans.plan import Recompute
from meshwright.spmd.crossing import StageMap, find_crossings
from meshwright.spmd.gradients import GradientSink, finish_total
from meshwright.spmd.layout import ALL_AXES, MICRO
from meshwright.spmd.parameters import ZERO_AXIS, finish_gather, launch_gather
from meshwright.spmd.program import (
    SUMMED,
    Collective,
    Compute,
    Function,
    Instruction,
    LocalArg,
    ParameterSlot,
    StageProgram,
    TiedExchange,
    Transfer,
)
from meshwright.spmd.schedule import depths
from meshwright.spmd.sharded import Node, ShardedGraph, ShardedPhase
from meshwright.spmd.stage import (
    FunctionWriter,
    SegmentChoices,
    StageContext,
    draws_random,
    keeps_by_selective,
)

__all__ = ["lower", "lower_stage"]


def lower(
    sharded: ShardedGraph,
    *,
    stage_of_segment: Sequence[int],
    choices: Sequence[SegmentChoices],
    bucket_bytes: int,
) -> tuple[StageProgram, ...]:
    """Programs of all stages.

    Args:
        sharded: the graph with every placement chosen.
        stage_of_segment: for each segment its stage, never decreasing.
        choices: for each segment its ZeRO stage and recompute.
        bucket_bytes: about how much gradient one collective reduces.

    Raises:
        PlanRefused: the plan needs something no program can carry.
    """
    stages = find_crossings(sharded, stage_of_segment)
    writers = [
        _StageWriter(StageContext(stage, sharded, stages, choices), bucket_bytes)
        for stage in range(stages.num_stages)
    ]
    for writer in writers:
        writer.write()
    return _connected(stages, writers)


def lower_stage(
    sharded: ShardedGraph,
    stage: int,
    *,
    stage_of_segment: Sequence[int],
    choices: Sequence[SegmentChoices],
    bucket_bytes: int,
) -> StageProgram:
    """The program of one stage alone; its transfers name no values of other stages (-1)."""
    stages = find_crossings(sharded, stage_of_segment)
    writer = _StageWriter(StageContext(stage, sharded, stages, choices), bucket_bytes)
    writer.write()
    return _connected(stages, [writer])[0]


class _StageWriter:
    """Writes the functions of one stage."""

    def __init__(self, context: StageContext, bucket_bytes: int) -> None:
        self.context = context
        self.sharded = context.sharded
        self.bucket_bytes = bucket_bytes
        self.saved: dict[int, None] = {}
        self.tied = frozenset(
            parameter.name
            for value, parameter in context.parameters.items()
            if len(context.stages.stages_of_parameter[value]) > 1
        )
        self.num_micro = self.sharded.axis_sizes[MICRO]
        self.prologue = FunctionWriter(context)
        self.forward = FunctionWriter(context, prologue=self.prologue)

    def write(self) -> None:
        for node in self._nodes(ShardedPhase.FORWARD):
            self.forward.write(node)
        self._write_results()
        self.gradients = self._gradient_terms()
        self.backward, self.middle = self._backward(final=False, running=None)
        running: list[int] | None = [] if self.num_micro > 1 else None
        self.backward_final, self.last = self._backward(final=True, running=running)
        self._rename_final()
        self._write_tied()
        self._write_publish()

    def _nodes(self, phase: ShardedPhase) -> list[Node]:
        stages = self.context.stages
        return [
            node
            for index, node in enumerate(self.sharded.nodes)
            if index in stages.needed
            and node.phase == phase
            and stages.stage_of(node) == self.context.stage
        ]

    # Forward -----------------------------------------------------------------------------------

    def _write_results(self) -> None:
        """Loss, outputs and buffer updates that this stage returns."""
        graph = self.sharded.analysis.graph
        specs = self.context.specs
        self.loss: int | None = None
        self.outputs: list[tuple[str, int, object, int | None]] = []
        self.buffer_updates: list[tuple[str, int]] = []
        for output, terms, stages in zip(
            graph.outputs, self.sharded.outputs, self.context.stages.output_stage, strict=True
        ):
            if output.role == OutputRole.GRADIENT or stages[0] != self.context.stage:
                continue
            local = self.forward.get(terms[0], -1)
            if output.role == OutputRole.LOSS:
                self.loss = local
            elif output.role == OutputRole.BUFFER_UPDATE:
                self.buffer_updates.append((output.name, local))
            else:
                cut = specs.shard_spec(terms[0])
                is_summed = any(axis == MICRO for axis, _ in self.sharded.layouts[terms[0]].partial)
                dim = SUMMED if is_summed else specs.micro_dim(terms[0])
                self.outputs.append((output.name, local, cut, dim))

    # Backward ----------------------------------------------------------------------------------

    def _gradient_terms(self) -> dict[int, list[int]]:
        """For each parameter the terms of its gradient that this stage makes."""
        graph = self.sharded.analysis.graph
        of_name = {parameter.name: value for value, parameter in self.context.parameters.items()}
        terms: dict[int, list[int]] = {}
        for output, values, stages in zip(
            graph.outputs, self.sharded.outputs, self.context.stages.output_stage, strict=True
        ):
            if output.role != OutputRole.GRADIENT:
                continue
            own = [v for v, s in zip(values, stages, strict=True) if s == self.context.stage]
            if own:
                terms[of_name[output.name]] = own
        return terms

    def _kept(self, value: int, segment: int) -> int | None:
        """The value the forward pass keeps for the backward pass, if it keeps this one."""
        context = self.context
        if value not in self.forward.local or context.is_from_parameters(value):
            return None
        node = self.sharded.nodes[self.sharded.producer[value]]
        policy = context.choices[segment].recompute if segment >= 0 else Recompute.NONE
        if node.segment == segment and policy != Recompute.NONE:
            kept = policy == Recompute.SELECTIVE and keeps_by_selective(self.sharded, node)
            if not kept and not draws_random(self.sharded, node):
                return None
        local = self.forward.local[value]
        self.saved.setdefault(local)
        return local

    def _backward(
        self, *, final: bool, running: list[int] | None
    ) -> tuple[FunctionWriter, GradientSink]:
        context = self.context
        writer = FunctionWriter(context, fallback=self._kept, prologue=self.prologue)
        sink = GradientSink(
            writer.body,
            context.specs,
            final=final,
            bucket_bytes=self.bucket_bytes,
            running_sums=running,
            tied=self.tied,
        )
        waiting: dict[int, list[int]] = defaultdict(list)
        missing: dict[int, int] = {}
        for parameter, terms in self.gradients.items():
            missing[parameter] = len(terms)
            for term in terms:
                waiting[term].append(parameter)
        for node in self._nodes(ShardedPhase.BACKWARD):
            writer.write(node)
            results = (node.result,) if not hasattr(node, "results") else node.results
            for value in results:
                for parameter in waiting.pop(value, ()) if value is not None else ():
                    missing[parameter] -= 1
                    if not missing[parameter]:
                        self._take(writer, sink, parameter)
        for parameter in [p for p, count in missing.items() if count]:
            self._take(writer, sink, parameter)
        sink.flush()
        return writer, sink

    def _take(self, writer: FunctionWriter, sink: GradientSink, parameter: int) -> None:
        terms = self.gradients[parameter]
        total = writer.get(terms[0], -1)
        partial = self._partial(parameter)
        for term in terms[1:]:
            assert self.sharded.layouts[term].partial == self.sharded.layouts[terms[0]].partial
            total = writer.body.add(total, writer.get(term, -1))
        sink.take(self.context.parameters[parameter], total, partial)

    def _partial(self, parameter: int) -> tuple[str, ...]:
        layout = self.sharded.layouts[self.gradients[parameter][0]]
        return tuple(axis for axis, _ in layout.partial)

    def _rename_final(self) -> None:
        """Give both backward functions the same numbers for what leaves the stage."""
        self.renamed = {
            self.backward_final.local[value]: self.backward.local[value]
            for value in self._leaving(ShardedPhase.BACKWARD)
        }

    def _leaving(self, phase: ShardedPhase) -> list[int]:
        return sorted(
            {
                crossing.value
                for crossing in self.context.stages.crossings
                if crossing.source_stage == self.context.stage and crossing.phase == phase
            }
        )

    # After the last micro-batch ----------------------------------------------------------------

    def _write_tied(self) -> None:
        self.finalize = FunctionWriter(self.context)
        self.tied_gradients: dict[str, int] = {}
        self.exchanges: list[TiedExchange] = []
        for value, parameter in self.context.parameters.items():
            if parameter.name not in self.last.totals:
                continue
            own = self.last.totals[parameter.name]
            total = self.finalize.use(self.context.values.new(parameter.spec))
            self.exchanges.append(
                TiedExchange(
                    name=parameter.name,
                    accumulator=own,
                    total=total,
                    stages=self.context.stages.stages_of_parameter[value],
                )
            )
            self.tied_gradients[parameter.name] = finish_total(
                self.finalize.body, self.context.specs, parameter, total, self._partial(value)
            )

    def _write_publish(self) -> None:
        """ZeRO 1 and 2: updated chunks become whole parameters, one gather for each segment."""
        self.publish = FunctionWriter(self.context)
        self.published: list[tuple[str, int]] = []
        groups: dict[int, list[int]] = defaultdict(list)
        for value, parameter in self.context.parameters.items():
            if parameter.zero_stage in {1, 2}:
                groups[self.context.stages.segments_of_parameter[value][0]].append(value)
        ways = self.sharded.axis_sizes[ZERO_AXIS]
        for segment in sorted(groups):
            members = [self.context.parameters[value] for value in groups[segment]]
            self.publish.body.segment = segment
            chunks = [self.publish.use(member.optimized) for member in members]
            pending = launch_gather(self.publish.body, members, chunks, ways=ways)
            for member, full in zip(
                members, finish_gather(self.publish.body, pending), strict=True
            ):
                self.published.append((member.name, full))

    # The program -------------------------------------------------------------------------------

    def program(
        self, incoming: tuple[Transfer, ...], outgoing: tuple[Transfer, ...]
    ) -> StageProgram:
        forward_out = [self.forward.local[v] for v in self._leaving(ShardedPhase.FORWARD)]
        backward_out = [self.backward.local[v] for v in self._leaving(ShardedPhase.BACKWARD)]
        results = [value for _, value, *_ in self.outputs]
        results += [value for _, value in self.buffer_updates]
        results += [] if self.loss is None else [self.loss]
        gradients = {**self.last.gradients, **self.tied_gradients}
        exchanged = [item.accumulator for item in self.exchanges]
        prologue_values = self._prologue_values()
        return StageProgram(
            stage=self.context.stage,
            values=tuple(self.context.values.specs),
            parameters=self._slots(gradients),
            inputs=tuple(self.context.data.values()),
            prologue=_function("prologue", self.prologue, prologue_values),
            forward=_function("forward", self.forward, [*forward_out, *self.saved, *results]),
            backward=_function(
                "backward", self.backward, [*backward_out, *self.middle.accumulators]
            ),
            backward_final=_function(
                "backward_final",
                self.backward_final,
                [*backward_out, *self.last.gradients.values(), *exchanged],
                renamed=self.renamed,
                extra_inputs=self.last.sums_read,
            ),
            finalize_tied=_function(
                "finalize_tied", self.finalize, list(self.tied_gradients.values())
            ),
            publish=_function("publish", self.publish, [value for _, value in self.published]),
            published=tuple(self.published),
            accumulators=tuple(self.middle.accumulators),
            running_sums=tuple(self.last.sums_read),
            saved=tuple(self.saved),
            prologue_values=tuple(prologue_values),
            incoming=incoming,
            outgoing=outgoing,
            tied=tuple(self.exchanges),
            loss=self.loss,
            outputs=tuple(self.outputs),  # type: ignore[arg-type]
            buffer_updates=tuple(self.buffer_updates),
            depth=depths(self.context.stages.stage_inputs)[self.context.stage],
            notes=tuple(
                f"{target} has no sharding rule and runs on whole tensors"
                for target in self.sharded.analysis.operators_without_rule
            ),
        )

    def _prologue_values(self) -> list[int]:
        """Values other functions took from the prologue."""
        made = {value for value in self.prologue.local.values()}
        taken: dict[int, None] = {}
        for writer in (self.forward, self.backward, self.backward_final):
            for value in writer.inputs:
                if value in made:
                    taken.setdefault(value)
        return list(taken)

    def _slots(self, gradients: dict[str, int]) -> tuple[ParameterSlot, ...]:
        slots = []
        for value, parameter in self.context.parameters.items():
            used = set(self.sharded.layouts[value].sharding_axes)
            if parameter.zero is not None:
                used.add(ZERO_AXIS)
            equal = tuple(
                axis
                for axis in ALL_AXES
                if axis != MICRO and self.sharded.axis_sizes[axis] > 1 and axis not in used
            )
            slots.append(parameter.slot(gradients.get(parameter.name), equal))
        return tuple(slots)


def _connected(stages: StageMap, writers: Sequence[_StageWriter]) -> tuple[StageProgram, ...]:
    by_stage = {writer.context.stage: writer for writer in writers}
    transfers = []
    for tag, crossing in enumerate(stages.crossings):
        source, target = by_stage.get(crossing.source_stage), by_stage.get(crossing.target_stage)
        side = source or target
        if side is None:
            continue
        source_value = -1
        if source is not None:
            made = source.forward if crossing.phase == ShardedPhase.FORWARD else source.backward
            source_value = made.local[crossing.value]
        transfers.append(
            Transfer(
                source_stage=crossing.source_stage,
                target_stage=crossing.target_stage,
                source_value=source_value,
                target_value=-1 if target is None else target.context.received[crossing.value],
                source_phase=crossing.phase.value,
                target_phase=crossing.phase.value,
                num_bytes=side.context.specs.spec(crossing.value).num_bytes,
                tag=tag,
            )
        )
    return tuple(
        writer.program(
            incoming=tuple(t for t in transfers if t.target_stage == writer.context.stage),
            outgoing=tuple(t for t in transfers if t.source_stage == writer.context.stage),
        )
        for writer in writers
    )


def _function(
    name: str,
    writer: FunctionWriter,
    outputs: Sequence[int],
    *,
    renamed: dict[int, int] | None = None,
    extra_inputs: Sequence[int] = (),
) -> Function:
    body = _live(writer.instructions(), {*outputs, *(renamed or {})})
    if renamed:
        body = tuple(_rename(item, renamed) for item in body)
    read = {value for item in body for value in _reads(item)} | set(outputs)
    inputs = [value for value in (*writer.inputs, *extra_inputs) if value in read]
    return Function(
        name=name, inputs=tuple(inputs), outputs=tuple(dict.fromkeys(outputs)), body=body
    )


def _live(body: tuple[Instruction, ...], wanted: set[int]) -> tuple[Instruction, ...]:
    """Instructions the outputs depend on."""
    needed = set(wanted)
    kept: list[Instruction] = []
    for item in reversed(body):
        results = (item.output,) if isinstance(item, Collective) else item.outputs
        if needed.intersection(value for value in results if value is not None):
            needed.update(_reads(item))
            kept.append(item)
    return tuple(reversed(kept))


def _reads(item: Instruction) -> tuple[int, ...]:
    if isinstance(item, Collective):
        return (item.input,)
    found: list[int] = []
    waiting: list[LocalArg] = [item.args, *(arg for _, arg in item.kwargs)]
    while waiting:
        arg = waiting.pop()
        if isinstance(arg, Ref):
            found.append(arg.value)
        elif isinstance(arg, tuple):
            waiting += arg
    return tuple(found)


def _rename(item: Instruction, names: dict[int, int]) -> Instruction:
    def new(value: int | None) -> int | None:
        return value if value is None else names.get(value, value)

    def arg_of(arg: LocalArg) -> LocalArg:
        if isinstance(arg, Ref):
            return Ref(names.get(arg.value, arg.value))
        return tuple(arg_of(part) for part in arg) if isinstance(arg, tuple) else arg

    if isinstance(item, Collective):
        return Collective(
            kind=item.kind,
            axes=item.axes,
            reduction=item.reduction,
            input=names.get(item.input, item.input),
            output=names.get(item.output, item.output),
            num_bytes=item.num_bytes,
            segment=item.segment,
            cause=item.cause,
        )
    return Compute(
        target=item.target,
        args=tuple(arg_of(arg) for arg in item.args),
        kwargs=tuple((name, arg_of(arg)) for name, arg in item.kwargs),
        outputs=tuple(new(value) for value in item.outputs),
        op_index=item.op_index,
        segment=item.segment,
        flop=item.flop,
    )
