"""All ranks of a plan in this process, in lockstep, with real numerics and no process group.

A program value is here a list with one tensor for each rank of the stage. Functions are
interpreted instruction by instruction on every rank, collectives are computed directly, and
stages take turns as the schedule allows. After every instruction each rank's tensor is compared
with the shape and element type the program states.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from meshwright.errors import PlanRefused
from meshwright.graph.opgraph import Ref
from meshwright.plans.plan import OptimizerSpec, ScheduleName
from meshwright.runtime import adapter
from meshwright.runtime.checks import check_program
from meshwright.runtime.compile import concrete, returns_one_tensor
from meshwright.runtime.executor import StageExecutor, StepResult
from meshwright.runtime.kernels import resolve_target
from meshwright.runtime.mesh import Layout, program_functions
from meshwright.runtime.rank import sum_in_stage_order
from meshwright.runtime.state import (
    RankState,
    TensorSource,
    assemble,
    assemble_parameter,
    slice_data,
)
from meshwright.spmd.program import (
    Collective,
    CollectiveKind,
    Compute,
    Function,
    LocalArg,
    StageProgram,
    TiedExchange,
    Transfer,
)

__all__ = ["VirtualCluster", "VirtualEngine"]

Ranks = list[Tensor]
"""One tensor for each rank of a stage, in rank order."""


@dataclass(slots=True)
class _Mail:
    """What stages have sent one another."""

    transfers: dict[tuple[int, int], Ranks] = field(default_factory=dict)
    """By tag and micro-batch."""
    tied: dict[tuple[str, int], Ranks] = field(default_factory=dict)
    """By parameter and stage."""


class VirtualEngine:
    """Runs all ranks of one stage; a value is one tensor for each rank. See ``executor.Engine``."""

    def __init__(
        self,
        program: StageProgram,
        layout: Layout,
        source: TensorSource,
        mail: _Mail,
        *,
        optimizer: OptimizerSpec,
        device: torch.device,
    ) -> None:
        check_program(program)
        self.program = program
        self._coordinates = layout.coordinates
        self._mail = mail
        self._device = device
        self._functions = program_functions(program)
        self.states = [
            RankState(program, coordinate, source, optimizer=optimizer, device=device)
            for coordinate in self._coordinates
        ]

    def call(self, function: str, arguments: list[Ranks]) -> Sequence[Ranks]:
        """Interpret a function on every rank."""
        body = self._functions[function]
        values = dict(zip(body.inputs, arguments, strict=True))
        arguments.clear()
        for value, ranks in values.items():
            self._check(body, value, ranks, "input")
        last_use = _last_uses(body)
        with adapter.below_autograd():
            for position, item in enumerate(body.body):
                self._execute(body, item, values)
                for value in last_use.get(position, ()):
                    del values[value]
        return [values[value] for value in body.outputs]

    def _execute(
        self, function: Function, item: Compute | Collective, values: dict[int, Ranks]
    ) -> None:
        if isinstance(item, Collective):
            values[item.output] = self._collective(item, values[item.input])
            self._check(function, item.output, values[item.output], item.kind)
            return
        op = resolve_target(item.target)
        is_single = returns_one_tensor(item.target, op)
        results = []
        for rank, coordinate in enumerate(self._coordinates):

            def read(arg: LocalArg, rank: int = rank, coordinate: Any = coordinate) -> Any:
                if isinstance(arg, Ref):
                    return values[arg.value][rank]
                if isinstance(arg, tuple):
                    return tuple(read(part) for part in arg)
                return concrete(arg, coordinate, self._device)

            try:
                result = op(
                    *(read(arg) for arg in item.args),
                    **{name: read(arg) for name, arg in item.kwargs},
                )
            except (RuntimeError, IndexError, TypeError, NotImplementedError) as error:
                reason = str(error).splitlines()[0]
                raise PlanRefused(
                    f"stage {self.program.stage}, {function.name}, {item.target} of operator "
                    f"{item.op_index} on rank {rank}: {reason}; the runtime cannot carry this plan"
                ) from error
            results.append((result,) if is_single else result)
        for position, value in enumerate(item.outputs):
            if value is not None:
                values[value] = [result[position] for result in results]
                self._check(function, value, values[value], item.target)

    def _check(self, function: Function, value: int, ranks: Ranks, what: str) -> None:
        spec = self.program.values[value]
        for rank, tensor in enumerate(ranks):
            dtype = str(tensor.dtype).removeprefix("torch.")
            if tuple(tensor.shape) != spec.shape or dtype != spec.dtype:
                raise PlanRefused(
                    f"stage {self.program.stage}, {function.name}, {what}: value {value} on rank "
                    f"{rank} is {dtype}{list(tensor.shape)} but the program says "
                    f"{spec.dtype}{list(spec.shape)}; this is a mistake of the lowering, please "
                    "report it"
                )

    def _collective(self, item: Collective, operand: Ranks) -> Ranks:
        results: list[Tensor | None] = [None] * len(operand)
        for coordinate in self._coordinates:
            if coordinate.position(item.axes) != 0:
                continue
            members = [peer.flat for peer in coordinate.peers(item.axes)]
            parts = _combine(item, [operand[member] for member in members])
            for member, part in zip(members, parts, strict=True):
                results[member] = part
        return [result for result in results if result is not None]

    def held(self, value: int) -> Ranks | None:
        """The parameter, buffer or constant with this number, or ``None``."""
        if value not in self.states[0].held:
            return None
        return [state.held[value] for state in self.states]

    def cut(self, batch: Ranks, dim: int, index: int, num_parts: int) -> Ranks:
        """Run ``index`` of ``num_parts`` equal runs along ``dim``."""
        rows = batch[0].shape[dim] // num_parts
        return [tensor.narrow(dim, index * rows, rows) for tensor in batch]

    def add(self, total: Ranks, addend: Ranks) -> Ranks:
        """The sum, in new memory."""
        return [left + right for left, right in zip(total, addend, strict=True)]

    def add_into(self, total: Ranks, addend: Ranks) -> None:
        """Add in place."""
        for left, right in zip(total, addend, strict=True):
            left.add_(right)

    def concatenate(self, parts: Sequence[Ranks], dim: int) -> Ranks:
        """The parts side by side along ``dim``."""
        return [torch.cat(pieces, dim=dim) for pieces in zip(*parts, strict=True)]

    def send(self, transfer: Transfer, microbatch: int, value: Ranks) -> None:
        """Leave the value for its stage."""
        self._mail.transfers[transfer.tag, microbatch] = value

    def expect(self, transfer: Transfer, microbatch: int) -> None:
        """Nothing to prepare."""

    def is_ready(self, transfer: Transfer, microbatch: int) -> bool:
        """Whether the value was sent."""
        return (transfer.tag, microbatch) in self._mail.transfers

    def receive(self, transfer: Transfer, microbatch: int) -> Ranks:
        """The value sent; memory of its own, as across processes."""
        sent = self._mail.transfers.pop((transfer.tag, microbatch))
        return [tensor.clone(memory_format=torch.contiguous_format) for tensor in sent]

    def send_tied(self, exchange: TiedExchange, value: Ranks) -> None:
        """Leave the sum for the other stages."""
        self._mail.tied[exchange.name, self.program.stage] = value

    def is_tied_ready(self, exchange: TiedExchange) -> bool:
        """Whether every stage left its sum."""
        return all((exchange.name, stage) in self._mail.tied for stage in exchange.stages)

    def total_tied(self, exchange: TiedExchange, value: Ranks) -> Ranks:
        """The sum over stages, in stage order."""
        sums = {stage: self._mail.tied[exchange.name, stage] for stage in exchange.stages}
        return [
            sum_in_stage_order({stage: ranks[rank] for stage, ranks in sums.items()})
            for rank in range(len(value))
        ]

    def optimize(self, gradients: Mapping[str, Ranks]) -> Mapping[int, Ranks]:
        """Step every rank's optimizer; returns the values ``publish`` reads."""
        for rank, state in enumerate(self.states):
            state.optimizer_step({name: ranks[rank] for name, ranks in gradients.items()})
        by_rank = [state.to_publish() for state in self.states]
        return {value: [one[value] for one in by_rank] for value in by_rank[0]}

    def set_published(self, name: str, value: Ranks) -> None:
        """Take over a parameter's new ``local`` value."""
        for state, tensor in zip(self.states, value, strict=True):
            state.set_published(name, tensor)

    def set_buffer(self, name: str, value: Ranks) -> None:
        """Take over a buffer's new value."""
        for state, tensor in zip(self.states, value, strict=True):
            state.set_buffer(name, tensor)

    def finish(self) -> None:
        """Nothing to wait for."""


