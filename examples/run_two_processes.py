"""Train one's own module as two processes and compare with one.

Started plainly it starts itself again under torchrun, as two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import Tensor, nn

import meshwright


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 10))

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.layers(image), label)


def train() -> None:
    torch.manual_seed(0)  # alike in every process
    model = Classifier()
    batch = (torch.randn(16, 32), torch.randint(10, (16,)))
    job = meshwright.JobSpec(global_batch=16)
    plan = meshwright.plan(model, batch, cluster="cpu:2", job=job, fix=["dp=2"])
    with meshwright.parallelize(model, plan, batch) as parallel:
        losses = [float(parallel.step(batch)) for _ in range(3)]
        state = parallel.state_dict()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for loss in losses:
        expected = model(*batch)
        assert abs(expected.item() - loss) < 1e-5, (expected, loss)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-4, atol=1e-5)
    if os.environ["RANK"] == "0":
        print(f"losses {losses}: as with one process")


if __name__ == "__main__":
    if "RANK" in os.environ:
        train()
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        sys.exit(subprocess.run([sys.executable, *launcher], env=environment).returncode)
