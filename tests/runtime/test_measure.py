"""Measuring one rank, in this process, on a group of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.capture.captured import capture
from meshwright.plans.plan import OptimizerSpec, ScheduleName
from meshwright.runtime.measure import measure_memory, measure_steps
from meshwright.runtime.session import RankSession
from meshwright.runtime.verify import source_of
from tests.runtime.single import LAYOUT, single_program


class Chain(nn.Module):
    """Three products of 64 x 64 with a sigmoid after each, whose result is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sigmoid(layer(x))
        return x.sum()


@pytest.fixture
def session(tmp_path: Path) -> Iterator[tuple[RankSession, dict[str, Tensor]]]:
    model, x = Chain(), torch.randn(256, 64)
    captured = capture(model, (x,))
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        made = RankSession(
            single_program(captured.graph),
            LAYOUT,
            source_of(model, captured.constants),
            rank=0,
            schedule=ScheduleName.GPIPE,
            num_microbatches=1,
            optimizer=OptimizerSpec(),
            device=torch.device("cpu"),
        )
        yield made, captured.flatten_data((x,))
    finally:
        dist.destroy_process_group()


def test_memory_by_cause(session: tuple[RankSession, dict[str, Tensor]]) -> None:
    """Parameters, gradients, two moments, exactly; at the fullest moment 3 results of 256 x 64.

    A product and its sigmoid are alive together once two earlier results are kept; the backward
    frees as it goes and holds no more than that.
    """
    made, data = session
    one_weight, one_result = 64 * 64 * 4, 256 * 64 * 4
    made.step(data)
    memory = measure_memory(made, data)

    assert 3 * one_weight == memory.parameter_bytes
    assert 3 * one_weight == memory.gradient_bytes
    assert 6 * one_weight == memory.optimizer_bytes
    assert 3 * one_result <= memory.activation_bytes + memory.gradient_bytes
    assert memory.activation_bytes + memory.gradient_bytes <= 5 * one_result + 3 * one_weight


def test_steps_are_timed_and_losses_kept(session: tuple[RankSession, dict[str, Tensor]]) -> None:
    made, data = session
    measured = measure_steps(made, data, warmup=1, repeats=4)

    assert 4 == measured.timing.num_repeats
    assert 5 == len(measured.losses)
    assert measured.losses[-1] < measured.losses[0]
