"""The handwritten program on real gloo processes equals plain PyTorch, in fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meshwright.runtime.state import assemble_parameter
from tests.runtime import handwritten

ROOT = Path(__file__).parents[2]


@pytest.mark.dist
@pytest.mark.parametrize(("dp", "tp", "num_microbatches"), [(1, 1, 2), (2, 1, 3)])
def test_three_steps_equal_plain_pytorch(
    dp: int, tp: int, num_microbatches: int, tmp_path: Path
) -> None:
    layout = handwritten.layout(dp, tp)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.gloo_worker"]
            + [str(arg) for arg in (tmp_path, rank, dp, tp, num_microbatches)],
            cwd=ROOT,
            env=environment,
        )
        for rank in range(layout.num_ranks)
    ]
    try:
        codes = [worker.wait(timeout=100) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [0] * layout.num_ranks == codes

    saved = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(layout.num_ranks)]
    losses, gradients, parameters = handwritten.reference(3)
    per_stage = layout.num_ranks_per_stage
    for one in saved[per_stage:]:
        torch.testing.assert_close(losses, one["losses"], rtol=1e-12, atol=0)
    for stage, program in enumerate(handwritten.two_stages(dp, tp, num_microbatches)):
        ranks = saved[stage * per_stage : (stage + 1) * per_stage]
        for slot in program.parameters:
            for what, expected in (("gradients", gradients), ("parameters", parameters)):
                pieces = [one[what][slot.name] for one in ranks]
                found = assemble_parameter(slot, zip(layout.coordinates, pieces, strict=True))
                torch.testing.assert_close(expected[slot.name], found, rtol=1e-12, atol=1e-14)
