"""Plan a module that knows nothing of Meshwright: any module that returns a scalar loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import meshwright
from meshwright.report import mesh_words, shard_words


class Branches(nn.Module):
    """Two branches, a skip connection, a tied output, a dictionary as input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(512, 64)
        self.left = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.right = nn.Linear(64, 64)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.table(batch["tokens"])
        x = x + self.left(x) * torch.sigmoid(self.right(x))
        logits = x @ self.table.weight.t()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        return {"loss": loss, "logits": logits}


with torch.device("meta"):  # planning needs shapes, not memory
    model = Branches()
    batch = {name: torch.empty(32, 16, dtype=torch.int64) for name in ("tokens", "targets")}

plan = meshwright.plan(
    model, (batch,), cluster="cpu:4", job=meshwright.JobSpec(global_batch=32), level="O1"
)
print(mesh_words(plan))
for segment in plan.segments:
    print(f"{segment.name or 'the rest'}: {shard_words(plan, segment)}")
