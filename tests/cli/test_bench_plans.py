"""``meshwright bench plans``: tiny instances and a planner in, gaps, an index out; and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshwright.agents import syllabus
from meshwright.agents.weights import new_policy, save_policy
from meshwright.env import frozen, traces
from meshwright.gnn_cost.pretrained_pricing import load_pricing
from meshwright.tracking import file_sha256, mirror, read_lines
from tests.cli.conftest import Answer, Run
from tests.cli.small_training import SETS, linear_of_t4, store_of_jobs, tiny_model
from tests.tracking.offline import ended_records_of, run_and_artifacts

SMALL = ("--samples", "4", "--evaluations", "12", "--processes", "1", "--json")


@pytest.fixture
def planner(tmp_path: Path) -> Path:
    """The folder of one that has learned nothing; its card tells no temperature."""
    folder = tmp_path / "planner"
    folder.mkdir()
    save_policy(new_policy(hidden=8), folder / "planner.safetensors", {})
    return folder


@pytest.fixture
def judge(
    meshwright: Run, planner: Path, instances_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """``meshwright bench plans`` with that planner on two tiny instances."""
    monkeypatch.setattr(frozen, "frozen_specs", lambda name, count: SETS["train"][:count])

    def run(*words: str | Path) -> Answer:
        return meshwright(
            *("bench", "plans", "--cache", instances_cache, "--planner", planner, *SMALL, *words)
        )

    return run


def test_the_document_holds_figures_by_way_and_a_row_for_each_instance(
    judge: Run, planner: Path, tmp_path: Path
) -> None:
    answer = judge("test-in", "-o", "judged.json")
    found = answer.document
    kept = json.loads((tmp_path / "judged.json").read_text())
    index, problems = read_lines(tmp_path / "judged.json.tracking" / "index.jsonl")
    tables = {line["name"]: line["rows"] for line in index if line["event"] == "table"}

    assert 0 == answer.status, answer.err
    assert ["tiny-mlp:16:2x2xt4", "tiny-mlp:16:1x2xt4"] == [
        row["instance"] for row in found["rows"]
    ]
    assert ("test-in", 2, 2, False) == (
        found["set_name"], found["num_asked"], found["n"], found["is_in_sample"],
    )  # fmt: skip
    assert ("planner", file_sha256(planner / "planner.safetensors")) == (
        found["planner"], found["planner_sha256"],
    )  # fmt: skip
    assert (4, 12, 1.0, "analytic") == (
        found["num_samples"], found["max_evaluations"], found["temperature"], found["cost_model"],
    )  # fmt: skip
    searched = found["overall"]["searched"]
    assert pytest.approx(sum(row["searched_gap"] for row in found["rows"]) / 2) == searched["mean"]
    assert all(row["greedy_gap"] >= row["searched_gap"] >= 0 for row in found["rows"])
    assert all(row["plan"].startswith("tp ") for row in found["rows"])
    assert {**kept, "tracking_problems": []} == found
    assert [] == problems
    assert [2, 2] == [len(tables[f"evaluation/{name}"]) for name in ("gaps", "plans")]
    assert "finished" == index[-1]["status"]


def test_tables_for_a_person_and_the_first_instance_alone(
    meshwright: Run, judge: Run, planner: Path, instances_cache: Path, tmp_path: Path
) -> None:
    """Weights by their file; nothing is written unless asked."""
    before = {path.name for path in tmp_path.iterdir()}
    answer = meshwright(
        *("bench", "plans", "--cache", instances_cache, "--instances", "1", *SMALL[:-1]),
        *("--planner", planner / "planner.safetensors"),
    )

    assert 0 == answer.status, answer.err
    assert "test-in: 1 instance planned by planner.safetensors" in answer.out
    assert "best of samples too (4)" in answer.out
    assert before == {path.name for path in tmp_path.iterdir()}


def test_jobs_of_a_trace_are_priced_as_training_on_it_prices_them(
    judge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "_model_of", tiny_model)
    store = store_of_jobs(tmp_path / "store")
    answer = judge(store, "--instances", "1", "-o", "judged.json")
    found = answer.document
    index, _ = read_lines(tmp_path / "judged.json.tracking" / "index.jsonl")
    inputs = {line["kind"] for line in index if line["event"] == "artifact" and line["is_input"]}

    assert 0 == answer.status, answer.err
    assert "measured no operator" in answer.err
    assert ("store", 1, load_pricing().sha256) == (
        found["set_name"], found["num_asked"], found["cost_model_sha256"],
    )  # fmt: skip
    assert {"dataset", "planner", "cost-model", "records"} == inputs
    assert str(tmp_path) not in (tmp_path / "judged.json").read_text()


def test_what_a_training_was_judged_by_is_told(
    meshwright: Run, judge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same jobs at the same prices, corrected by a layer that was measured there."""
    monkeypatch.setattr(traces, "_model_of", tiny_model)
    monkeypatch.setattr(traces, "_MAX_ROWS", (24,))
    monkeypatch.setattr(syllabus, "_DRAWN", 6)
    store = store_of_jobs(tmp_path / "store", *(linear_of_t4(size) for size in (1024, 4096)))
    trained = meshwright(
        *("train", "--traces", store, "-o", "p", "--cache", "cache", "--processes", "1"),
        *("--imitation", "1", "--ppo", "0", "--expert", "0", "--hidden", "8", "--envs", "32"),
    )
    card = json.loads((tmp_path / "p" / "planner.json").read_text())
    answer = judge(store, "--planner", "p", "--cache", "cache")
    found = answer.document

    assert (0, 0) == (trained.status, answer.status), trained.err + answer.err
    assert card["cost_model"]["sha256"] == found["cost_model_sha256"]
    assert load_pricing().sha256 != found["cost_model_sha256"]
    assert "instances made" not in answer.err
    assert found["is_in_sample"]
    assert 1.5 == found["temperature"]


