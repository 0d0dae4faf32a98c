"""Processes that write one store: killed at any moment, or several at once.

``python -m tests.records.writers killed STORE ROUNDS SEED`` starts one writer after another and
kills each with SIGKILL; ``... together STORE WRITERS APPENDS`` lets several write while this one
reads. Both print as JSON what the writers had been told was stored.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

from meshwright.records import Record, RecordStore
from tests.records.examples import record

__all__ = ["batch"]


def batch(writer: int, number: int) -> list[Record]:
    """What a writer appends as its ``number``-th: mostly one Record, now and then 40."""
    return [
        record(name=f"writer {writer}", extra=record().extra | {"m": number, "n": part})
        for part in range(40 if number % 10 == 9 else 1)
    ]


def main(arguments: list[str]) -> None:
    """See the module docstring."""
    mode, path, count, number = arguments
    import pyarrow.parquet  # noqa: F401 - once, before the writers are forked

    if mode == "killed":
        answer = killed(Path(path), int(count), random.Random(int(number)))
    else:
        answer = together(Path(path), int(count), int(number))
    sys.stdout.write(json.dumps(answer))


def killed(path: Path, num_rounds: int, rng: random.Random) -> dict[str, object]:
    """Numbers of the appends each writer was told were stored, by writer."""
    stored: list[list[int]] = []
    for writer in range(num_rounds):
        pid, pipe = start(path, writer, num_appends=10**6, upkeep=writer % 3 == 0)
        select.select([pipe], [], [], 10)  # it writes
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        stored.append(told(pipe))
    return {"stored": stored}


def together(path: Path, num_writers: int, num_appends: int) -> dict[str, object]:
    """As ``killed``; and how often the store was read meanwhile, and what was wrong then."""
    running = [start(path, writer, num_appends, upkeep=True) for writer in range(num_writers)]
    store = RecordStore(path)
    wrong: list[str] = []
    num_reads = 0
    before: set[tuple[str, object, object]] = set()
    pids = {pid for pid, _ in running}
    while pids:
        found, problems = store.read()
        keys = [(item.name, item.extra["m"], item.extra["n"]) for item in found]
        now = set(keys)
        wrong += problems
        wrong += ["a record was seen twice"] * (len(keys) != len(now))
        wrong += ["a record was seen and then was not"] * (not before <= now)
        before = now
        num_reads += 1
        pids -= {pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0]}
    stored = [told(pipe) for _, pipe in running]
    return {"stored": stored, "num_reads": num_reads, "wrong": wrong}


def start(path: Path, writer: int, num_appends: int, *, upkeep: bool) -> tuple[int, int]:
    """A writer: its process, and the end of a pipe on which it says what is stored."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    status = 1
    try:
        store = RecordStore(path, compact_after=4)
        for number in range(num_appends):
            store.append(batch(writer, number))
            os.write(writing, b"%d\n" % number)
            if upkeep and number % 7 == 6:
                store.compact()
        status = 0
    finally:
        os._exit(status)


def told(pipe: int) -> list[int]:
    """Every whole line of a pipe whose writer has ended."""
    with open(pipe, "rb") as file:
        return [int(line) for line in file.read().splitlines(keepends=True) if line[-1:] == b"\n"]


if __name__ == "__main__":
    main(sys.argv[1:])
