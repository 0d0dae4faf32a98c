"""``train`` in Weights & Biases: the mirror, what its failures stop, and the sweep."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwright.agents.training import TrainingSettings
from meshwright.cli import train_job
from meshwright.cli.train import Asked
from meshwright.tracking import LocalTracker, file_sha256, mirror, opening, read_lines
from tests.cli.conftest import Run
from tests.tracking.offline import ended_records_of, run_and_artifacts

SHORT = ("--ppo", "0", "--imitation", "1")


def test_an_offline_run_of_wandb_holds_what_the_index_holds(train: Run, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B, an extra, is not installed")
    answer = train("-o", "p", "--wandb", "offline", "--project", "tests", "--group", "nightly")
    (path,) = (tmp_path / "p").glob("wandb/offline-run-*/run-*.wandb")
    records = ended_records_of(path)
    run, artifacts = run_and_artifacts(records)
    metrics = {one.metric.name: one.metric for one in records if one.HasField("metric")}
    planner = artifacts["meshwright-planner"]
    (instances,) = (one for name, one in artifacts.items() if name.startswith("instances-"))
    sha256 = file_sha256(tmp_path / "p" / "planner.safetensors")

    assert [] == answer.document["tracking_problems"]
    assert ("tests", "nightly", "train", answer.document["run_id"]) == (
        run.project, run.run_group, run.job_type, run.run_id,
    )  # fmt: skip
    assert ("dataset", "model") == (instances.type, planner.type)
    assert [json.loads(instances.metadata)["sha256"]] == json.loads(planner.metadata)["made_from"]
    assert "specs.jsonl" in [entry.path for entry in instances.manifest.contents]
    assert f"planner-{sha256[:12]}" in artifacts
    assert {"planner.safetensors", "planner.json"} <= {
        entry.path for entry in planner.manifest.contents
    }
    assert metrics["validation/greedy_gap_mean"].summary.min
    assert "validation/step" == metrics["validation/greedy_gap_mean"].step_metric


def test_a_mirror_that_fails_stops_nothing(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="W&B, an extra, is not installed")
    monkeypatch.setattr(mirror.WandbMirror, "metrics", fails)
    answer = train("-o", "p", "--wandb", "offline")
    metrics, _ = read_lines(tmp_path / "p" / "metrics.jsonl")

    assert "finished" == answer.document["status"]
    assert ["WandbMirror failed"] == [
        problem[: len("WandbMirror failed")] for problem in answer.document["tracking_problems"]
    ]
    assert {"imitation", "ppo", "validation"} == {line["group"] for line in metrics}


def fails(*_: object, **__: object) -> None:
    raise OSError("the server is gone")


class _Full:
    """A mirror on a disk that is full when it is told one thing."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> Callable[..., None]:
        def tell(*_: object, **__: object) -> None:
            if name == self._what:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return tell


@pytest.mark.parametrize("what", ["metrics", "table", "artifact", "finish"])
def test_a_disk_that_is_full_under_the_mirror_stops_nothing(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(opening, "open_mirror", lambda *_, **__: _Full(what))
    answer = train("-o", "p", *SHORT)
    index, _ = read_lines(tmp_path / "p" / "index.jsonl")
    (problem,) = answer.document["tracking_problems"]

    assert 0 == answer.status
    assert "_Full failed" in problem
    assert "No space left on device" in problem
    assert "finished" == index[-1]["status"]
    assert (tmp_path / "p" / "planner.safetensors").exists()


def test_a_disk_that_is_full_under_the_index_stops_nothing(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalTracker, "metrics", _Full("metrics").metrics)
    answer = train("-o", "p", *SHORT)

    assert 0 == answer.status
    assert ["LocalTracker failed"] == [
        problem[: len("LocalTracker failed")] for problem in answer.document["tracking_problems"]
    ]
    assert (tmp_path / "p" / "planner.safetensors").exists()


def test_a_run_of_a_sweep_has_a_folder_of_its_own(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    train("-o", "p", *SHORT)

    assert (tmp_path / "p" / "r1" / "planner.safetensors").exists()


def sweep_of_examples() -> dict[str, Any]:
    text = (Path(__file__).parents[2] / "examples" / "planner_sweep.yaml").read_text()
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def choices(parameter: dict[str, Any]) -> list[Any]:
    """What a parameter of a sweep may be: its values, or the ends of its range."""
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def test_every_command_line_of_the_sweep_is_a_training(
    meshwright: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent of W&B fills in the command; what would be trained is asked, and not done."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils", reason="W&B is not installed")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    asked: list[Asked] = []
    monkeypatch.setattr(train_job, "run_training", lambda one, out: asked.append(one))
    sweep = sweep_of_examples()
    drawn = {name: choices(parameter) for name, parameter in sweep["parameters"].items()}
    count = max(map(len, drawn.values()))
    for number in range(count):
        values = {name: {"value": some[number % len(some)]} for name, some in drawn.items()}
        words = {"${program}": [sweep["program"]]}
        words["${args}"] = utils.create_sweep_command_args({"args": values})["args"]
        command = [word for part in sweep["command"] for word in words.get(part, [part])]
        answer = meshwright(*command[1:])

        assert "meshwright" == command[0]
        assert (0, "") == (answer.status, answer.err)
    settings = [train_job._settings(one, None) for one in asked]

    assert count == len(settings)
    assert {*drawn["seed"]} == {one.seed for one in settings}
    assert {*drawn["hidden"]} == {one.hidden for one in settings}
    assert {*drawn["encoder"]} == {one.encoder for one in settings}
    assert {*drawn["learning-rate"]} == {one.ppo.learning_rate for one in settings}
    assert {*drawn["randomization"]} == {one.randomization for one in settings}
    assert {*drawn["imitation"]} == {one.imitation_iterations for one in settings}
    assert 2 == len({one.ppo.baseline for one in settings})


def test_the_sweep_judges_by_what_a_training_tells_often_enough(train: Run, tmp_path: Path) -> None:
    """Hyperband counts the lines of the metric; a whole training has one a validation."""
    sweep = sweep_of_examples()
    train("-o", "p", *SHORT)
    metrics, _ = read_lines(tmp_path / "p" / "metrics.jsonl")
    told = {f"{line['group']}/{name}" for line in metrics for name in line}
    usual = TrainingSettings()
    fewest = usual.ppo_iterations // usual.validate_every

    assert sweep["metric"]["name"] in told
    assert "minimize" == sweep["metric"]["goal"]
    assert sweep["early_terminate"]["min_iter"] <= fewest