def _last_uses(function: Function) -> dict[int, list[int]]:
    """Values that nothing reads after each position of the body."""
    last: dict[int, int] = {}
    for position, item in enumerate(function.body):
        made = (item.output,) if isinstance(item, Collective) else item.outputs
        read = (item.input,) if isinstance(item, Collective) else _reads(item)
        for value in (*made, *read):
            if value is not None:
                last[value] = position
    kept = set(function.outputs)
    by_position: dict[int, list[int]] = {}
    for value, position in last.items():
        if value not in kept:
            by_position.setdefault(position, []).append(value)
    return by_position


def _reads(item: Compute) -> Iterable[int]:
    def walk(arg: LocalArg) -> Iterable[int]:
        if isinstance(arg, Ref):
            yield arg.value
        elif isinstance(arg, tuple):
            for part in arg:
                yield from walk(part)

    for arg in (*item.args, *(arg for _, arg in item.kwargs)):
        yield from walk(arg)


def _combine(item: Collective, parts: Ranks) -> Ranks:
    """What each member of a group gets from one collective, in order of position."""
    num_ranks = len(parts)
    if item.kind is CollectiveKind.ALL_GATHER:
        gathered = torch.cat(parts)
        return [gathered.clone() for _ in parts]
    if item.kind is CollectiveKind.ALL_TO_ALL:
        blocks = [part.tensor_split(num_ranks) for part in parts]
        return [torch.cat([row[rank] for row in blocks]) for rank in range(num_ranks)]
    total = parts[0]
    for part in parts[1:]:
        if item.reduction == "sum":
            total = total + part
        elif item.reduction == "max":
            total = torch.maximum(total, part)
        else:
            raise PlanRefused(f"reduction {item.reduction!r}: only sum and max are supported")
    if item.kind is CollectiveKind.ALL_REDUCE:
        return [total.clone() for _ in parts]
    return [chunk.clone() for chunk in total.tensor_split(num_ranks)]


