"""``plan --wandb``: what was planned with what, in the index beside the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshwright.plans import plan_sha256, read_plan
from meshwright.tracking import file_sha256, read_lines
from tests.cli.conftest import Run

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
