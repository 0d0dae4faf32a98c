"""``plan --wandb`` and ``run --wandb``: what was made of what, beside the plan and the report."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from meshwright.cli import run
from meshwright.plans import plan_sha256, read_plan
from meshwright.records import StepReport
from meshwright.tracking import file_sha256, opening, read_lines
from tests.cli.conftest import Run
from tests.cli.made_reports import report_with
from tests.tracking.offline import ended_records_of

WORDS = ("plan", "tiny-mlp", "--cluster", "cpu:2", "--global-batch", "16", "--json")


def test_a_tracked_plan_names_itself_and_its_search(meshwright: Run, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B, an extra, is not installed")
    answer = meshwright(*WORDS, "-o", "plan.json", "--wandb", "offline")
    index, problems = read_lines(tmp_path / "plan.json.tracking" / "index.jsonl")
    artifacts = {line["name"]: line for line in index if line["event"] == "artifact"}
    (summary,) = (line["values"] for line in index if line["event"] == "summary")
    sha256 = plan_sha256(read_plan(tmp_path / "plan.json"))
    (file,) = artifacts["meshwright-plan"]["files"]

    assert 0 == answer.status, answer.err
    assert [] == problems
    assert file_sha256(tmp_path / "plan.json") == file["sha256"]
    assert {"meshwright-plan", f"plan-{sha256[:12]}"} == {*artifacts}
    assert not artifacts[f"plan-{sha256[:12]}"]["is_input"]
    assert answer.document["predicted"]["step_time_s"] == summary["step_time_s"]
    assert "finished" == index[-1]["status"]
    assert 1 == len([*tmp_path.glob("plan.json.tracking/wandb/offline-run-*/run-*.wandb")])


def test_a_plan_that_is_not_kept_is_not_tracked(meshwright: Run, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B, an extra, is not installed")
    answer = meshwright(*WORDS, "--wandb", "offline")

    assert 1 == answer.status
    assert "write it with -o" in answer.err
    assert [] == list(tmp_path.iterdir())


def test_a_plan_is_not_tracked_unless_asked(meshwright: Run, tmp_path: Path) -> None:
    meshwright(*WORDS, "-o", "plan.json")

    assert ["plan.json"] == [path.name for path in tmp_path.iterdir()]
    assert "" == json.loads((tmp_path / "plan.json").read_text())["provenance"].get("planner", "")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a run would start give a report at once."""

    def report_of(plan: str, **_: object) -> StepReport:
        return report_with(None, plan_sha256=plan_sha256(read_plan(plan)))

    monkeypatch.setattr(import_module("meshwright.runtime.launch"), "launch", report_of)


def mirrored(folder: Path) -> list[Any]:
    """What W&B keeps of the one run that was tracked in ``folder``."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return ended_records_of(path)


def artifacts_in(records: list[Any]) -> dict[str, Any]:
    found = [one.artifact for one in records if one.WhichOneof("record_type") == "artifact"]
    return {one.name: one for one in found}


@pytest.mark.usefixtures("launched")
def test_a_run_of_a_plan_is_joined_to_it_in_wandb(meshwright: Run, tmp_path: Path) -> None:
    """Both log one marker: equal in name and content, it is one artifact to a server."""
    pytest.importorskip("wandb", reason="W&B, an extra, is not installed")
    meshwright(*WORDS, "-o", "plan.json", "--wandb", "offline")
    words = ("--wandb", "offline", "--project", "tests", "--group", "nightly")
    answer = meshwright("run", "plan.json", "--store", "kept", "--json", *words)
    (folder,) = (tmp_path / "kept").glob("report-*.tracking")
    index, problems = read_lines(folder / "index.jsonl")
    told = [line for line in index if line["event"] == "artifact"]
    planned, measured = mirrored(tmp_path / "plan.json.tracking"), mirrored(folder)
    run = next(one.run for one in measured if one.WhichOneof("record_type") == "run")
    sha256 = plan_sha256(read_plan(tmp_path / "plan.json"))
    marker = f"plan-{sha256[:12]}"

    assert 0 == answer.status, answer.err
    assert [] == problems
    assert [(marker, True), ("meshwright-run", False)] == [
        (line["name"], line["is_input"]) for line in told
    ]
    assert [sha256] == told[1]["made_from"]
    (report,) = (tmp_path / "kept").glob("report-*.json")
    assert [file_sha256(report)] == [file["sha256"] for file in told[1]["files"]]
    assert ("tests", "nightly", "run") == (run.project, run.run_group, run.job_type)
    assert {marker, "meshwright-run"} == {*artifacts_in(measured)}
    assert artifacts_in(planned)[marker].digest == artifacts_in(measured)[marker].digest
    assert report.name in [
        entry.path for entry in artifacts_in(measured)["meshwright-run"].manifest.contents
    ]


@pytest.mark.usefixtures("launched")
def test_a_run_is_not_tracked_unless_asked(meshwright: Run, plan_file: Path) -> None:
    answer = meshwright("run", plan_file, "--store", "kept")

    assert 0 == answer.status, answer.err
    assert [] == [*Path("kept").glob("*.tracking")]


@pytest.mark.usefixtures("launched")
def test_the_index_of_a_run_has_its_figures(
    meshwright: Run, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mirror is out of order, which is said and stops nothing."""
    monkeypatch.setattr(opening, "open_mirror", lambda *_, **__: object())
    monkeypatch.setattr(run, "require_wandb", lambda _: None)
    answer = meshwright("run", plan_file, "--store", "kept", "--wandb", "offline", "--json")
    (folder,) = Path("kept").glob("*.tracking")
    index, _ = read_lines(folder / "index.jsonl")
    told = {line["event"]: line["values"] for line in index if "values" in line}

    assert 0 == answer.status, answer.err
    assert "object failed and is off" in answer.err
    assert (2.0, 1.0, 8) == tuple(
        told["summary"][name] for name in ("step_time_s", "samples_per_s", "peak_memory_bytes")
    )
    assert "fp32" == told["config"]["precision"]
