"""``meshwright train``: tiny instances in, a planner, its card and an index out; and refusals."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwright.agents import syllabus
from meshwright.agents.weights import load_policy
from meshwright.env import traces
from meshwright.env.clusters import ClusterPart, ClusterSpec
from meshwright.env.generator import InstanceSpec
from meshwright.env.models import ModelSpec
from meshwright.gnn_cost.pretrained_pricing import load_pricing
from meshwright.plans.plan import OptimizerName, Precision
from meshwright.tracking import file_sha256, mirror, read_lines
from tests.cli.conftest import Answer, Run
from tests.tracking.offline import records_of

SMALL = (
    *("--imitation", "2", "--ppo", "2", "--expert", "0", "--validate-every", "1"),
    *("--envs", "32", "--hidden", "8", "--instances", "2", "--processes", "1", "--json"),
)


def spec_of(model: str, hosts: int, batch: int = 16) -> InstanceSpec:
    parts = (ClusterPart(num_hosts=hosts, devices_per_host=2, device="t4"),)
    return InstanceSpec(
        model=ModelSpec(reference=model, global_batch=batch, precision=Precision.BF16),
        cluster=ClusterSpec(parts=parts),
        optimizer=OptimizerName.ADAMW,
        max_rows=24,
        max_plans=64,
    )


SETS = {
    "train": (spec_of("tiny-mlp", 2), spec_of("tiny-mlp", 1)),
    "validation": (spec_of("tiny-mlp", 1, batch=32),),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(meshwright: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``meshwright train`` on three tiny instances."""
    monkeypatch.setattr(syllabus, "_of_frozen", lambda name, count: SETS[name][:count])

    def run(*words: str | Path) -> Answer:
        return meshwright("train", "--cache", cache, *SMALL, *words)

    return run


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


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--traces", "nowhere"), "--traces: nowhere"),
        (("--traces", ".", "--finetune", "8xh100"), "give one of them"),
        (("--cluster", "8xh100"), "--cluster"),
        (("--instances", "0"), "--instances: 0"),
        (("--learning-rate", "-1"), "--learning-rate"),
        (("--init", "nowhere"), "nowhere"),
        (("--imitation", "0", "--ppo", "0", "--expert", "0"), "nothing to do"),
        (("--envs", "33"), "--envs: 33"),
        (("--finetune", "8xnothing"), "nothing"),
        (("--budget", "soon"), "soon"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    train: Run, words: tuple[str, ...], part: str
) -> None:
    answer = train("-o", "p", *words)

    assert 1 == answer.status
    assert 1 == len(answer.lines_of_error)
    assert part in answer.lines_of_error[0]


def test_jobs_of_a_trace_are_learned_on_with_prices_of_its_records(
    meshwright: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny models stand for those a trace would name; no operator was measured there."""
    monkeypatch.setattr(traces, "_model_of", tiny_model)
    table = tmp_path / "jobs.csv"
    rows = [f"{n},{100 + n},{2 + 2 * (n % 2)},t4,gpt" for n in range(8)]
    table.write_text("\n".join(["job_id,duration_s,gpus,gpu_type,model", *rows]), encoding="utf-8")
    imported = meshwright("traces", "import", table, "--store", "store")
    answer = meshwright(
        *("train", "--cache", cache, *SMALL, "-o", "p", "--traces", "store"),
        *("--cost-model", "learned", "--imitation", "1", "--ppo", "0"),
    )
    card = json.loads((tmp_path / "p" / "planner.json").read_text())
    index, _ = read_lines(tmp_path / "p" / "index.jsonl")
    inputs = {line["kind"] for line in index if line["event"] == "artifact" and line["is_input"]}

    assert 0 == imported.status, imported.err
    assert 0 == answer.status, answer.err
    assert "measured no operator" in answer.err
    assert "traces" == card["instances"]["name"]
    assert load_pricing().sha256 == card["cost_model"]["sha256"]
    assert {"dataset", "records", "cost-model"} == inputs


def tiny_model(family: str, number: int) -> ModelSpec:
    del family
    batch = 16 << number % 2
    return ModelSpec(reference="tiny-mlp", global_batch=batch, precision=Precision.BF16)


def test_an_offline_run_of_wandb_holds_what_the_index_holds(train: Run, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B, an extra, is not installed")
    answer = train("-o", "p", "--wandb", "offline", "--project", "tests", "--group", "nightly")
    (path,) = (tmp_path / "p").glob("wandb/offline-run-*/run-*.wandb")
    records = ended(path)
    run = next(one.run for one in records if one.WhichOneof("record_type") == "run")
    artifacts = {
        one.artifact.name: one.artifact
        for one in records
        if one.WhichOneof("record_type") == "artifact"
    }
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
    assert f"planner-{sha256[:12]}" in artifacts
    assert {"planner.safetensors", "planner.json"} <= {
        entry.path for entry in planner.manifest.contents
    }
    assert metrics["validation/greedy_gap_mean"].summary.min
    assert "validation/step" == metrics["validation/greedy_gap_mean"].step_metric


def ended(path: Path) -> list[Any]:
    """Records of a run that has ended; the service of W&B may still be writing the last."""
    for _ in range(100):
        records = records_of(path)
        if "exit" in [record.WhichOneof("record_type") for record in records]:
            return records
        time.sleep(0.1)
    raise AssertionError("the run has no end")


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


def test_a_run_of_a_sweep_has_a_folder_of_its_own(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    train("-o", "p", "--ppo", "0", "--imitation", "1")

    assert (tmp_path / "p" / "r1" / "planner.safetensors").exists()


def test_the_sweep_that_comes_along_sets_options_there_are(meshwright: Run) -> None:
    text = (Path(__file__).parents[2] / "examples" / "planner_sweep.yaml").read_text()
    sweep = yaml.safe_load(text)
    answer = meshwright("train", "--help")
    fixed = [word.split("=")[0] for word in sweep["command"] if word.startswith("--")]

    assert "meshwright" == sweep["program"]
    assert "best_gap" == sweep["metric"]["name"]
    assert [] == [
        option
        for option in (*fixed, *(f"--{name}" for name in sweep["parameters"]))
        if f"{option} " not in answer.out
    ]
