"""One process of a distributed run: its process group, its program, its steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from meshwright.errors import BadRequest, PlanRefused
from meshwright.plans.plan import OptimizerSpec, ScheduleName
from meshwright.runtime.executor import StageExecutor, StepResult
from meshwright.runtime.mesh import Layout, axes_used, make_groups, program_functions
from meshwright.runtime.rank import RankEngine
from meshwright.runtime.state import RankState, TensorSource, slice_data
from meshwright.runtime.transport import ProcessTransport
from meshwright.spmd.layout import BATCH_AXES
from meshwright.spmd.program import StageProgram

__all__ = ["RankSession", "process_group"]


@contextmanager
def process_group(device: torch.device, *, timeout_s: float = 600.0) -> Iterator[tuple[int, int]]:
    """The default process group of a torchrun worker; gives rank and world size.

    Every restart gets a store prefix of its own: torchrun keeps its store between restarts, and
    gloo would find the addresses of dead processes under the old keys.

    Raises:
        BadRequest: outside torchrun.
    """
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as error:
        raise BadRequest(f"{error.args[0]} is not set; start the worker with torchrun") from error
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    agent_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(
        host, port, world_size, is_master=rank == 0 and not agent_hosts_store, timeout=timeout
    )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(f"{run_id}/{restart}/{world_size}", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    try:
        yield rank, world_size
    finally:
        dist.destroy_process_group()


class RankSession:
    """The steps of one rank; needs the default process group, and all ranks to come together."""

    def __init__(
        self,
        program: StageProgram,
        layout: Layout,
        source: TensorSource,
        *,
        rank: int,
        schedule: ScheduleName,
        num_microbatches: int,
        optimizer: OptimizerSpec,
        device: torch.device,
    ) -> None:
        """Slices the rank's parameters out of ``source`` and compiles its program.

        Raises:
            PlanRefused: if the number of processes is not the plan's, or the program cannot run.
        """
        if dist.get_world_size() != layout.num_ranks:
            raise PlanRefused(
                f"{dist.get_world_size()} processes but the plan has {layout.num_ranks} devices; "
                f"start {layout.num_ranks} processes"
            )
        stage, self.coordinate = layout.locate(rank)
        if stage != program.stage:
            raise PlanRefused(
                f"rank {rank} belongs to stage {stage} but was given stage {program.stage}; "
                "lower the plan for its stage"
            )
        self.rank = rank
        self.num_microbatches = num_microbatches
        self.program = program
        self.layout = layout
        self.device = device
        self.state = RankState(program, self.coordinate, source, optimizer=optimizer, device=device)
        groups = make_groups(layout, rank=rank, axes=axes_used(program_functions(program).values()))
        transport = ProcessTransport(
            program, layout, self.coordinate, num_microbatches=num_microbatches, device=device
        )
        self.engine = RankEngine(self.state, transport, groups, device=device)
        self._executor = StageExecutor(
            self.engine,
            schedule=schedule,
            num_stages=layout.num_stages,
            num_microbatches=num_microbatches,
        )

    def seed_draws(self, seed: int) -> None:
        """Seed torch's generators: ranks that hold the same samples draw alike, others do not.

        Lowering cuts random operators along the batch and nothing else, so equal copies stay equal.
        """
        axes = tuple(axis for axis in BATCH_AXES if self.coordinate.size((axis,)) > 1)
        position = self.coordinate.position(axes)
        torch.manual_seed(seed + self.program.stage + self.layout.num_stages * position)

    def local_batch(self, global_data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of a global batch, on its device."""
        local = slice_data(self.program.inputs, self.coordinate, global_data)
        return {name: tensor.to(self.device) for name, tensor in local.items()}

    def step(
        self,
        local_data: Mapping[str, Tensor],
        *,
        update: bool = True,
        keep_gradients: bool = False,
        keep_outputs: bool = False,
    ) -> StepResult[Tensor]:
        """One step on the rank's own batch, by input name (``local_batch`` makes one)."""
        running = self._executor.run_step(
            local_data, update=update, keep_gradients=keep_gradients, keep_outputs=keep_outputs
        )
        try:
            next(running)
        except StopIteration as done:
            result: StepResult[Tensor] = done.value
            return result
        raise AssertionError("a real rank blocks where it waits and never yields")
