"""Bad input: one line that says what to do, the right status, nothing executed or overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Answer, Run

DATA_DEPENDENT = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x).sum()
        return y if y > 0 else -y

    def example_inputs(self, batch_size, seq_len):
        return torch.zeros(batch_size, 4)

def broken():
    raise RuntimeError("first\\nsecond")
"""


def assert_refused(answer: Answer, *parts: str, status: int = 1) -> None:
    """One line on stderr beside progress, which says all of ``parts``; nothing on stdout."""
    assert status == answer.status, answer.err
    assert "" == answer.out
    assert 1 == len(answer.lines_of_error), answer.err
    assert "Traceback" not in answer.err
    assert [] == [part for part in parts if part not in answer.lines_of_error[0]], answer.err


def plan_words(model: str = "tiny-gpt", cluster: str = "cpu:4", batch: str = "16") -> list[str]:
    return ["plan", model, "--cluster", cluster, "--global-batch", batch]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (plan_words(model="tiny-gptt"), ("tiny-gptt", "did you mean tiny-gpt")),
        (plan_words(model="tiny-gpt?num_layers=none"), ("num_layers", "whole number")),
        (plan_words(model="tiny-gpt?layers=2"), ("layers", "num_layers")),
        (plan_words(model="no_such_module:f"), ("no_such_module",)),
        (plan_words(model="./nowhere"), ("nowhere", "config.json")),
        (plan_words(cluster="8xh1000"), ("h1000", "did you mean h100")),
        (plan_words(cluster="0xh100"), ("1 to",)),
        (plan_words(cluster="nowhere.toml"), ("nowhere.toml",)),
        (plan_words(batch="0"), ("--global-batch", "at least 1")),
        (plan_words(batch="-4"), ("--global-batch", "at least 1")),
        (plan_words(batch="9223372036854775808"), ("--global-batch", "give less")),
        (plan_words(model="sys:exit"), ("sys:exit", "standard library")),
        ([*plan_words(), "--seq-len", "0"], ("--seq-len", "at least 1")),
        ([*plan_words(), "--seq-len", "100000"], ("sequence length 100000",)),
        ([*plan_words(model="tiny-mlp"), "--seq-len", "8"], ("no sequence length",)),
        ([*plan_words(), "--top", "0"], ("--top",)),
        ([*plan_words(), "--seed", "-1"], ("--seed",)),
        ([*plan_words(), "--budget", "soon"], ("--budget", "10s")),
        ([*plan_words(), "--budget", "0s"], ("--budget", "above zero")),
        ([*plan_words(), "-O7"], ("-O1", "-O2")),
        ([*plan_words(), "-o", "no/such/folder/plan.json"], ("no/such/folder/plan.json",)),
        (["validate", "nowhere.json"], ("nowhere.json",)),
        (["explain", "nowhere.json"], ("nowhere.json",)),
        (["run", "nowhere.json"], ("nowhere.json",)),
        (["run", "nowhere.json", "--steps", "0"], ("--steps",)),
        (["models", "gpt5"], ("gpt5",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_in_one_line(meshwright: Run, words: list[str], parts: tuple[str, ...]) -> None:
    assert_refused(meshwright(*words), *parts)


def test_a_model_that_fits_nowhere_is_status_2(meshwright: Run, tmp_path: Path) -> None:
    cluster = tmp_path / "small.toml"
    cluster.write_text("[[hosts]]\ndevice = 't4'\nnum_devices = 2\n")
    answer = meshwright(*plan_words(model="llama3-8b?num_layers=8", cluster=str(cluster)))

    assert_refused(answer, "nothing fits", "use more or larger devices", status=2)


def test_malformed_cluster_file(meshwright: Run, tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text("[[hosts]]\ndevice = 'h100'\nnum_gpus = 8\n")

    assert_refused(meshwright(*plan_words(cluster=str(path))), "cluster.toml", "num_gpus")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda plan: plan.update(surprise=1), ("$.surprise", "unknown key")),
        (lambda plan: plan.pop("mesh"), ("$.mesh", "missing")),
        (lambda plan: plan["mesh"].update(tp="two"), ("$.mesh.tp",)),
        (lambda plan: plan["mesh"].update(tp=0), ("$.mesh.tp",)),
        (lambda plan: plan.update(schema_version=99), ("schema_version", "99")),
        (lambda plan: plan.update(num_microbatches=5), ("$.job.global_batch", "divisible")),
    ],
)
@pytest.mark.parametrize("verb", ["validate", "explain", "run"])
def test_malformed_plan_file(
    meshwright: Run, plan_file: Path, verb: str, change: Any, parts: tuple[str, ...]
) -> None:
    plan = json.loads(plan_file.read_text())
    change(plan)
    plan_file.write_text(json.dumps(plan))
    answer = meshwright(verb, plan_file)

    assert 1 == answer.status
    assert 1 == len(answer.lines_of_error)
    assert [] == [part for part in parts if part not in answer.lines_of_error[0]]


