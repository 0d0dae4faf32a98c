"""``plan``, ``explain`` and ``validate`` on models small enough for seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshwright.cli import validate as validate_verb
from meshwright.cli.options import parse_duration_s, parse_level
from meshwright.plans import read_plan
from meshwright.solvers.rules import RULES
from tests.cli.conftest import Run

OWN_MODEL = """
import torch
from torch import nn
from torch.nn import functional as F

print("a model that prints")

class Model(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, batch):
        x = F.gelu(self.first(batch["x"]))
        x = x + self.second(x)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits, batch["y"]), "logits": logits}

    def example_inputs(self, batch_size, seq_len):
        x = torch.randn(batch_size, 8)
        return ({"x": x, "y": torch.arange(batch_size) % 4},)
"""

PREDICTED_KEYS = {
    "step_time_s",
    "step_time_interval_s",
    "peak_memory_bytes",
    "memory_capacity_bytes",
    "fits",
    "tokens_per_s",
    "mfu",
    "breakdown",
}
SEARCH_KEYS = {
    "seconds",
    "evaluations",
    "level",
    "lower_bound_s",
    "gap",
    "proven_optimal",
    "is_complete",
    "solvers",
}
SOLVER_KEYS = {"name", "seconds", "evaluations", "status", "best_s", "bound_s"}


def test_plan_json_has_the_promised_shape(meshwright: Run, tmp_path: Path) -> None:
    words = ["plan", "tiny-mlp", "--cluster", "cpu:4", "--global-batch", "16", "--seed", "7"]
    answer = meshwright(*words, "-O1", "--top", "3", "-o", "plan.json", "--json")
    found = answer.document

    assert 0 == answer.status
    assert {"plan", "predicted", "search", "alternatives"} == set(found)
    assert PREDICTED_KEYS <= set(found["predicted"])
    assert SEARCH_KEYS <= set(found["search"])
    assert "O1" == found["search"]["level"]
    assert found["predicted"]["fits"]
    search = found["search"]
    best_s = found["predicted"]["step_time_s"]
    assert best_s / search["lower_bound_s"] - 1 == pytest.approx(search["gap"])
    assert search["is_complete"]
    assert [] == [one for one in search["solvers"] if not set(one) >= SOLVER_KEYS]
    assert search["evaluations"] == sum(one["evaluations"] for one in search["solvers"])
    assert "exhaustive" in {one["name"] for one in search["solvers"]}
    total_s = sum(found["predicted"]["breakdown"].values())
    assert found["predicted"]["step_time_s"] == pytest.approx(total_s)
    assert [] == [item for item in found["alternatives"] if not item["reason"]]
    assert found["plan"] == json.loads((tmp_path / "plan.json").read_text())
    assert 7 == read_plan(tmp_path / "plan.json").provenance.seed


def test_plan_shows_the_best_plans_and_why(meshwright: Run) -> None:
    words = ["plan", "tiny-mlp", "--cluster", "cpu:4", "--global-batch", "16"]
    answer = meshwright(*words)

    assert 0 == answer.status
    assert "1 was chosen: " in answer.out
    assert "time of a step" in answer.out
    assert "memory of the fullest device" in answer.out
    assert "data-parallel" in answer.out


def test_plan_says_how_far_from_the_best_it_can_be(meshwright: Run) -> None:
    words = ["plan", "tiny-gpt", "--cluster", "4xh100", "--global-batch", "16", "--top", "1"]
    whole = meshwright(*words)
    cut = meshwright(*words, "-O2", "--budget", "1ms")

    assert "No plan is faster than " in whole.out
    assert "cut short" not in whole.out
    assert "The search was cut short (" in cut.out
    assert "more --budget" in cut.out


def test_plan_by_a_rule_of_thumb(meshwright: Run) -> None:
    words = ["plan", "tiny-mlp", "--cluster", "cpu:4", "--global-batch", "16"]
    found = meshwright(*words, "--rule", "zero3", "--json").document
    unknown = meshwright(*words, "--rule", "best")
    help_text = meshwright("plan", "--help").out

    assert "zero3" == found["plan"]["provenance"]["solver"]
    assert [] == found["alternatives"]
    assert 1 == unknown.status
    assert "no rule 'best'" in unknown.lines_of_error[0]
    assert [] == [rule.name for rule in RULES if rule.name not in help_text]


def test_plan_respects_annotations(meshwright: Run, tmp_path: Path) -> None:
    head = "self.head = nn.Linear(width, 4)"
    text = OWN_MODEL.replace(head, f'{head}; annotate(self, recompute="full")')
    text = f"from meshwright import annotate{text}"
    (tmp_path / "own_model_annotated.py").write_text(text)
    words = ["plan", "own_model_annotated:Model", "--cluster", "cpu:2", "--global-batch", "8"]
    plan = meshwright(*words, "--fix", "dp=2", "--json").document["plan"]

    assert ["*:recompute=full", "dp=2"] == plan["provenance"]["pins"]
    assert {"full"} == {segment["recompute"] for segment in plan["segments"]}


def test_explain_plans_with_what_the_plan_was_made_with(meshwright: Run, tmp_path: Path) -> None:
    """A plan that cannot run yet, pinned and allowed."""
    words = ["plan", "tiny-gpt", "--cluster", "4xh100", "--global-batch", "16"]
    pins = ["--fix", "pp=2", "--fix", "schedule=zb-h1"]
    refused = meshwright(*words, *pins)
    made = meshwright(*words, *pins, "--allow-unrunnable", "-o", "zb.json")
    found = meshwright("explain", "zb.json", "--json")

    assert 2 == refused.status
    assert "with --fix schedule=zb-h1 a plan cannot run yet" in refused.lines_of_error[0]
    assert "--allow-unrunnable" in refused.lines_of_error[0]
    assert 0 == made.status
    assert read_plan(tmp_path / "zb.json").provenance.allow_unrunnable
    assert 0 == found.status
    assert found.document["is_still_best"]


def test_a_model_of_ones_own_that_prints_leaves_the_document_alone(
    meshwright: Run, tmp_path: Path
) -> None:
    (tmp_path / "own_model_that_prints.py").write_text(OWN_MODEL)
    words = ["plan", "own_model_that_prints:Model", "--cluster", "cpu:2", "--global-batch", "8"]
    answer = meshwright(*words, "-o", "plan.json", "--json")

    assert 0 == answer.status
    assert "own_model_that_prints:Model" == answer.document["plan"]["model"]["reference"]
    assert "a model that prints" in answer.err
    assert meshwright("validate", "plan.json", "--json").document["valid"]


def test_explain_gives_reasons_and_sensitivity(meshwright: Run, plan_file: Path) -> None:
    found = meshwright("explain", plan_file, "--json").document
    plan = read_plan(plan_file)

    assert found["is_still_best"]
    assert found["reason"]
    assert len(plan.segments) == len(found["segments"])
    assert found["predicted"]["step_time_s"] == pytest.approx(plan.prediction.step_time_s)  # type: ignore[union-attr]
    effects = {item["change"]: item for item in found["sensitivity"]}
    slower = effects["links inside hosts half as fast"]["step_time_s"]
    faster = effects["devices twice as fast at arithmetic"]["step_time_s"]
    assert faster <= found["predicted"]["step_time_s"] <= slower
    half = effects["memory of devices half as large"]["memory_capacity_bytes"]
    assert half == pytest.approx(found["predicted"]["memory_capacity_bytes"] / 2, rel=0.01)


def test_fp8_is_planned_where_it_need_not_run(meshwright: Run, tmp_path: Path) -> None:
    words = ("plan", "tiny-gpt", "--global-batch", "8", "--precision", "fp8")

    lacking = meshwright(*words, "--cluster", "4xa100")
    refused = meshwright(*words, "--cluster", "4xh100")
    meshwright(*words, "--cluster", "4xh100", "--allow-unrunnable", "-o", "fp8.json")
    explained = meshwright("explain", "fp8.json").out

    assert 0 not in (lacking.status, refused.status)
    (line,) = lacking.lines_of_error
    assert "has no units for it; use bf16, or one of rtx-4090" in line
    assert "--allow-unrunnable" in refused.lines_of_error[0]
    assert "fp8" == read_plan(tmp_path / "fp8.json").job.precision
    assert "Cannot run yet: $.job.precision: the runtime does not train in fp8." in explained
    assert "Memory, learned: in 99% of configurations" in explained


def test_explain_in_words(meshwright: Run, plan_file: Path) -> None:
    out = meshwright("explain", plan_file).out

    assert "Why: " in out
    assert "why not" in out
    assert "links inside hosts half as fast" in out


def test_explain_of_a_plan_that_is_not_the_best_says_so(meshwright: Run, plan_file: Path) -> None:
    plan = json.loads(plan_file.read_text())
    for segment in plan["segments"]:
        segment["recompute"] = "full"
    plan_file.write_text(json.dumps(plan))
    found = meshwright("explain", plan_file, "--json").document

    assert not found["is_still_best"]
    assert found["alternatives"][0]["reason"].startswith("would be chosen now")


def test_validate_says_what_was_checked(meshwright: Run, plan_file: Path) -> None:
    answer = meshwright("validate", plan_file, "--json")
    found = answer.document
    checks = {check["name"]: check["status"] for check in found["checks"]}

    assert 0 == answer.status
    assert found["valid"]
    assert {
        "plan file": "passed",
        "model and cluster": "passed",
        "memory": "passed",
        "lowering": "passed",
        "communication": "passed",
        "numerics": "passed",
        "dry run": "passed",
    } == checks
    assert found["verified"]["gradients"] <= 1e-10


def test_validate_says_what_was_skipped_and_why(
    meshwright: Run, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate_verb, "VIRTUAL_FLOP_LIMIT", 10)
    found = meshwright("validate", plan_file, "--json").document
    (numerics,) = [check for check in found["checks"] if check["name"] == "numerics"]

    assert "skipped" == numerics["status"]
    assert "the limit is 1e+01" in numerics["detail"]


def test_validate_refuses_what_does_not_fit_with_status_2(
    meshwright: Run, plan_file: Path, tmp_path: Path
) -> None:
    device = "{ name = 'cpu', memory_bytes = 1000, memory_bytes_per_s = 1e10, "
    device += "flop_per_s = { float32 = 1e10 }, launch_latency_s = 1e-6 }"
    link = "{ name = 'wire', bytes_per_s = 1e9, latency_s = 1e-5 }"
    text = f"[[hosts]]\ndevice = {device}\nnum_devices = 4\nlink = {link}\n"
    (tmp_path / "tiny.toml").write_text(text)
    plan = json.loads(plan_file.read_text())
    plan["cluster"] = str(tmp_path / "tiny.toml")
    plan_file.write_text(json.dumps(plan))
    answer = meshwright("validate", plan_file, "--json")

    assert 2 == answer.status
    assert not answer.document["valid"]
    assert "1000 B" in answer.lines_of_error[0]


def test_validate_refuses_wrong_numbers(
    meshwright: Run, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate_verb, "MAX_DIFFERENCE", -1.0)
    answer = meshwright("validate", plan_file)

    assert 1 == answer.status
    assert "virtual ranks differ from one device" in answer.lines_of_error[0]


def test_validate_refuses_a_cluster_that_is_too_small(meshwright: Run, plan_file: Path) -> None:
    plan = json.loads(plan_file.read_text())
    plan["cluster"] = "cpu:2"
    plan_file.write_text(json.dumps(plan))
    answer = meshwright("validate", plan_file)

    assert 1 == answer.status
    assert "the cluster has 2 devices" in answer.lines_of_error[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(10.0, "10s"), (0.5, "500ms"), (120.0, "2min"), (7.5, "7.5"), (3600.0, "1h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert seconds == parse_duration_s(text)


@pytest.mark.parametrize("text", ["1", "O1", "o1"])
def test_levels(text: str) -> None:
    assert "O1" == parse_level(text)
