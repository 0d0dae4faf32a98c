"""One rank of a small loop under gloo: computes, all-reduces, and writes when it did what.

    python -m tests.profiling.traces.gloo_loop RANK WORLD_SIZE FOLDER ITERATIONS LATE_RANK LATE_FROM EVERY

Rank LATE_RANK sleeps 20 ms longer in every EVERY-th iteration from LATE_FROM on.
"""  # noqa: E501

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = ["COMPUTE_S", "DELAY_S"]

COMPUTE_S = 0.015
DELAY_S = 0.020


def main(arguments: list[str]) -> None:
    rank, world_size, iterations, late_rank, late_from, every = map(
        int, (*arguments[:2], *arguments[3:])
    )
    folder = Path(arguments[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    gradient = torch.ones(1024)
    lines = ["rank,iteration,compute_s,wait_s"]
    dist.all_reduce(gradient)
    dist.barrier()
    for iteration in range(iterations):
        is_late = rank == late_rank and iteration >= late_from
        begin_s = time.perf_counter()
        time.sleep(COMPUTE_S)
        if is_late and (iteration - late_from) % every == 0:
            time.sleep(DELAY_S)
        computed_s = time.perf_counter()
        dist.all_reduce(gradient)
        end_s = time.perf_counter()
        lines.append(f"{rank},{iteration},{computed_s - begin_s},{end_s - computed_s}")
    (folder / f"rank{rank}.csv").write_text("\n".join(lines) + "\n", encoding="ascii")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
