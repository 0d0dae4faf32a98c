"""The lowered program of some ranks on fake tensors: what it would really dispatch.

One process impersonates one rank after another of a cluster of any size, through torch's ``fake``
process group. Functions are compiled as for a real run and executed on tensors without data, so
that every operator's own shape rule is asked; the collectives they dispatch are counted and must
equal what the program says, which is what the cost model prices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.errors import PlanRefused
from meshwright.graph.opgraph import TensorSpec
from meshwright.plans.plan import OptimizerSpec, ScheduleName
from meshwright.runtime import adapter
from meshwright.runtime.executor import StageExecutor
from meshwright.runtime.mesh import (
    Axes,
    Coordinate,
    Group,
    Layout,
    axes_used,
    make_groups,
    program_functions,
)
from meshwright.runtime.rank import RankEngine
from meshwright.runtime.state import RankState, local_shape
from meshwright.runtime.transport import Transport
from meshwright.spmd.program import Collective, StageProgram, TiedExchange, Transfer

__all__ = ["DryRun", "Traffic", "dry_run", "expected_traffic"]

_Counts = tuple[Counter[tuple[str, Axes]], Counter[tuple[str, Axes]]]
"""Calls and bytes by kind and axes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Collectives of one kind along the same axes."""

    num_calls: int
    num_bytes: int
    """Full payload, as ``Collective.num_bytes`` defines it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What one rank dispatches in a step."""

    rank: int
    collectives: Mapping[tuple[str, Axes], Traffic]
    """By kind (``all_reduce``...) and axes."""
    num_bytes_sent: int
    """To other stages, gradients of tied parameters included."""


def expected_traffic(
    program: StageProgram, *, coordinate: Coordinate, num_microbatches: int
) -> dict[tuple[str, Axes], Traffic]:
    """Collectives of one step as the program states them; groups of one rank are left out."""
    functions = program_functions(program)
    repeats = dict.fromkeys(functions, 1)
    repeats |= {"forward": num_microbatches, "backward": num_microbatches - 1}
    calls: Counter[tuple[str, Axes]] = Counter()
    payload: Counter[tuple[str, Axes]] = Counter()
    for name, function in functions.items():
        for item in function.body:
            if isinstance(item, Collective) and coordinate.size(item.axes) > 1 and repeats[name]:
                key = (str(item.kind), item.axes)
                calls[key] += repeats[name]
                payload[key] += repeats[name] * item.num_bytes
    return {key: Traffic(num_calls=calls[key], num_bytes=payload[key]) for key in calls}


def dry_run(
    program: StageProgram,
    layout: Layout,
    *,
    rank: int,
    schedule: ScheduleName,
    num_microbatches: int,
    device: torch.device | None = None,
) -> DryRun:
    """Run one step of ``rank`` on fake tensors, without the optimizer's arithmetic.

    The default process group must not exist.

    Raises:
        PlanRefused: if an operator or kernel refuses its operands, a result has another shape or
            element type than the program says, or the collectives dispatched are not the
            program's.
    """
    place = device or torch.device("cpu")
    _, coordinate = layout.locate(rank)
    with adapter.fake_process_group(rank=rank, world_size=layout.num_ranks):
        groups = make_groups(layout, rank=rank, axes=axes_used(program_functions(program).values()))
        counter = _CollectiveCounter(groups)
        transport = _FakeTransport(program, place)
        with adapter.fake_mode(), torch.device(place):
            state = _FakeState(
                program,
                coordinate,
                _blank_source(program),
                optimizer=OptimizerSpec(),
                device=place,
            )
            engine = _CheckedEngine(state, transport, groups, counter, device=place)
            executor: StageExecutor[Tensor] = StageExecutor(
                engine,
                schedule=schedule,
                num_stages=layout.num_stages,
                num_microbatches=num_microbatches,
            )
            data = {
                slot.name: _blank(slot.full, local_shape(slot.full.shape, slot.shard, coordinate))
                for slot in program.inputs
                if slot.role == "data"
            }
            with counter:
                for _ in executor.run_step(data):
                    raise AssertionError("a dry rank never waits")
    expected = expected_traffic(program, coordinate=coordinate, num_microbatches=num_microbatches)
    found = counter.traffic()
    _compare(rank, expected, found)
    return DryRun(rank=rank, collectives=found, num_bytes_sent=transport.num_bytes_sent)


def _compare(
    rank: int,
    expected: Mapping[tuple[str, Axes], Traffic],
    found: Mapping[tuple[str, Axes], Traffic],
) -> None:
    for kind, axes in sorted({*expected, *found}):
        nothing = Traffic(num_calls=0, num_bytes=0)
        said = expected.get((kind, axes), nothing)
        seen = found.get((kind, axes), nothing)
        if said != seen:
            raise PlanRefused(
                f"rank {rank}: {kind} along {'+'.join(axes)}: the program says {said.num_calls} "
                f"calls of {said.num_bytes} bytes in all but dispatches {seen.num_calls} of "
                f"{seen.num_bytes}; this is a mistake of the lowering, please report it"
            )


class _CollectiveCounter(TorchDispatchMode):
    """Counts functional collectives as they are dispatched."""

    def __init__(self, groups: Mapping[Axes, Group]) -> None:
        super().__init__()
        self._axes = {group.name: axes for axes, group in groups.items() if group.size > 1}
        self._calls: Counter[tuple[str, Axes]] = Counter()
        self._payload: Counter[tuple[str, Axes]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = adapter.COLLECTIVE_OPS.get(func)
        if kind is not None:
            name = args[-1]
            payload = result if kind == "all_gather" else args[0]
            self._calls[kind, self._axes[name]] += 1
            self._payload[kind, self._axes[name]] += payload.numel() * payload.element_size()
        return result

    def copy(self) -> _Counts:
        """What was counted so far."""
        return Counter(self._calls), Counter(self._payload)

    def since(self, before: _Counts) -> _Counts:
        """What was counted after ``before``."""
        return self._calls - before[0], self._payload - before[1]

    def add(self, counts: _Counts) -> None:
        """Count these once more."""
        self._calls += counts[0]
        self._payload += counts[1]

    def traffic(self) -> dict[tuple[str, Axes], Traffic]:
        """What was counted."""
        return {
            key: Traffic(num_calls=self._calls[key], num_bytes=self._payload[key])
            for key in self._calls
        }


class _CheckedEngine(RankEngine):
    """Compares every result of a function with the program's word for it.

    A function is executed for the first micro-batch only: on tensors without data, the others
    would dispatch the same again, so they are counted with the first one's collectives.
    """

    def __init__(
        self,
        state: RankState,
        transport: Transport,
        groups: Mapping[Axes, Group],
        counter: _CollectiveCounter,
        *,
        device: torch.device,
    ) -> None:
        super().__init__(state, transport, groups, device=device)
        self._counter = counter
        self._results: dict[str, Sequence[Tensor]] = {}
        self._dispatched: dict[str, _Counts] = {}

    def call(self, function: str, arguments: list[Tensor]) -> Sequence[Tensor]:
        """Outputs of a function of the program."""
        code = self.functions[function].function
        self._compare(function, code.inputs, arguments)
        if function in self._results:
            self._counter.add(self._dispatched[function])
            return self._results[function]
        before = self._counter.copy()
        self._results[function] = self._execute(function, arguments)
        self._dispatched[function] = self._counter.since(before)
        return self._results[function]

    def _execute(self, function: str, arguments: list[Tensor]) -> Sequence[Tensor]:
        code = self.functions[function].function
        try:
            results = super().call(function, arguments)
        except (RuntimeError, IndexError, TypeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise PlanRefused(
                f"stage {self.program.stage}, {function}: {reason}; "
                "the runtime cannot carry this plan"
            ) from error
        self._compare(function, code.outputs, results)
        return results

    def _compare(self, function: str, values: Iterable[int], tensors: Iterable[Tensor]) -> None:
        for value, tensor in zip(values, tensors, strict=True):
            spec = self.program.values[value]
            dtype = str(tensor.dtype).removeprefix("torch.")
            if tuple(tensor.shape) != spec.shape or dtype != spec.dtype:
                raise PlanRefused(
                    f"stage {self.program.stage}, {function}: value {value} is "
                    f"{dtype}{list(tensor.shape)} but the program says "
                    f"{spec.dtype}{list(spec.shape)}; this is a mistake of the lowering, please "
                    "report it"
                )


class _FakeState(RankState):
    """Holds tensors without data; the optimizer changes no shape, so it does nothing."""

    def optimizer_step(self, gradients: Mapping[str, Tensor]) -> None:
        """Check that gradients have the shape of what the optimizer updates."""
        for name, gradient in gradients.items():
            if gradient.shape != self.optimized(name).shape:
                raise PlanRefused(
                    f"stage {self.program.stage}: gradient of {name} has shape "
                    f"{list(gradient.shape)} but the optimizer updates "
                    f"{list(self.optimized(name).shape)}; this is a mistake of the lowering, "
                    "please report it"
                )


class _FakeTransport:
    """Sends into the void and receives blank tensors."""

    def __init__(self, program: StageProgram, device: torch.device) -> None:
        self._program = program
        self._device = device
        self.num_bytes_sent = 0

    def send(self, transfer: Transfer, microbatch: int, tensor: Tensor) -> None:
        """Count the bytes, which the transfer must have announced."""
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes != transfer.num_bytes:
            raise PlanRefused(
                f"transfer {transfer.tag} sends {num_bytes} bytes but the program says "
                f"{transfer.num_bytes}; this is a mistake of the lowering, please report it"
            )
        self.num_bytes_sent += num_bytes

    def expect(self, transfer: Transfer, microbatch: int) -> None:
        """Nothing to prepare."""

    def receive(self, transfer: Transfer, microbatch: int) -> Tensor:
        """A blank tensor."""
        return _blank(self._program.values[transfer.target_value])

    def exchange(self, exchange: TiedExchange, tensor: Tensor) -> None:
        """Count the bytes."""
        num_others = len(exchange.stages) - 1
        self.num_bytes_sent += num_others * tensor.numel() * tensor.element_size()

    def exchanged(self, exchange: TiedExchange) -> dict[int, Tensor]:
        """A blank tensor from every other stage."""
        spec = self._program.values[exchange.accumulator]
        return {stage: _blank(spec) for stage in exchange.stages if stage != self._program.stage}

    def finish(self) -> None:
        """Nothing to wait for."""


def _blank(spec: TensorSpec, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor of the fake mode in force."""
    return torch.empty(spec.shape if shape is None else shape, dtype=getattr(torch, spec.dtype))


def _blank_source(program: StageProgram) -> Callable[[str], Tensor]:
    specs = {slot.name: slot.full for slot in program.parameters}
    specs |= {slot.name: slot.full for slot in program.inputs}
    return lambda name: _blank(specs[name])
