"""Runs a plan on this machine: torchrun, one process for each device of the plan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from meshwright import errors
from meshwright.errors import BadRequest, DoesNotFit, PlannerError
from meshwright.plans.io import read_plan
from meshwright.records.report import StepReport, read_step_report
from meshwright.runtime.checks import check_program
from meshwright.runtime.job import Failure, Job, open_plan

__all__ = ["failure_from", "launch", "launch_command"]

_GRACE_S = 15.0
"""Between asking torchrun to end its workers and ending it outright."""


def launch_command(job_path: str, *, num_ranks: int) -> list[str]:
    """The torchrun command line of a job on one host; it finds a free port itself."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_ranks}",
        "--max-restarts=0",
        "-m",
        "meshwright.runtime.worker",
        job_path,
    ]


def launch(
    plan_path: str | os.PathLike[str],
    *,
    warmup: int = 2,
    repeats: int = 10,
    verify_steps: int = 0,
    seed: int = 0,
    device: str = "cpu",
    rank_timeout_s: float = 600.0,
    on_line: Callable[[str], None] | None = None,
) -> StepReport:
    """Run the plan in ``plan_path`` with one process, of one thread, for each of its devices.

    ``on_line`` gets every line the workers write, as it comes. Workers are ended if the caller is
    interrupted. The plan is lowered here first, so that one that cannot run starts no process.

    Raises:
        PlannerError: the first error of any worker, in one line.
    """
    plan = read_plan(plan_path)
    for program in open_plan(plan).programs():
        check_program(program)
    num_ranks = plan.mesh.num_devices
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        job = Job(
            plan=str(Path(plan_path).resolve()),
            result_dir=folder,
            warmup=warmup,
            repeats=repeats,
            verify_steps=verify_steps,
            seed=seed,
            device=device,
            timeout_s=rank_timeout_s,
        )
        job_path = Path(folder) / "job.json"
        job_path.write_bytes(msgspec.json.encode(job))
        tail: deque[str] = deque(maxlen=200)
        status = _run(launch_command(str(job_path), num_ranks=num_ranks), on_line, tail)
        report = Path(folder) / "report.json"
        if status != 0 or not report.exists():
            raise failure_from(Path(folder), status, tail)
        return read_step_report(report)


def _run(command: list[str], on_line: Callable[[str], None] | None, tail: deque[str]) -> int:
    """Run ``command`` to its end, passing its output on; the exit status."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None, "the output was piped"
    try:
        for line in process.stdout:
            text = line.rstrip("\n")
            tail.append(text)
            if on_line is not None:
                on_line(text)
        return process.wait()
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End torchrun, which ends its workers; they also watch for it to be gone."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def failure_from(folder: Path, status: int, tail: deque[str]) -> PlannerError:
    """The error to raise for what the workers left in ``folder`` and wrote last."""
    failures = sorted(
        (
            msgspec.json.decode(path.read_bytes(), type=Failure)
            for path in folder.glob("failure-*.json")
        ),
        # Ranks that lost a peer fail after it, and with an error that is not the user's.
        key=lambda failure: (not failure.is_planner_error, failure.time_s),
    )
    if not failures:
        if any("SIGKILL" in line for line in tail):
            return DoesNotFit(
                "a worker was killed by the system, most likely for want of memory; "
                "run fewer processes on this machine, or a smaller model"
            )
        last = next((line.strip() for line in reversed(tail) if line.strip()), "no output")
        return BadRequest(f"torchrun ended with status {status}: {last}; see the lines above")
    first = failures[0]
    if first.is_planner_error:
        known = getattr(errors, first.error, PlannerError)
        return known(first.message)
    if "out of memory" in first.message.lower() or first.error in (
        "MemoryError",
        "OutOfMemoryError",
    ):
        return DoesNotFit(
            f"rank {first.rank} ran out of memory: {first.message}; plan with less memory"
        )
    return BadRequest(
        f"rank {first.rank} failed with {first.error}: {first.message}; see the lines above"
    )
