"""A rank that is late: rank 1 sleeps before it takes part in anything timed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec
import torch.distributed as dist

from meshwright.profiling.figures import Figure
from meshwright.profiling.rank_worker import joined
from meshwright.profiling.sweeps import RankJob
from meshwright.records.kinds import Kind

DELAY_S = 0.03


def main(job_path: str) -> None:
    job = msgspec.json.decode(Path(job_path).read_bytes(), type=RankJob)
    with joined(job) as together:
        late = dist.get_rank() == 1
        measured = together.measure(lambda: time.sleep(DELAY_S if late else 0), budget_s=0.3)
        if not late:
            figure = Figure(
                kind=Kind.COLLECTIVE,
                name="all_reduce",
                unit="s",
                values=measured.timing.times_s,
                method="",
            )
            sys.stdout.write(msgspec.json.encode(figure).decode() + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
