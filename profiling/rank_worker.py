"""One process that measures together with others: ``-m meshwright.profiling.rank_worker JOBFILE``.

Under torchrun the same sweeps run in the processes that are there already
(``measure_in_this_process``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch
import torch.distributed as dist

from meshwright.errors import BadRequest
from meshwright.profiling.collectives import measure_collectives
from meshwright.profiling.figures import Emit, Figure, Note
from meshwright.profiling.machine import measure_machine
from meshwright.profiling.overlap import measure_overlap
from meshwright.profiling.parent import end_with_parent
from meshwright.profiling.sweeps import CollectiveSweep, OverlapSweep, RankJob, Sweep
from meshwright.profiling.together import Together

__all__ = ["is_under_torchrun", "joined", "main", "measure_in_this_process", "run_sweeps"]


def main(arguments: list[str]) -> int:
    """Run the job in the file ``arguments[0]``; the status for the system."""
    end_with_parent()
    job = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=RankJob)
    # Libraries that write to standard output must not break our lines.
    with os.fdopen(os.dup(1), "wb", buffering=0) as messages:
        os.dup2(2, 1)
        with joined(job) as together:
            run_sweeps(together, job.sweeps, _emitter(messages, together.rank))
    return 0


def run_sweeps(together: Together, sweeps: tuple[Sweep, ...], emit: Emit) -> None:
    """Run each sweep in turn on all ranks."""
    for sweep in sweeps:
        if isinstance(sweep, CollectiveSweep):
            measure_collectives(together, sweep, emit)
        elif isinstance(sweep, OverlapSweep):
            measure_overlap(together, sweep, emit)
        else:
            measure_machine(together, sweep, emit)


def is_under_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def measure_in_this_process(job: RankJob, emit: Emit) -> bool:
    """Run ``job`` as one rank of torchrun's; whether this is rank 0, whose ``emit`` is called.

    Raises:
        BadRequest: torchrun started another number of processes, or another rank is gone.
    """
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size != job.num_ranks:
        raise BadRequest(
            f"profile: torchrun started {world_size} processes, not {job.num_ranks}; leave out "
            "--ranks and --cluster there"
        )
    is_first = os.environ["RANK"] == "0"
    try:
        with joined(job) as together:
            run_sweeps(together, job.sweeps, emit if is_first else _nobody)
    except RuntimeError as error:  # how torch says that another rank is gone
        raise BadRequest(
            f"profile: rank {os.environ['RANK']} stopped: {' '.join(str(error).split())[:200]}; "
            "what was measured before is kept"
        ) from error
    return is_first


@contextmanager
def joined(job: RankJob) -> Iterator[Together]:
    """The process group of ``job``, with this process in it, and this rank among all."""
    torch.set_num_threads(job.num_threads)
    device = torch.device(job.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{job.rendezvous}" if job.rendezvous else "env://",
        rank=int(os.environ["RANK"]),
        world_size=job.num_ranks,
        timeout=timedelta(seconds=job.timeout_s),
    )
    try:
        yield Together(device, timeout_s=job.timeout_s)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _emitter(messages: BinaryIO, rank: int) -> Emit:
    def emit(message: Figure | Note) -> None:
        messages.write(msgspec.json.encode(message) + b"\n")

    return emit if rank == 0 else _nobody


def _nobody(message: Figure | Note) -> None:
    """Ranks other than 0 tell nobody."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
