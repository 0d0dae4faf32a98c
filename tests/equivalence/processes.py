"""Many plans on real gloo processes, one start of the processes for each number of ranks.

The parent captures the models, steps plain PyTorch and lowers the plans; the processes are forked
from it, so that they neither import nor capture anything again.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from meshwright.plans.plan import ParallelPlan
from meshwright.runtime.mesh import Layout, layout_of
from meshwright.runtime.session import RankSession, process_group
from meshwright.runtime.state import assemble_parameter
from meshwright.runtime.verify import Steps
from meshwright.spmd.prepared import lower_plan
from meshwright.spmd.program import StageProgram
from tests.equivalence.subject import NUM_STEPS, Subject, largest_differences

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Run:
    """One plan of one subject, lowered."""

    name: str
    subject: Subject
    plan: ParallelPlan
    programs: tuple[StageProgram, ...]

    @property
    def layout(self) -> Layout:
        return layout_of(self.plan)


@dataclass(frozen=True)
class Found:
    """Largest relative differences of one run from plain PyTorch, and how long it took."""

    name: str
    loss: float
    gradients: float
    parameters: float
    elapsed_s: float

    @property
    def worst(self) -> float:
        return max(self.loss, self.gradients, self.parameters)


def lowered(name: str, subject: Subject, plan: ParallelPlan) -> Run:
    """A plan ready to run; raises PlanRefused where the model cannot carry it."""
    return Run(name, subject, plan, lower_plan(subject.prepared, plan))


def run_on_processes(runs: Sequence[Run], *, num_ranks: int) -> list[Found]:
    """Run every plan in turn on ``num_ranks`` processes; differences in order of ``runs``.

    Where a process dies of a signal, which one of torch's own threads does about once in 500 runs
    (``malloc(): unaligned tcache chunk`` under gloo), the plans left are started once more.
    """
    found, signal = _found_on_processes(runs, num_ranks=num_ranks)
    if signal is not None and len(found) < len(runs):
        warnings.warn(f"a process died of signal {signal} in {runs[len(found)].name}", stacklevel=2)
        again, _ = _found_on_processes(runs[len(found) :], num_ranks=num_ranks)
        found += again
    assert len(found) == len(runs), f"the processes ended after {len(found)} of {len(runs)}"
    return found


def _found_on_processes(runs: Sequence[Run], *, num_ranks: int) -> tuple[list[Found], int | None]:
    """What came back before the processes ended, and the signal that killed one of them."""
    assert all(run.layout.num_ranks == num_ranks for run in runs)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        context.Process(target=_work, args=(rank, num_ranks, port, list(runs), sender), daemon=True)
        for rank in range(num_ranks)
    ]
    for worker in workers:
        worker.start()
    sender.close()
    found: list[Found] = []
    signal = None
    deadline_s = time.monotonic() + TIMEOUT_S
    with suppress(EOFError):
        while len(found) < len(runs) and signal is None and time.monotonic() < deadline_s:
            if receiver.poll(0.5):
                found.append(receiver.recv())
            signal = next((-w.exitcode for w in workers if (w.exitcode or 0) < 0), None)
    for worker in workers:
        worker.join(timeout=20 if len(found) == len(runs) else 0)
        worker.kill()
    return found, signal


def _work(rank: int, num_ranks: int, port: int, runs: list[Run], sender: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    with process_group(torch.device("cpu"), timeout_s=TIMEOUT_S):
        for run in runs:
            start = time.perf_counter()
            steps = _run(rank, run)
            if steps is not None:
                differences = largest_differences(run.subject, steps)
                sender.send(Found(run.name, *differences, time.perf_counter() - start))
        dist.barrier()


def _run(rank: int, run: Run) -> Steps | None:
    """This rank's steps of one plan; rank 0 puts everybody's together."""
    stage, _ = run.layout.locate(rank)
    session = RankSession(
        run.programs[stage],
        run.layout,
        run.subject.state.__getitem__,
        rank=rank,
        schedule=run.plan.schedule,
        num_microbatches=run.plan.num_microbatches,
        optimizer=run.plan.job.optimizer,
        device=torch.device("cpu"),
    )
    batch = session.local_batch(run.subject.data)
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(NUM_STEPS):
        result = session.step(batch, keep_gradients=step == 0)
        if result.loss is not None:
            losses.append(float(result.loss))
        if step == 0:
            gradients = {name: value.clone() for name, value in result.gradients.items()}
    held = {slot.name: session.state.optimized(slot.name) for slot in session.program.parameters}
    everyone: list | None = [None] * run.layout.num_ranks if rank == 0 else None
    dist.gather_object((losses, gradients, held), everyone)
    if everyone is None:
        return None
    return Steps(
        losses=next((own for own, _, _ in everyone if own), (math.nan,)),
        gradients=_assembled(run, [own for _, own, _ in everyone]),
        parameters=_assembled(run, [own for _, _, own in everyone]),
    )


def _assembled(run: Run, by_rank: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    full = {}
    for stage, program in enumerate(run.programs):
        for slot in program.parameters:
            pieces = [
                (coordinate, by_rank[run.layout.rank_of(stage, coordinate)][slot.name])
                for coordinate in run.layout.coordinates
                if slot.name in by_rank[run.layout.rank_of(stage, coordinate)]
            ]
            if pieces:
                full[slot.name] = assemble_parameter(slot, pieces)
    return full
