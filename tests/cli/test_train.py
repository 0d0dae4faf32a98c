"""``meshwright train``: tiny instances in, a planner, its card and an index out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshwright.agents import syllabus
from meshwright.agents.weights import load_policy
from meshwright.env.models import ModelSpec
from meshwright.plans.plan import Precision
from meshwright.tracking import file_sha256, read_lines
from tests.cli.conftest import Run


def test_a_planner_has_weights_a_card_and_an_index(train: Run, tmp_path: Path) -> None:
    answer = train("-o", "p", "--seed", "3")
    policy, card = load_policy(tmp_path / "p" / "planner.safetensors")
    index, problems = read_lines(tmp_path / "p" / "index.jsonl")
    metrics, _ = read_lines(tmp_path / "p" / "metrics.jsonl")
    tables = {line["name"]: line for line in index if line["event"] == "table"}

    assert 0 == answer.status, answer.err
    assert "finished" == answer.document["status"] == index[-1]["status"] == card["status"]
    assert (2, 1) == (answer.document["num_instances"], answer.document["num_validation"])
    assert 8 == policy.settings.hidden
    assert {"imitation", "ppo", "validation"} == {line["group"] for line in metrics}
    assert [] == problems
    assert ["tiny-mlp:32:1x2xt4"] == [row[0] for row in tables["validation/gaps"]["rows"]]
    assert "tp " in tables["validation/plans"]["rows"][0][2]
    assert "meshwright train --seed 3 --instances 2 --imitation 2" in str(card["reproduce"])
    assert str(tmp_path) not in (tmp_path / "p" / "planner.json").read_text()


def test_plan_asks_a_trained_planner_and_says_so_in_the_plan(
    train: Run, meshwright: Run, tmp_path: Path
) -> None:
    train("-o", "p")
    words = ("plan", "tiny-mlp", "--cluster", "4xt4", "--global-batch", "32", "--json")
    with_it = meshwright(*words, "--planner", "p").document
    without = meshwright(*words).document
    searched = {one["name"]: one for one in with_it["search"]["solvers"]}

    assert searched["policy"]["evaluations"] >= 1
    assert searched["policy"]["best_s"] > 0
    sha256 = file_sha256(tmp_path / "p" / "planner.safetensors")
    assert sha256[:12] == with_it["plan"]["provenance"]["planner"]
    assert "" == without["plan"]["provenance"]["planner"]
    assert "policy" not in [one["name"] for one in without["search"]["solvers"]]
    assert with_it["predicted"]["step_time_s"] <= without["predicted"]["step_time_s"] * 1.005


def test_equal_seeds_give_equal_bits_and_a_run_goes_on(train: Run, tmp_path: Path) -> None:
    """A budget that is spent at once ends the run at its first kept weights."""
    train("-o", "whole")
    cut = train("-o", "half", "--budget", "1ms")
    again = train("-o", "half")
    rest = train("-o", "half", "--resume")
    other = train("-o", "half", "--resume", "--seed", "9")

    assert "budget" == cut.document["status"]
    assert 1 == again.status
    assert "--resume" in again.err
    assert cut.document["run_id"] == rest.document["run_id"]
    assert "finished" == rest.document["status"]
    assert (tmp_path / "whole" / "planner.safetensors").read_bytes() == (
        tmp_path / "half" / "planner.safetensors"
    ).read_bytes()
    assert 1 == other.status
    assert "other settings" in other.err


def test_a_planner_is_fitted_to_one_cluster(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what it could do before; the card names where it started."""
    models = tuple(
        ModelSpec(reference="tiny-mlp", global_batch=b, precision=Precision.BF16) for b in (16, 32)
    )
    monkeypatch.setattr(syllabus, "models_of", lambda split: models)
    train("-o", "p")
    answer = train("-o", "q", "--init", "p", "--finetune", "2x2xt4", "--imitation", "1")
    card = json.loads((tmp_path / "q" / "planner.json").read_text())

    assert 0 == answer.status, answer.err
    assert answer.document["before"]["greedy_gap_mean"] >= 0
    assert file_sha256(tmp_path / "p" / "planner.safetensors") == card["started_from"]
    assert "cluster" == card["instances"]["name"]
