"""Plans of built-in models: validated here, and one run by torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshwright.errors import PlanRefused
from meshwright.plans.io import write_plan
from meshwright.plans.plan import Mesh, Recompute, ScheduleName
from meshwright.runtime.launch import launch
from meshwright.runtime.validate import validate_plan
from tests.runtime.plans_for_tests import uniform_plan


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
    found = validate_plan(uniform_plan(model, mesh, **options))

    assert found.verified is not None
    assert found.verified.within(1e-10)
    assert {0, mesh.num_devices - 1} <= {run.rank for run in found.dry_runs}


def test_too_large_a_model_is_only_run_dry() -> None:
    found = validate_plan(uniform_plan("tiny-mlp", Mesh(dp_shard=2)), virtual_flop_limit=10)

    assert found.verified is None
    assert 2 == len(found.dry_runs)


def test_recomputing_a_dropout_is_refused() -> None:
    plan = uniform_plan("tiny-gpt?dropout=0.1&num_layers=1", Mesh(), recompute=Recompute.FULL)

    with pytest.raises(PlanRefused, match="draws random numbers and is recomputed"):
        validate_plan(plan)


def test_random_numbers_leave_nothing_to_compare() -> None:
    """Masks of one device are drawn in another order; the dry run still passes."""
    found = validate_plan(uniform_plan("tiny-gpt?dropout=0.1&num_layers=1", Mesh()))

    assert found.verified is None
    assert 1 == len(found.dry_runs)


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
