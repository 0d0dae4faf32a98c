"""Starts local processes that measure together, and hands on what they find as it comes.

Rank 0 writes one JSON message a line; everything it has said is kept, whatever happens after. A
rank that dies ends the others, and so does a silence of all.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from meshwright.errors import BadRequest
from meshwright.profiling.figures import Emit, Figure, Note
from meshwright.profiling.sweeps import RankJob
from meshwright.strict_json import one_line

__all__ = ["run_on_local_ranks", "worker_command"]

_POLL_S = 0.2
_GRACE_S = 5.0


def worker_command(job_path: str) -> list[str]:
    """The command line of one process."""
    return [sys.executable, "-m", "meshwright.profiling.rank_worker", job_path]


def run_on_local_ranks(job: RankJob, emit: Emit, *, command: Sequence[str] | None = None) -> None:
    """Run the sweeps of ``job`` in ``num_ranks`` processes; ``emit`` gets every message.

    Args:
        job: What to run.
        emit: Called here with each message of rank 0.
        command: Of a process, to which the path of the job is added; the usual worker unless given.

    Raises:
        BadRequest: a process died, or all were silent for longer than they may wait for another.
    """
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        path = Path(folder) / "job.json"
        whole = msgspec.structs.replace(job, rendezvous=str(Path(folder) / "rendezvous"))
        path.write_bytes(msgspec.json.encode(whole))
        line = [*command, str(path)] if command else worker_command(str(path))
        with _processes(line, job, Path(folder)) as processes:
            _follow(processes, job, emit, Path(folder))


@contextmanager
def _processes(
    command: list[str], job: RankJob, folder: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(job.num_ranks):
            threads = str(job.num_threads)
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": threads,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(job.num_ranks),
                "LOCAL_WORLD_SIZE": str(job.num_ranks),
            }
            with _error_path(folder, rank).open("wb") as errors:
                started.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                        stderr=errors,
                        env=environment,
                        start_new_session=True,  # Ctrl-C is for us, who then end them
                    )
                )
        yield started
    finally:
        _end(started)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline_s = time.monotonic() + _GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _follow(
    processes: list[subprocess.Popen[bytes]], job: RankJob, emit: Emit, folder: Path
) -> None:
    """Hand on messages until all processes ended well.

    Raises:
        BadRequest: one did not, or nothing was heard for too long.
    """
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    output = processes[0].stdout
    assert output is not None, "the output of rank 0 was piped"
    reader = threading.Thread(target=_read, args=(output, lines), daemon=True)
    reader.start()
    heard_s = time.monotonic()
    while True:
        try:
            line = lines.get(timeout=_POLL_S)
        except queue.Empty:
            line = b""
        if line:
            heard_s = time.monotonic()
            emit(_message(line))
            continue
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            raise BadRequest(_why(processes, failed, folder))
        if all(code == 0 for code in codes) and not reader.is_alive() and lines.empty():
            return
        # Ranks wait for one another for ``timeout_s``, then say so themselves.
        if time.monotonic() - heard_s > 2 * job.timeout_s:
            raise BadRequest(
                f"profile: nothing heard of {job.num_ranks} processes for "
                f"{2 * job.timeout_s:.0f} s; run fewer, or measure smaller sizes"
            )


def _read(output: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    for line in output:
        if line.strip():
            lines.put(line)


def _message(line: bytes) -> Figure | Note:
    try:
        return msgspec.json.decode(line, type=Figure | Note)
    except msgspec.DecodeError:
        return Note(text=line.decode("utf-8", errors="replace").strip())


def _why(processes: list[subprocess.Popen[bytes]], failed: list[int], folder: Path) -> str:
    """One line about the rank that failed first: the others complain of it, in gloo's words."""
    said = {rank: _last_words(folder, rank) for rank in failed}
    first = min(failed, key=lambda rank: ("Connection" in said[rank], not said[rank], rank))
    code = processes[first].returncode
    how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    return one_line(
        f"profile: rank {first} of {len(processes)} {how}: {said[first] or 'no message'}; "
        "what was measured before is kept"
    )


def _last_words(folder: Path, rank: int) -> str:
    text = _error_path(folder, rank).read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _error_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.txt"
