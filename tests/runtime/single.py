"""A captured graph as the program of one stage with one rank: no collective, no sharding."""

from __future__ import annotations

from meshwright.graph.opgraph import InputRole, OpGraph, OutputRole, Phase
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


def single_program(graph: OpGraph) -> StageProgram:
    """Forward and backward as captured; values keep their numbers."""
    forward = [op for op in graph.ops if op.phase is Phase.FORWARD]
    backward = [op for op in graph.ops if op.phase is Phase.BACKWARD]
    made = {value for op in forward for value in op.results}
    read_back = {value for op in backward for value in op.inputs}
    gradients = {item.name: item.value for item in graph.outputs_of(OutputRole.GRADIENT)}
    read_back |= set(gradients.values())
    saved = tuple(sorted(made & read_back))
    inputs = {item.value for item in graph.inputs}
    results = {
        role: tuple((item.name, item.value) for item in graph.outputs_of(role))
        for role in OutputRole
    }
    loss = results[OutputRole.LOSS][0][1]
    outputs = results[OutputRole.OUTPUT]
    updates = results[OutputRole.BUFFER_UPDATE]
    forward_out = dict.fromkeys(
        (*saved, loss, *(value for _, value in outputs), *(value for _, value in updates))
    )

    def body(ops: list) -> tuple[Compute, ...]:
        return tuple(
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

    def function(name: str, ops: list, out: tuple[int, ...]) -> Function:
        read = dict.fromkeys(value for op in ops for value in op.inputs) | dict.fromkeys(out)
        own = {value for op in ops for value in op.results}
        return Function(
            name=name,
            inputs=tuple(value for value in read if value not in own),
            outputs=out,
            body=body(ops),
        )

    def whole(value: int) -> ShardSpec:
        return ShardSpec(factors=((),) * len(graph.values[value].shape))

    back_out = tuple(dict.fromkeys(gradients.values()))
    nothing = Function(name="", inputs=(), outputs=(), body=())
    back = function("backward_final", backward, back_out)
    assert inputs or forward_out
    return StageProgram(
        stage=0,
        values=graph.values,
        parameters=tuple(
            ParameterSlot(
                name=item.name,
                full=graph.values[item.value],
                shard=whole(item.value),
                zero_stage=0,
                zero=None,
                local=item.value,
                stored=item.value,
                optimized=item.value,
                gradient=gradients.get(item.name),
                replicated_axes=(),
            )
            for item in graph.parameters
        ),
        inputs=tuple(
            DataSlot(
                name=item.name,
                role=str(item.role),
                full=graph.values[item.value],
                shard=whole(item.value),
                value=item.value,
                batch_value=item.value,
                batch_dim=None,
            )
            for item in graph.inputs
            if item.role is not InputRole.PARAMETER
        ),
        prologue=nothing,
        forward=function("forward", forward, tuple(forward_out)),
        backward=nothing,
        backward_final=back,
        finalize_tied=nothing,
        publish=nothing,
        published=(),
        accumulators=(),
        running_sums=(),
        saved=saved,
        prologue_values=(),
        incoming=(),
        outgoing=(),
        tied=(),
        loss=loss,
        outputs=tuple((name, value, whole(value), None) for name, value in outputs),
        buffer_updates=updates,
    )