@pytest.mark.parametrize("verb", ["validate", "run"])
def test_a_plan_the_runtime_cannot_carry(meshwright: Run, plan_file: Path, verb: str) -> None:
    plan = json.loads(plan_file.read_text())
    plan["communication"]["pipeline"] = "int8"
    plan["communication"]["tensor_parallel"] = "bf16"
    plan_file.write_text(json.dumps(plan))
    answer = meshwright(verb, plan_file)

    assert 1 == answer.status
    assert 1 == len(answer.lines_of_error)
    assert "$.communication.tensor_parallel: the runtime" in answer.lines_of_error[0]
    assert "(and 1 more)" in answer.lines_of_error[0]


def test_plan_of_another_program(meshwright: Run, plan_file: Path) -> None:
    plan = json.loads(plan_file.read_text())
    plan["model"]["reference"] = "tiny-mlp?hidden=48"
    plan_file.write_text(json.dumps(plan))
    answer = meshwright("validate", plan_file)

    assert 1 == answer.status
    assert "another program" in answer.lines_of_error[0]


def test_a_module_torch_cannot_export(meshwright: Run, tmp_path: Path) -> None:
    (tmp_path / "branching_model.py").write_text(DATA_DEPENDENT)

    assert_refused(
        meshwright(*plan_words(model="branching_model:Model")),
        "branching_model.py:12",
        "torch.where",
    )
    assert_refused(meshwright(*plan_words(model="branching_model:broken")), "first second")


def test_nothing_is_overwritten_when_planning_fails(meshwright: Run, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("precious")
    answer = meshwright(*plan_words(model="nosuch"), "-o", path)

    assert 1 == answer.status
    assert "precious" == path.read_text()


def test_a_plan_for_gpus_is_not_run_where_there_are_none(
    meshwright: Run, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshwright.cli.run.detect_gpus", lambda: ())
    plan = json.loads(plan_file.read_text())
    plan["cluster"] = "4xh100"
    plan_file.write_text(json.dumps(plan))

    assert_refused(meshwright("run", plan_file), "4 devices of 4xh100", "this machine has 0 GPUs")


def test_a_plan_file_calls_nothing_of_the_standard_library(
    meshwright: Run, plan_file: Path, tmp_path: Path
) -> None:
    raw = json.loads(plan_file.read_text())
    raw["model"]["reference"] = f"subprocess:getoutput?cmd=touch {tmp_path}/made"
    plan_file.write_text(json.dumps(raw))
    answer = meshwright("explain", plan_file)

    assert_refused(answer, "standard library")
    assert not (tmp_path / "made").exists()


def test_a_model_that_exits_is_a_user_error(meshwright: Run, tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("def make():\n    raise SystemExit(0)\n")

    assert_refused(meshwright(*plan_words(model="leaves:make")), "SystemExit")
