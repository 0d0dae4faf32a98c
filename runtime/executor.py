"""One step of a stage: the instruction list, whatever runs the functions.

The same ``run_step`` drives one real rank (``rank.RankEngine``, where a value is a tensor), all
virtual ranks of a stage at once (``virtual.VirtualEngine``, where a value is one tensor for each
rank) and the dry run. It is a generator that yields whenever it must wait for another stage; a
real rank blocks instead and never yields.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from meshwright.errors import PlanRefused
from meshwright.plans.plan import ScheduleName
from meshwright.runtime.mesh import program_functions
from meshwright.spmd.program import SUMMED, StageProgram, TiedExchange, Transfer
from meshwright.spmd.schedule import (
    Backward,
    Forward,
    Receive,
    Reduce,
    Send,
    Step,
    instructions,
)

__all__ = ["Engine", "StageExecutor", "StepResult"]

V = TypeVar("V")


class Engine(Protocol[V]):
    """Runs functions and moves values for one stage; a ``V`` is what a program value is here."""

    program: StageProgram

    def call(self, function: str, arguments: list[V]) -> Sequence[V]:
        """Outputs of a function of the program, by field name; empties ``arguments``."""

    def held(self, value: int) -> V | None:
        """The parameter, buffer or constant with this number, or ``None``."""

    def cut(self, batch: V, dim: int, index: int, num_parts: int) -> V:
        """Run ``index`` of ``num_parts`` equal runs along ``dim``."""

    def add(self, total: V, addend: V) -> V:
        """The sum, in new memory."""

    def add_into(self, total: V, addend: V) -> None:
        """Add ``addend`` to ``total`` in place."""

    def concatenate(self, parts: Sequence[V], dim: int) -> V:
        """The parts side by side along ``dim``."""

    def send(self, transfer: Transfer, microbatch: int, value: V) -> None:
        """Start sending; must not block."""

    def expect(self, transfer: Transfer, microbatch: int) -> None:
        """A hint that ``receive`` will soon ask for this."""

    def is_ready(self, transfer: Transfer, microbatch: int) -> bool:
        """Whether ``receive`` may be called; a real rank says yes and blocks there."""

    def receive(self, transfer: Transfer, microbatch: int) -> V:
        """The value sent."""

    def send_tied(self, exchange: TiedExchange, value: V) -> None:
        """Start sending this stage's summed gradient to the other stages of ``exchange``."""

    def is_tied_ready(self, exchange: TiedExchange) -> bool:
        """Whether every other stage's sum may be received."""

    def total_tied(self, exchange: TiedExchange, value: V) -> V:
        """The sum over stages, added in stage order so that all of them get the same bits."""

    def optimize(self, gradients: Mapping[str, V]) -> Mapping[int, V]:
        """Step the optimizer; returns the values ``publish`` reads."""

    def set_published(self, name: str, value: V) -> None:
        """Take over a parameter's new ``local`` value."""

    def set_buffer(self, name: str, value: V) -> None:
        """Take over a buffer's new value."""

    def finish(self) -> None:
        """Wait for every send."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult(Generic[V]):
    """What a step of one stage gave."""

    loss: V | None
    """Summed over micro-batches, on the stage that has it."""
    outputs: Mapping[str, V]
    """Other results of the module, of all micro-batches together: concatenated along the batch
    dim, or summed, or that of the last where all are equal. Empty unless asked for."""
    gradients: Mapping[str, V]
    """By parameter, of the shape of ``optimized``; empty unless asked for."""


@dataclass(slots=True, kw_only=True)
class _Step(Generic[V]):
    """The mutable part of one step."""

    data: Mapping[str, V]
    keep_outputs: bool
    shared: dict[int, V] = field(default_factory=dict)
    """Values that every micro-batch reads."""
    by_microbatch: dict[int, dict[int, V]] = field(default_factory=dict)
    sums: list[V] = field(default_factory=list)
    num_summed: int = 0
    final: dict[int, V] = field(default_factory=dict)
    """Outputs of ``backward_final`` and ``finalize_tied``."""
    loss: V | None = None
    outputs: dict[str, list[V]] = field(default_factory=dict)
    gradients: Mapping[str, V] = field(default_factory=dict)


class StageExecutor(Generic[V]):
    """Runs steps of one stage on an engine."""

    def __init__(
        self,
        engine: Engine[V],
        *,
        schedule: ScheduleName,
        num_stages: int,
        num_microbatches: int,
    ) -> None:
        """Raises ``PlanRefused`` where the program does not fit the schedule."""
        program = engine.program
        self._engine = engine
        self._program = program
        self._num_microbatches = num_microbatches
        self._instructions = instructions(
            schedule,
            stage=program.stage,
            num_stages=num_stages,
            num_microbatches=num_microbatches,
            incoming=program.incoming,
            outgoing=program.outgoing,
            depth=program.depth,
        )
        if num_microbatches > 1 and len(program.accumulators) != len(program.running_sums):
            raise PlanRefused(
                f"stage {program.stage}: {len(program.accumulators)} accumulators but "
                f"{len(program.running_sums)} running sums; lower the plan for "
                f"{num_microbatches} micro-batches"
            )
        functions = program_functions(program)
        self._inputs = {name: function.inputs for name, function in functions.items()}
        self._outputs = {name: function.outputs for name, function in functions.items()}
        self._read_backward = {*program.backward.inputs, *program.backward_final.inputs}
        self._sent = {
            phase: [t for t in program.outgoing if t.source_phase == phase]
            for phase in ("forward", "backward")
        }

    def run_step(
        self,
        data: Mapping[str, V],
        *,
        update: bool = True,
        keep_gradients: bool = False,
        keep_outputs: bool = False,
    ) -> Generator[None, None, StepResult[V]]:
        """One step on this stage's batch (all micro-batches), by data name.

        Without ``update`` the optimizer does not step and parameters stay as they are.
        """
        step: _Step[V] = _Step(data=data, keep_outputs=keep_outputs)
        self._prologue(step)
        for position, item in enumerate(self._instructions):
            if isinstance(item, Receive):
                while not self._engine.is_ready(item.transfer, item.microbatch):
                    yield
                value = self._engine.receive(item.transfer, item.microbatch)
                self._microbatch(step, item.microbatch)[item.transfer.target_value] = value
            elif isinstance(item, Forward | Backward):
                self._expect_next(position)
                self._compute(step, item)
            elif isinstance(item, Reduce):
                yield from self._reduce(step)
                step.gradients = self._gradients(step)
            # A Send has nothing left to do: ``_compute`` sends what it made.
            elif isinstance(item, Step) and update:
                self._update(step, keep_gradients=keep_gradients)
        self._engine.finish()
        return StepResult(
            loss=step.loss,
            outputs=self._joined_outputs(step),
            gradients=step.gradients if keep_gradients else {},
        )

    def _expect_next(self, position: int) -> None:
        """Tell the engine what the next computation will receive while this one runs."""
        following = self._instructions[position + 1 :]
        for item in following:
            if isinstance(item, Receive):
                self._engine.expect(item.transfer, item.microbatch)
            elif not isinstance(item, Send):
                return

    def _prologue(self, step: _Step[V]) -> None:
        for slot in self._program.inputs:
            if slot.role != "data":
                continue
            if slot.name not in step.data:
                raise PlanRefused(f"input {slot.name} is missing; give every input of the model")
            step.shared[slot.batch_value] = step.data[slot.name]
        results = self._call("prologue", {}, step.shared)
        step.shared.update(zip(self._outputs["prologue"], results, strict=True))

    def _microbatch(self, step: _Step[V], microbatch: int) -> dict[int, V]:
        """Values of one micro-batch in flight; its data is cut on first use."""
        if microbatch not in step.by_microbatch:
            values: dict[int, V] = {}
            for slot in self._program.inputs:
                if slot.batch_dim is not None:
                    batch = step.shared.get(slot.batch_value, self._engine.held(slot.batch_value))
                    assert batch is not None, f"{slot.name} is not held"
                    values[slot.value] = self._engine.cut(
                        batch, slot.batch_dim, microbatch, self._num_microbatches
                    )
            step.by_microbatch[microbatch] = values
        return step.by_microbatch[microbatch]

    def _call(self, function: str, own: dict[int, V], shared: Mapping[int, V]) -> Sequence[V]:
        """Run ``function``; values in ``own`` that nobody reads later are given away."""
        arguments: list[V] = []
        for value in self._inputs[function]:
            if value in own:
                keep = function == "forward" and value in self._read_backward
                arguments.append(own[value] if keep else own.pop(value))
            elif value in shared:
                arguments.append(shared[value])
            else:
                held = self._engine.held(value)
                if held is None:
                    raise PlanRefused(
                        f"stage {self._program.stage}: {function} reads value {value}, which "
                        "nothing provides; this is a mistake of the lowering, please report it"
                    )
                arguments.append(held)
        return self._engine.call(function, arguments)

    def _compute(self, step: _Step[V], item: Forward | Backward) -> None:
        own = self._microbatch(step, item.microbatch)
        if isinstance(item, Forward):
            self._forward(step, own)
            phase = "forward"
        else:
            self._backward(step, own, item)
            phase = "backward"
        # Sends follow their computation at once, so that nothing is kept for them.
        for transfer in self._sent[phase]:
            self._engine.send(transfer, item.microbatch, own[transfer.source_value])
        if phase == "backward":
            del step.by_microbatch[item.microbatch]
            return
        for value in [value for value in own if value not in self._read_backward]:
            del own[value]

    def _forward(self, step: _Step[V], own: dict[int, V]) -> None:
        for slot in self._program.inputs:
            if slot.role == "buffer" and slot.value in self._read_backward:
                # The backward of this micro-batch reads the buffer as it was here.
                held = self._engine.held(slot.value)
                assert held is not None, f"buffer {slot.name} is not held"
                own[slot.value] = held
        results = self._call("forward", own, step.shared)
        own.update(zip(self._outputs["forward"], results, strict=True))
        for name, value in self._program.buffer_updates:
            self._engine.set_buffer(name, own[value])
        for name, value, _, _ in self._program.outputs if step.keep_outputs else ():
            step.outputs.setdefault(name, []).append(own[value])
        if self._program.loss is not None:
            loss = own[self._program.loss]
            step.loss = loss if step.loss is None else self._engine.add(step.loss, loss)

    def _backward(self, step: _Step[V], own: dict[int, V], item: Backward) -> None:
        if item.is_final:
            own.update(zip(self._program.running_sums, step.sums, strict=False))
            step.sums = []
            results = self._call("backward_final", own, step.shared)
            step.final = dict(zip(self._outputs["backward_final"], results, strict=True))
            own.update(step.final)
            return
        results = self._call("backward", own, step.shared)
        own.update(zip(self._outputs["backward"], results, strict=True))
        del results
        self._accumulate(step, [own[value] for value in self._program.accumulators])

    def _accumulate(self, step: _Step[V], addends: list[V]) -> None:
        """Add to the running sums, in place from the third micro-batch on."""
        # The first sum is new memory: an addend may share its own with another value, or with one
        # that is being sent.
        if step.num_summed == 0:
            step.sums = addends
        elif step.num_summed == 1:
            for position, addend in enumerate(addends):
                step.sums[position] = self._engine.add(step.sums[position], addend)
        else:
            for total, addend in zip(step.sums, addends, strict=True):
                self._engine.add_into(total, addend)
        step.num_summed += 1

    def _reduce(self, step: _Step[V]) -> Generator[None, None, None]:
        totals: dict[int, V] = {}
        for exchange in self._program.tied:
            self._engine.send_tied(exchange, step.final[exchange.accumulator])
        for exchange in self._program.tied:
            while not self._engine.is_tied_ready(exchange):
                yield
            own = step.final[exchange.accumulator]
            totals[exchange.total] = self._engine.total_tied(exchange, own)
        if not self._inputs["finalize_tied"] and not self._outputs["finalize_tied"]:
            return
        results = self._call("finalize_tied", {**step.final, **totals}, step.shared)
        step.final.update(zip(self._outputs["finalize_tied"], results, strict=True))

    def _gradients(self, step: _Step[V]) -> dict[str, V]:
        gradients = {}
        for slot in self._program.parameters:
            if slot.gradient is None:
                continue
            if slot.gradient not in step.final:
                raise PlanRefused(
                    f"stage {self._program.stage}: no function returns the gradient of {slot.name};"
                    " this is a mistake of the lowering, please report it"
                )
            gradients[slot.name] = step.final[slot.gradient]
        step.final = {}
        return gradients

    def _update(self, step: _Step[V], *, keep_gradients: bool) -> None:
        gradients = step.gradients
        if not keep_gradients:
            step.gradients = {}
        to_publish = dict(self._engine.optimize(gradients))
        del gradients
        if not self._outputs["publish"]:
            return
        results = self._call("publish", to_publish, {})
        published = dict(zip(self._outputs["publish"], results, strict=True))
        for name, value in self._program.published:
            self._engine.set_published(name, published[value])

    def _joined_outputs(self, step: _Step[V]) -> dict[str, V]:
        joined = {}
        for name, _, _, batch_dim in self._program.outputs if step.keep_outputs else ():
            parts = step.outputs[name]
            if batch_dim is None or len(parts) == 1:
                joined[name] = parts[-1]
            elif batch_dim == SUMMED:
                joined[name] = functools.reduce(self._engine.add, parts)
            else:
                joined[name] = self._engine.concatenate(parts, batch_dim)
        return joined