def test_an_offline_run_of_wandb_evaluates(judge: Run, planner: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B, an extra, is not installed")
    answer = judge(
        "-o", "judged.json", "--wandb", "offline", "--project", "tests", "--group", "nightly"
    )
    (path,) = (tmp_path / "judged.json.tracking").glob("wandb/offline-run-*/run-*.wandb")
    records = ended_records_of(path)
    run, artifacts = run_and_artifacts(records)
    metrics = {one.metric.name: one.metric for one in records if one.HasField("metric")}
    logged = {
        item.key or item.nested_key[0]
        for one in records
        if one.WhichOneof("record_type") == "history"
        for item in one.history.item
    }
    planner_sha256 = file_sha256(planner / "planner.safetensors")

    assert 0 == answer.status, answer.err
    assert [] == answer.document["tracking_problems"]
    assert ("tests", "nightly", "evaluate", answer.document["run_id"]) == (
        run.project, run.run_group, run.job_type, run.run_id,
    )  # fmt: skip
    configured = {item.key: json.loads(item.value_json) for item in run.config.update}
    configured |= {
        item.key: json.loads(item.value_json)
        for one in records
        if one.WhichOneof("record_type") == "config"
        for item in one.config.update
    }
    assert planner_sha256 == configured["planner_sha256"]
    assert f"planner-{planner_sha256[:12]}" in artifacts
    evaluation = artifacts["meshwright-evaluation"]
    assert "evaluation" == evaluation.type
    assert planner_sha256 in json.loads(evaluation.metadata)["made_from"]
    assert "judged.json" in {entry.path for entry in evaluation.manifest.contents}
    assert metrics["evaluation/searched_gap_mean"].summary.min
    assert metrics["evaluation/searched_exact_share"].summary.max
    assert metrics["instance/searched_gap"].summary.mean
    assert "instance/step" == metrics["instance/searched_gap"].step_metric
    assert {"evaluation/gaps", "evaluation/plans", "instance/greedy_gap"} <= logged


def test_a_mirror_that_fails_costs_no_document(
    judge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="W&B, an extra, is not installed")

    def fails(*_: object, **__: object) -> None:
        raise OSError("the server is gone")

    monkeypatch.setattr(mirror.WandbMirror, "table", fails)
    answer = judge("--instances", "1", "-o", "judged.json", "--wandb", "offline")
    wandb.finish()  # nobody told it; the next test would go on with the same run

    assert 0 == answer.status, answer.err
    assert ["WandbMirror failed"] == [
        problem[: len("WandbMirror failed")] for problem in answer.document["tracking_problems"]
    ]
    assert 1 == json.loads((tmp_path / "judged.json").read_text())["n"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("nowhere",), "nowhere: no set and no folder; give one of train, validation"),
        (("--planner", "nowhere"), "--planner: nowhere"),
        (("--planner", "."), "planner.json: cannot be read"),
        (("--samples", "0"), "--samples: 0"),
        (("--samples", "4", "--evaluations", "5"), "give 6 or more"),
        (("--instances", "0"), "--instances: 0"),
        (("--seed", "-1"), "--seed: -1"),
        (("--cost-model", "nothing"), "nothing"),
        (("--cluster", "8xh100"), "--cluster"),
        (("-o", "nowhere/judged.json"), "-o: nowhere"),
        (("--wandb", "offline"), "--wandb"),
        ((".",), "job"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    judge: Run, words: tuple[str, ...], part: str
) -> None:
    answer = judge(*words)

    assert 1 == answer.status
    assert "" == answer.out
    assert 1 == len(answer.lines_of_error)
    assert part in answer.lines_of_error[0]