class VirtualCluster:
    """All stages of a plan."""

    def __init__(
        self,
        programs: Sequence[StageProgram],
        layout: Layout,
        source: TensorSource,
        *,
        schedule: ScheduleName,
        num_microbatches: int,
        optimizer: OptimizerSpec,
        device: torch.device | None = None,
    ) -> None:
        """``source`` gives the full parameters, buffers and constants by name."""
        self.programs = tuple(programs)
        self.layout = layout
        mail = _Mail()
        self.engines = [
            VirtualEngine(
                program,
                layout,
                source,
                mail,
                optimizer=optimizer,
                device=device or torch.device("cpu"),
            )
            for program in programs
        ]
        self._mail = mail
        self._executors = [
            StageExecutor(
                engine,
                schedule=schedule,
                num_stages=layout.num_stages,
                num_microbatches=num_microbatches,
            )
            for engine in self.engines
        ]

    def step(
        self, global_data: Mapping[str, Tensor], *, update: bool = True
    ) -> list[StepResult[Ranks]]:
        """One step on a global batch; the result of each stage, with its gradients and outputs.

        Raises:
            PlanRefused: if the stages wait for one another for ever, or the program is wrong.
        """
        running: dict[int, Generator[None, None, StepResult[Ranks]]] = {}
        for stage, executor in enumerate(self._executors):
            by_rank = [
                slice_data(self.programs[stage].inputs, coordinate, global_data)
                for coordinate in self.layout.coordinates
            ]
            data = {name: [one[name] for one in by_rank] for name in by_rank[0]}
            running[stage] = executor.run_step(
                data, update=update, keep_gradients=True, keep_outputs=True
            )
        results: dict[int, StepResult[Ranks]] = {}
        num_idle_turns = 0
        while running:
            before = (len(self._mail.transfers), len(self._mail.tied), len(running))
            for stage in list(running):
                try:
                    next(running[stage])
                except StopIteration as done:
                    results[stage] = done.value
                    del running[stage]
            after = (len(self._mail.transfers), len(self._mail.tied), len(running))
            num_idle_turns = num_idle_turns + 1 if before == after else 0
            # A turn can take as many messages as it leaves; a few in a row cannot for ever.
            if num_idle_turns > 1000:
                raise PlanRefused(
                    f"stages {sorted(running)} wait for one another for ever; "
                    "this is a mistake of the schedule, please report it"
                )
        self._mail.tied.clear()
        return [results[stage] for stage in sorted(results)]

    def full_parameters(self) -> dict[str, Tensor]:
        """Every parameter, put together from what the optimizers update."""
        return {
            slot.name: assemble_parameter(
                slot,
                [(state.coordinate, state.optimized(slot.name)) for state in engine.states],
            )
            for engine in self.engines
            for slot in engine.program.parameters
        }

    def full_gradients(self, results: Sequence[StepResult[Ranks]]) -> dict[str, Tensor]:
        """Every gradient, put together from what a step returned."""
        return {
            slot.name: assemble_parameter(
                slot,
                list(zip(self.layout.coordinates, result.gradients[slot.name], strict=True)),
            )
            for program, result in zip(self.programs, results, strict=True)
            for slot in program.parameters
            if slot.name in result.gradients
        }

    def full_outputs(self, results: Sequence[StepResult[Ranks]]) -> dict[str, Tensor]:
        """Every other result of the module, put together."""
        found = {}
        for program, result in zip(self.programs, results, strict=True):
            for name, _, shard, _ in program.outputs:
                blocks = list(zip(self.layout.coordinates, result.outputs[name], strict=True))
                shape = _full_shape(blocks[0][1], shard, self.layout)
                found[name] = assemble(shape, shard, blocks)
        return found


def _full_shape(block: Tensor, shard: Any, layout: Layout) -> tuple[int, ...]:
    """Shape of the whole of which ``block`` is one rank's part."""
    coordinate = layout.coordinates[0]
    return tuple(
        size * _ways(factors, coordinate)
        for size, factors in zip(block.shape, shard.factors, strict=True)
    )


def _ways(factors: tuple[tuple[int, tuple[str, ...]], ...], coordinate: Any) -> int:
    ways = 1
    for _, axes in factors:
        ways *= coordinate.size(axes)
    return ways
