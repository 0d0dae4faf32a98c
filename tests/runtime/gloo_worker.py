"""A process of the gloo test: runs the handwritten program and saves what it holds."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from meshwright.plans.plan import ScheduleName
from meshwright.runtime.session import RankSession
from tests.runtime import handwritten


def main(store: str, rank: int, dp: int, tp: int, num_microbatches: int) -> None:
    layout = handwritten.layout(dp, tp)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{store}/store", layout.num_ranks),
        rank=rank,
        world_size=layout.num_ranks,
    )
    stage, _ = layout.locate(rank)
    session = RankSession(
        handwritten.two_stages(dp, tp, num_microbatches)[stage],
        layout,
        handwritten.parameters().__getitem__,
        rank=rank,
        schedule=ScheduleName.ONE_F_ONE_B,
        num_microbatches=num_microbatches,
        optimizer=handwritten.OPTIMIZER,
        device=torch.device("cpu"),
    )
    batch = session.local_batch(handwritten.data())
    losses, gradients = [], {}
    for step in range(3):
        result = session.step(batch, keep_gradients=step == 0)
        losses.append(result.loss)
        gradients = dict(result.gradients) or gradients
    held = {slot.name: session.state.optimized(slot.name) for slot in session.program.parameters}
    torch.save(
        {"losses": losses, "gradients": gradients, "parameters": held}, f"{store}/rank{rank}.pt"
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *(int(arg) for arg in sys.argv[2:]))
