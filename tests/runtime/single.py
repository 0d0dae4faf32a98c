"""A captured graph as the program of one stage with one rank: no collective, no sharding."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.graph.opgraph import GraphInput, InputRole, Op, OpGraph, OutputRole, Phase
from meshwright.runtime.mesh import Layout
from meshwright.spmd.program import (
    Compute,
    DataSlot,
    Function,
    ParameterSlot,
    ShardSpec,
    StageProgram,
)

LAYOUT = Layout(stage_shape=(1, 1, 1, 1, 1), first_devices=(0,))
_NOTHING = Function(name="", inputs=(), outputs=(), body=())


def single_program(graph: OpGraph) -> StageProgram:
    """Forward and backward as captured; values keep their numbers."""
    forward = [op for op in graph.ops if op.phase is Phase.FORWARD]
    backward = [op for op in graph.ops if op.phase is Phase.BACKWARD]
    gradients = {item.name: item.value for item in graph.outputs_of(OutputRole.GRADIENT)}
    made = {value for op in forward for value in op.results}
    read_back = {value for op in backward for value in op.inputs} | set(gradients.values())
    saved = tuple(sorted(made & read_back))
    loss = graph.outputs_of(OutputRole.LOSS)[0].value
    outputs = graph.outputs_of(OutputRole.OUTPUT)
    updates = graph.outputs_of(OutputRole.BUFFER_UPDATE)
    kept = dict.fromkeys((*saved, loss, *(item.value for item in (*outputs, *updates))))
    return StageProgram(
        stage=0,
        values=graph.values,
        parameters=tuple(
            _parameter(graph, item, gradients.get(item.name)) for item in graph.parameters
        ),
        inputs=tuple(
            _data(graph, item) for item in graph.inputs if item.role is not InputRole.PARAMETER
        ),
        prologue=_NOTHING,
        forward=_function("forward", forward, tuple(kept)),
        backward=_NOTHING,
        backward_final=_function(
            "backward_final", backward, tuple(dict.fromkeys(gradients.values()))
        ),
        finalize_tied=_NOTHING,
        publish=_NOTHING,
        published=(),
        accumulators=(),
        running_sums=(),
        saved=saved,
        prologue_values=(),
        incoming=(),
        outgoing=(),
        tied=(),
        loss=loss,
        outputs=tuple((item.name, item.value, _whole(graph, item.value), None) for item in outputs),
        buffer_updates=tuple((item.name, item.value) for item in updates),
    )


def _function(name: str, ops: Sequence[Op], outputs: tuple[int, ...]) -> Function:
    """``ops`` as they are, reading what they do not make."""
    read = dict.fromkeys(value for op in ops for value in op.inputs) | dict.fromkeys(outputs)
    own = {value for op in ops for value in op.results}
    body = tuple(
        Compute(
            target=op.target,
            args=op.args,
            kwargs=op.kwargs,
            outputs=op.outputs,
            op_index=op.index,
            flop=op.flop,
        )
        for op in ops
    )
    inputs = tuple(value for value in read if value not in own)
    return Function(name=name, inputs=inputs, outputs=outputs, body=body)


def _whole(graph: OpGraph, value: int) -> ShardSpec:
    return ShardSpec(factors=((),) * len(graph.values[value].shape))


def _parameter(graph: OpGraph, item: GraphInput, gradient: int | None) -> ParameterSlot:
    return ParameterSlot(
        name=item.name,
        full=graph.values[item.value],
        shard=_whole(graph, item.value),
        zero_stage=0,
        zero=None,
        local=item.value,
        stored=item.value,
        optimized=item.value,
        gradient=gradient,
        replicated_axes=(),
    )


def _data(graph: OpGraph, item: GraphInput) -> DataSlot:
    return DataSlot(
        name=item.name,
        role=str(item.role),
        full=graph.values[item.value],
        shard=_whole(graph, item.value),
        value=item.value,
        batch_value=item.value,
        batch_dim=None,
    )
