"""The engine of one real rank: compiled functions, process groups, messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from meshwright.runtime import adapter
from meshwright.runtime.checks import check_program
from meshwright.runtime.compile import CompiledFunction, compile_function
from meshwright.runtime.mesh import Axes, Group, program_functions
from meshwright.runtime.state import RankState
from meshwright.runtime.transport import Transport
from meshwright.spmd.program import StageProgram, TiedExchange, Transfer

__all__ = ["RankEngine", "sum_in_stage_order"]


class RankEngine:
    """Runs one rank's program; a value is a tensor. See ``executor.Engine``."""

    def __init__(
        self,
        state: RankState,
        transport: Transport,
        groups: Mapping[Axes, Group],
        *,
        device: torch.device,
    ) -> None:
        """Compiles every function.

        Raises:
            PlanRefused: if an operator does not exist or a process group is missing.
        """
        check_program(state.program)
        self.program: StageProgram = state.program
        self.state = state
        self._transport = transport
        self.functions: dict[str, CompiledFunction] = {
            name: compile_function(
                function,
                values=self.program.values,
                coordinate=state.coordinate,
                groups=groups,
                device=device,
            )
            for name, function in program_functions(self.program).items()
        }

    def call(self, function: str, arguments: list[Tensor]) -> Sequence[Tensor]:
        """Outputs of a function of the program; empties ``arguments``."""
        with adapter.below_autograd():
            return self.functions[function].run(arguments)

    def held(self, value: int) -> Tensor | None:
        """The parameter, buffer or constant with this number, or ``None``."""
        return self.state.held.get(value)

    def cut(self, batch: Tensor, dim: int, index: int, num_parts: int) -> Tensor:
        """Run ``index`` of ``num_parts`` equal runs along ``dim``; a view."""
        rows = batch.shape[dim] // num_parts
        return batch.narrow(dim, index * rows, rows)

    def add(self, total: Tensor, addend: Tensor) -> Tensor:
        """The sum, in new memory."""
        return total + addend

    def add_into(self, total: Tensor, addend: Tensor) -> None:
        """Add in place."""
        total.add_(addend)

    def concatenate(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The parts side by side along ``dim``."""
        return torch.cat(list(parts), dim=dim)

    def send(self, transfer: Transfer, microbatch: int, value: Tensor) -> None:
        """Start sending."""
        self._transport.send(transfer, microbatch, value)

    def expect(self, transfer: Transfer, microbatch: int) -> None:
        """Start receiving."""
        self._transport.expect(transfer, microbatch)

    def is_ready(self, transfer: Transfer, microbatch: int) -> bool:
        """Always: a real rank blocks in ``receive``."""
        return True

    def receive(self, transfer: Transfer, microbatch: int) -> Tensor:
        """Wait for the value sent."""
        return self._transport.receive(transfer, microbatch)

    def send_tied(self, exchange: TiedExchange, value: Tensor) -> None:
        """Start exchanging this stage's summed gradient."""
        self._transport.exchange(exchange, value)

    def is_tied_ready(self, exchange: TiedExchange) -> bool:
        """Always: a real rank blocks in ``total_tied``."""
        return True

    def total_tied(self, exchange: TiedExchange, value: Tensor) -> Tensor:
        """The sum over stages, in stage order."""
        return sum_in_stage_order(
            {self.program.stage: value, **self._transport.exchanged(exchange)}
        )

    def optimize(self, gradients: Mapping[str, Tensor]) -> Mapping[int, Tensor]:
        """Step the optimizer; returns the values ``publish`` reads."""
        self.state.optimizer_step(gradients)
        return self.state.to_publish()

    def set_published(self, name: str, value: Tensor) -> None:
        """Take over a parameter's new ``local`` value."""
        self.state.set_published(name, value)

    def set_buffer(self, name: str, value: Tensor) -> None:
        """Take over a buffer's new value."""
        self.state.set_buffer(name, value)

    def finish(self) -> None:
        """Wait for every send."""
        self._transport.finish()


def sum_in_stage_order(by_stage: Mapping[int, Tensor]) -> Tensor:
    """The sum of one tensor for each stage, lowest stage first."""
    stages = sorted(by_stage)
    total = by_stage[stages[0]]
    for stage in stages[1:]:
        total = total + by_stage[stage]
    return total
