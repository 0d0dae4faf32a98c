"""``run`` and ``demo``, with real processes."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from meshwright.cli import demo as demo_verb
from meshwright.cli.run import check_verified, keep_report
from meshwright.errors import PlanRefused
from meshwright.plans import JobSpec, plan_sha256, read_plan
from meshwright.records import RecordStore, StepReport, Verified, read_step_report
from tests.cli.conftest import Run
from tests.cli.made_reports import report_with


@pytest.mark.dist
def test_run_measures_verifies_and_stores(meshwright: Run, plan_file: Path, tmp_path: Path) -> None:
    answer = meshwright("run", plan_file, "--steps", "3", "--verify", "--store", "kept", "--json")

    assert 0 == answer.status, answer.err
    assert {"loss", "gradients", "parameters"} == set(answer.document["verified"])
    assert answer.document["verified"]["gradients"] <= 1e-5
    assert 3 == answer.document["step_time"]["num_repeats"]
    assert read_plan(plan_file).mesh.num_devices == len(answer.document["memory"])
    assert plan_sha256(read_plan(plan_file)) == answer.document["plan_sha256"]
    (report,) = (tmp_path / "kept").glob("report-*.json")
    assert answer.document == json.loads(report.read_text())
    records, problems = RecordStore(tmp_path / "kept").read()
    assert [] == problems
    assert "step_time" in {record.kind for record in records}


@pytest.mark.dist
@pytest.mark.slow
def test_a_model_that_fails_in_its_workers_is_one_line(meshwright: Run, tmp_path: Path) -> None:
    (tmp_path / "fails_for_real.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n"
        "    layer = nn.Linear(4, 1)\n"
        "    if layer.weight.device.type != 'meta':\n"
        "        raise RuntimeError('no values today')\n"
        "    class Model(nn.Module):\n"
        "        def __init__(self):\n"
        "            super().__init__()\n"
        "            self.layer = layer\n"
        "        def forward(self, x):\n"
        "            return self.layer(x).mean()\n"
        "    return Model(), lambda batch, _: torch.zeros(batch, 4)\n"
    )
    planned = meshwright(
        *("plan", "fails_for_real:make", "--cluster", "cpu:2", "--global-batch", "4"),
        *("-o", "plan.json"),
    )
    answer = meshwright("run", "plan.json", "--store", "kept")

    assert 0 == planned.status, planned.err
    assert 1 == answer.status
    assert 1 == len(answer.lines_of_error)
    assert "Traceback" not in answer.err
    assert "no values today" in answer.lines_of_error[0]
    assert not (tmp_path / "kept").exists()


def test_reports_of_one_second_do_not_replace_one_another(tmp_path: Path) -> None:
    report = report_with(None)
    first, second = keep_report(report, tmp_path), keep_report(report, tmp_path)

    assert first != second
    assert report == read_step_report(first) == read_step_report(second)


@pytest.mark.parametrize(
    ("verified", "precision"),
    [
        (None, "fp32"),
        (Verified(loss=1e-7, gradients=9e-6, parameters=9e-6), "fp32"),
        (Verified(loss=0.0, gradients=9e-11, parameters=9e-11), "fp64"),
        (Verified(loss=0.01, gradients=0.1, parameters=0.1), "bf16"),
    ],
)
def test_rounding_passes(verified: Verified | None, precision: str) -> None:
    check_verified(report_with(verified, precision=precision))

    assert precision in ("fp32", "fp64", "bf16")


@pytest.mark.parametrize(
    ("verified", "precision"),
    [
        (Verified(loss=1e-4, gradients=0.0, parameters=0.0), "fp32"),
        (Verified(loss=0.0, gradients=2e-5, parameters=0.0), "fp32"),
        (Verified(loss=0.0, gradients=0.0, parameters=2e-4), "fp32"),
        (Verified(loss=0.0, gradients=None, parameters=0.0), "fp32"),
        (Verified(loss=0.0, gradients=0.0, parameters=1e-9), "fp64"),
    ],
)
def test_more_than_rounding_is_refused(verified: Verified, precision: str) -> None:
    with pytest.raises(PlanRefused, match="differs from one process"):
        check_verified(report_with(verified, precision=precision))


@pytest.mark.dist
@pytest.mark.slow
def test_demo_goes_all_the_way(
    meshwright: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one small model, two processes and a small model at the other end."""
    example = demo_verb._Example(
        title="A little model", name="little", reference="tiny-mlp", global_batch=16
    )
    monkeypatch.setattr(demo_verb, "_EXAMPLES", (example,))
    monkeypatch.setattr(demo_verb, "CLUSTER", "cpu:2")
    monkeypatch.setattr(demo_verb, "_STEPS", 3)
    monkeypatch.setattr(demo_verb, "LARGE_MODEL", "tiny-gpt")
    monkeypatch.setattr(demo_verb, "LARGE_CLUSTER", "8xh100")
    monkeypatch.setattr(demo_verb, "LARGE_JOB", JobSpec(global_batch=8))
    answer = meshwright("demo", "--json")

    assert 0 == answer.status, answer.err
    (model,) = answer.document["models"]
    assert "the chosen plan" == model["runs"][0]["title"]
    reports = [msgspec.convert(run["report"], StepReport) for run in model["runs"]]
    assert [] == [report for report in reports if report.verified is None]
    summary = (tmp_path / "demo" / "README.md").read_text()
    assert "## A little model" in summary
    assert "## tiny-gpt on 8xh100" in summary
    assert read_plan(tmp_path / "demo" / "little-chosen.plan.json").model.reference == "tiny-mlp"
    records, problems = RecordStore(tmp_path / "demo" / "records").read()
    assert [] == problems
    assert len(reports) == len([record for record in records if record.kind == "step_time"])
