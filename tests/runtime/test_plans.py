"""Plans of built-in models: validated here, and one run by torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshwright.errors import PlanRefused
from meshwright.plans.io import write_plan
from meshwright.plans.plan import Mesh, Recompute, ScheduleName
from meshwright.runtime.checks import draws_random
from meshwright.runtime.job import open_plan
from meshwright.runtime.launch import launch
from meshwright.spmd.program import Compute
from tests.runtime.plans_for_tests import run_dry, uniform_plan, verified

_DRAWING = {"aten.native_dropout.default", "aten.bernoulli.p"}


@pytest.mark.parametrize(
    ("model", "mesh", "options"),
    [
        ("tiny-mlp", Mesh(dp_replicate=2, dp_shard=2), {"zero_stage": 2, "num_microbatches": 2}),
        ("tiny-mlp", Mesh(tp=4), {}),
        (
            "tiny-gpt?num_layers=2",
            Mesh(pp=2, dp_shard=2, tp=2),
            {"zero_stage": 3, "num_microbatches": 2},
        ),
        (
            "tiny-llama?num_layers=1",
            Mesh(dp_shard=2),
            {"zero_stage": 1, "recompute": Recompute.FULL},
        ),
        (
            "tiny-bert?num_layers=2",
            Mesh(pp=3),
            {"num_microbatches": 4, "schedule": ScheduleName.GPIPE},
        ),
    ],
)
def test_virtual_ranks_equal_one_device(model: str, mesh: Mesh, options: dict) -> None:
    """In fp64, after three AdamW steps; and the dry run's collectives are the program's."""
    plan = uniform_plan(model, mesh, **options)

    assert verified(plan).within(1e-10)
    assert mesh.pp == len(run_dry(plan))


def test_a_dropout_is_drawn_once_and_kept_under_full_recompute() -> None:
    """One layer draws after the embedding, in the attention and after both halves."""
    plan = uniform_plan(
        "tiny-gpt?dropout=0.1&num_layers=1",
        Mesh(dp_shard=2),
        zero_stage=3,
        recompute=Recompute.FULL,
    )
    (program,) = open_plan(plan).programs()
    drawn = {
        name: sum(
            isinstance(item, Compute) and item.target in _DRAWING
            for item in getattr(program, name).body
        )
        for name in ("prologue", "forward", "backward_final")
    }

    assert {"prologue": 0, "forward": 4, "backward_final": 0} == drawn
    assert 1 == len(run_dry(plan))


def test_a_dropout_that_tensor_parallelism_would_cut_is_refused() -> None:
    plan = uniform_plan("tiny-gpt?dropout=0.1&num_layers=1", Mesh(tp=2))

    with pytest.raises(PlanRefused, match=r"draws random numbers and would be cut along tp"):
        open_plan(plan).programs()


def test_an_axis_that_cuts_nothing_is_refused() -> None:
    """Heads are 4 and all other dims powers of 2: none divides by 3."""
    plan = uniform_plan("tiny-gpt?num_layers=1", Mesh(tp=3))

    with pytest.raises(PlanRefused, match=r"^\$\.mesh\.tp is 3 but no operator is cut along it"):
        open_plan(plan).programs()


@pytest.mark.parametrize(("dropout", "expected"), [("0.1", True), ("0.0", False)])
def test_random_operators_are_recognized(dropout: str, expected: bool) -> None:
    plan = uniform_plan(f"tiny-bert?dropout={dropout}&num_layers=1", Mesh())
    (program,) = open_plan(plan).programs()

    assert expected == draws_random(program)


@pytest.mark.dist
@pytest.mark.slow
def test_a_plan_runs_under_torchrun(tmp_path: Path) -> None:
    """ZeRO 3 over two processes with two micro-batches, compared with one process."""
    plan = uniform_plan("tiny-mlp", Mesh(dp_shard=2), zero_stage=3, num_microbatches=2)
    path = tmp_path / "plan.json"
    write_plan(plan, path)
    lines: list[str] = []
    report = launch(path, warmup=1, repeats=3, verify_steps=3, on_line=lines.append)

    assert report.verified is not None
    assert report.verified.within(1e-10)
    assert 3 == report.step_time.num_repeats
    assert [0, 1] == [memory.rank for memory in report.memory]
    elements = plan.model.num_parameters
    assert elements * 8 // 2 <= report.memory[0].parameter_bytes <= elements * 8 // 2 + 1024
    assert 2 * report.memory[0].parameter_bytes == report.memory[0].optimizer_bytes
    assert report.losses[-1] < report.losses[0]
