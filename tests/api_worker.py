"""One of two processes of ``test_api``: trains, and writes what it found."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright

GLOBAL_BATCH = 8


class TiedWithBuffer(nn.Module):
    """A tied table, a buffer, a skip connection, several outputs; keyword inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.inner = nn.Linear(16, 64)
        self.outer = nn.Linear(64, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.full((16,), 0.5))

    def forward(self, *, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(tokens) * self.scale
        x = x + self.outer(F.gelu(self.inner(x)))
        logits = self.head(x)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits


def make() -> tuple[TiedWithBuffer, dict[str, Tensor]]:
    """The model in fp64 and its batch, alike in every process."""
    torch.manual_seed(0)
    model = TiedWithBuffer().double()
    tokens = torch.randint(32, (GLOBAL_BATCH, 6))
    return model, {"tokens": tokens, "targets": tokens.roll(1, dims=1)}


def main(folder: Path) -> None:
    """Three steps of the plan in ``folder``."""
    model, batch = make()
    plan = meshwright.read_plan(folder / "plan.json")
    with meshwright.parallelize(model, plan, batch) as parallel:
        losses = [float(parallel.step(batch)) for _ in range(3)]
        state = parallel.state_dict()
        shapes = [list(parameter.shape) for parameter in parallel.parameters()]
    rank = os.environ["RANK"]
    torch.save(state, folder / f"state-{rank}.pt")
    (folder / f"found-{rank}.json").write_text(json.dumps({"losses": losses, "shapes": shapes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
