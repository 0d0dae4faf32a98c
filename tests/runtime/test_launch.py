"""How a failed run is told: one line, the first cause, the right class."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import msgspec
import pytest

from meshwright.errors import BadRequest, DoesNotFit, PlanRefused
from meshwright.runtime.job import Failure, Job, failure_of, read_job
from meshwright.runtime.launch import failure_from, launch_command


def _write(folder: Path, error: BaseException, rank: int, time_s: float) -> None:
    failure = failure_of(error, rank=rank, time_s=time_s)
    (folder / f"failure-{rank}.json").write_bytes(msgspec.json.encode(failure))


def test_the_users_error_comes_before_its_consequences(tmp_path: Path) -> None:
    """Rank 0 lost its peer a moment earlier than rank 1 wrote why."""
    _write(tmp_path, RuntimeError("Connection closed by peer"), 0, 1.0)
    _write(tmp_path, PlanRefused("operator x: no rule; shard y"), 1, 2.0)
    error = failure_from(tmp_path, 1, deque())

    assert type(error) is PlanRefused
    assert "operator x: no rule; shard y" == str(error)


def test_the_first_of_several_failures_counts(tmp_path: Path) -> None:
    _write(tmp_path, RuntimeError("second"), 0, 2.0)
    _write(tmp_path, ValueError("first\nmore lines"), 1, 1.0)
    error = failure_from(tmp_path, 1, deque())

    assert isinstance(error, BadRequest)
    assert "rank 1 failed with ValueError: first; see the lines above" == str(error)


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: out of memory"]
)
def test_out_of_memory_does_not_fit(message: str, tmp_path: Path) -> None:
    _write(tmp_path, RuntimeError(message), 3, 1.0)
    error = failure_from(tmp_path, 1, deque())

    assert isinstance(error, DoesNotFit)
    assert "rank 3 ran out of memory" in str(error)


def test_a_worker_killed_by_the_system_does_not_fit(tmp_path: Path) -> None:
    error = failure_from(tmp_path, 1, deque(["  exitcode  : -9 (pid: 7)", "Signal 9 (SIGKILL)"]))

    assert isinstance(error, DoesNotFit)


def test_a_silent_end_shows_the_last_line(tmp_path: Path) -> None:
    error = failure_from(tmp_path, 1, deque(["No module named x", ""]))

    assert "torchrun ended with status 1: No module named x; see the lines above" == str(error)


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    job = Job(plan="p.json", result_dir=str(tmp_path), verify_steps=3)
    path = tmp_path / "job.json"
    path.write_bytes(msgspec.json.encode(job))

    assert job == read_job(str(path))
    assert str(path) == launch_command(str(path), num_ranks=4)[-1]


def test_a_broken_job_file_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text('{"plan": 1}', encoding="utf-8")

    with pytest.raises(BadRequest, match="job file"):
        read_job(str(path))


def test_failures_are_one_line() -> None:
    failure = failure_of(ValueError("a\nb"), rank=2, time_s=0.5)

    assert (
        Failure(rank=2, error="ValueError", message="a", is_planner_error=False, time_s=0.5)
        == failure
    )
