"""``plan`` and ``parallelize`` from Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

import meshwright
from meshwright.capture.references import resolve_model
from meshwright.cluster import parse_cluster
from meshwright.errors import BadModel, BadRequest, NoFeasiblePlan
from meshwright.plans import JobSpec, Mesh, ParallelPlan, Precision, Stage, write_plan
from tests.api_worker import GLOBAL_BATCH, make

JOB = JobSpec(global_batch=GLOBAL_BATCH, precision=Precision.FP64)


def planned(num_devices: int = 2) -> ParallelPlan:
    model, batch = make()
    return meshwright.plan(model, batch, cluster=f"cpu:{num_devices}", job=JOB)


def test_public_names_are_there_without_torch() -> None:
    program = (
        "import sys, meshwright\n"
        "from meshwright import JobSpec, Precision, read_plan\n"
        "assert JobSpec(global_batch=1).precision is Precision.FP32\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert 0 == result.returncode, result.stderr
    assert callable(meshwright.plan)
    assert callable(meshwright.parallelize)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = meshwright.nonsense  # type: ignore[attr-defined]


def test_plan_of_a_module_names_it_and_fits() -> None:
    plan = planned()

    assert "tests.api_worker:TiedWithBuffer" == plan.model.reference
    assert 32 * 16 + 2 * 16 * 64 + 64 + 16 == plan.model.num_parameters
    assert "cpu:2" == plan.cluster
    assert plan.prediction is not None
    assert plan.prediction.fits


def test_real_and_meta_modules_and_any_form_of_inputs_give_one_plan() -> None:
    model, batch = make()
    with torch.device("meta"):
        light = type(model)()
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in batch.items()}
    first = meshwright.plan(model, batch, cluster="cpu:2", job=JOB)
    second = meshwright.plan(light, ((), shapes), cluster=parse_cluster("cpu:2"), job=JOB)

    assert first.model.graph_sha256 == second.model.graph_sha256
    assert first.mesh == second.mesh


def test_annotations_hold_and_are_written_down() -> None:
    source = resolve_model("tiny-gpt")
    args, kwargs = source.example_inputs(GLOBAL_BATCH, None, "meta", dtype=torch.float64)
    model = source.build(torch.float64)
    attention = model.get_submodule("layers.1.attention")
    assert attention is meshwright.annotate(attention, tp="heads", recompute="full")
    plan = meshwright.plan(model, (args, kwargs), cluster="2xh100", job=JOB, fix=["tp=2"])
    own = [segment for segment in plan.segments if segment.recompute == "full"]

    pins = ["layers.1.attention:tp=heads", "layers.1.attention:recompute=full", "tp=2"]
    assert pins == plan.provenance.pins
    assert ["layers.1.attention"] == [segment.name for segment in own]
    assert ["heads"] == own[0].shard["tp"]


def test_annotations_nobody_can_read_are_refused_at_once() -> None:
    model, _ = make()
    with pytest.raises(BadRequest, match="cannot pin 'color' for a module"):
        meshwright.annotate(model.inner, color="red")
    with pytest.raises(BadRequest, match="'maybe' is not one of none, selective, full"):
        meshwright.annotate(model.inner, recompute="maybe")


def test_a_rule_of_thumb_is_asked_by_name() -> None:
    model, batch = make()
    plan = meshwright.plan(model, batch, cluster="cpu:2", job=JOB, rule="zero3")

    assert "zero3" == plan.provenance.solver
    assert 2 == plan.mesh.dp_shard


def test_inputs_of_another_batch_are_refused() -> None:
    model, batch = make()
    with pytest.raises(BadRequest, match=r"batch of 8 but .* 64"):
        meshwright.plan(model, batch, cluster="cpu:2", job=JobSpec(global_batch=64))


def test_inputs_of_another_type_are_refused() -> None:
    model, _ = make()
    with pytest.raises(BadRequest, match="inputs are list"):
        meshwright.plan(model, [torch.zeros(8)], cluster="cpu:2", job=JOB)  # type: ignore[arg-type]


def test_nothing_fits() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 2**16), nn.Linear(2**16, 2**19), nn.Flatten(0), Mean())
        batch = torch.empty(4, 8)
    with pytest.raises(NoFeasiblePlan, match="nothing fits 1 device"):
        meshwright.plan(model, (batch,), cluster="t4", job=JobSpec(global_batch=4))


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean()


def test_parallelize_outside_torchrun_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    model, batch = make()
    with pytest.raises(BadRequest, match="torchrun"):
        meshwright.parallelize(model, planned(), batch, device="cpu")


def test_parallelize_needs_values() -> None:
    with torch.device("meta"):
        model = make()[0].to("meta")
    with pytest.raises(BadModel, match="on meta"):
        meshwright.parallelize(model, planned(), make()[1])


def split(plan: ParallelPlan, kind: str) -> ParallelPlan:
    """The same job as data parallel with ZeRO 3, or tensor parallel, over two devices."""
    shard = {"dp_shard": ["batch"]} if kind == "zero" else {"tp": ["vocab", "inner"]}
    known = {
        "stages": [
            Stage(
                first_segment=0,
                last_segment=plan.model.num_segments - 1,
                first_device=0,
                num_devices=2,
            )
        ],
        "mesh": Mesh(dp_shard=2) if kind == "zero" else Mesh(tp=2),
        "num_microbatches": 1,
        "segments": [
            msgspec.structs.replace(
                segment, shard=shard, zero_stage=3 if kind == "zero" else 0, recompute="none"
            )
            for segment in plan.segments
        ],
        "prediction": None,
    }
    return msgspec.structs.replace(plan, **known)


@pytest.mark.dist
@pytest.mark.parametrize(
    "kind", [pytest.param("zero"), pytest.param("tensor", marks=pytest.mark.slow)]
)
def test_two_processes_train_as_one(tmp_path: Path, kind: str) -> None:
    write_plan(split(planned(), kind), tmp_path / "plan.json")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "tests.api_worker", str(tmp_path)),
    ]
    result = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == result.returncode, result.stderr

    model, batch = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses = []
    for _ in range(3):
        loss, _ = model(**batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for rank in range(2):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        state = torch.load(tmp_path / f"state-{rank}.pt", weights_only=True)

        assert found["losses"] == pytest.approx(losses, rel=1e-10)
        assert [list(p.shape) for p in model.parameters()] == found["shapes"]
        assert set(model.state_dict()) == set(state)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-8, atol=1e-10)
