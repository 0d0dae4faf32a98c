"""What instances of a training are priced with: data sheets, learned prices, what a trace says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshwright.agents import syllabus
from meshwright.env import traces
from meshwright.gnn_cost.pretrained_pricing import load_pricing
from meshwright.tracking import read_lines
from tests.cli.conftest import Answer, Run
from tests.cli.small_training import (
    SMALL,
    all_reduce_of_t4,
    linear_of_t4,
    slowest_by_name,
    store_of_jobs,
    tiny_model,
)

SHORT = ("--imitation", "1", "--ppo", "0", "--cache", "cache")
SIZES = (512, 1024, 2048, 4096, 8192)


def card_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "planner.json").read_text())
    return found


def test_prices_stand_on_the_card_and_make_other_instances(train: Run, tmp_path: Path) -> None:
    sheets = train("-o", "sheets", *SHORT)
    learned = train("-o", "learned", *SHORT, "--cost-model", "learned")
    cards = {name: card_of(tmp_path / name) for name in ("sheets", "learned")}

    assert (0, 0) == (sheets.status, learned.status), learned.err
    assert {"name": "analytic", "sha256": ""} == cards["sheets"]["cost_model"]
    assert {"name": load_pricing().label, "sha256": load_pricing().sha256} == cards["learned"][
        "cost_model"
    ]
    assert "--cost-model" not in cards["sheets"]["reproduce"]
    assert "--cost-model learned" in cards["learned"]["reproduce"]
    assert [2, 2, 2] == [len(times) for times in slowest_by_name(tmp_path / "cache").values()]


@pytest.fixture
def trained_on(meshwright: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``meshwright train --traces`` on tiny models that stand for those a trace would name."""
    monkeypatch.setattr(traces, "_model_of", tiny_model)
    monkeypatch.setattr(traces, "_MAX_ROWS", (24,))
    monkeypatch.setattr(traces, "_MAX_PLANS", 64)

    def run(store: Path, folder: str, *words: str) -> Answer:
        return meshwright(
            *("train", *SMALL, "--instances", "8", *SHORT),
            *("--traces", store, "-o", folder, *words),
        )

    return run


def test_jobs_of_a_trace_have_prices_learned_elsewhere_where_it_measured_none(
    trained_on: Run, tmp_path: Path
) -> None:
    answer = trained_on(store_of_jobs(tmp_path / "store"), "p")
    card = card_of(tmp_path / "p")
    index, _ = read_lines(tmp_path / "p" / "index.jsonl")
    inputs = {line["kind"] for line in index if line["event"] == "artifact" and line["is_input"]}
    said = [line for line in answer.err.splitlines() if "prices" in line]

    assert 0 == answer.status, answer.err
    assert ["the store measured no operator or collective; prices are as learned elsewhere"] == said
    assert "traces" == card["instances"]["name"]
    assert load_pricing().sha256 == card["cost_model"]["sha256"]
    assert {"dataset", "records", "cost-model"} == inputs


def test_operators_and_collectives_of_a_trace_correct_the_prices_of_its_jobs(
    trained_on: Run, tmp_path: Path
) -> None:
    """Both were measured much slower than is learned, so every plan takes longer."""
    slow = [linear_of_t4(size) for size in SIZES]
    slow += [all_reduce_of_t4(size << 12) for size in SIZES]
    bare, rich = store_of_jobs(tmp_path / "bare"), store_of_jobs(tmp_path / "rich", *slow)
    trained_on(bare, "p")
    before = slowest_by_name(tmp_path / "cache")
    answer = trained_on(rich, "q", "--cluster", "2x2xt4")
    after = slowest_by_name(tmp_path / "cache")
    calibration = json.loads(
        (tmp_path / "q" / "cost-model" / "calibrations" / "t4.json").read_text()
    )
    again = trained_on(rich, "q", "--cluster", "2x2xt4", "--resume")
    prices = card_of(tmp_path / "q")["cost_model"]

    assert 0 == answer.status, answer.err
    assert "prices of t4 are corrected by 10 measurements" in answer.err
    assert {"operators", "collectives"} <= {
        name for name, value in calibration["offsets"].items() if value > 0.1
    }
    assert {*before} == {*after}
    assert [] == [name for name in after if max(after[name]) <= 1.1 * max(before[name])]
    assert load_pricing(tmp_path / "q" / "cost-model").sha256 == prices["sha256"]
    assert load_pricing().sha256 != prices["sha256"]
    assert "finished" == again.document["status"], again.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "not used: collectives in records: of which cluster is not told; give --cluster"),
        (("--cost-model", "analytic"), "what the store measured changes no price"),
    ],
)
def test_what_is_not_used_of_a_trace_is_said(
    trained_on: Run, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    answer = trained_on(store_of_jobs(tmp_path / "store", all_reduce_of_t4(2**20)), "p", *words)

    assert 0 == answer.status, answer.err
    assert said in answer.err


@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "a100-sxm-80gb")])
def test_what_was_measured_on_other_devices_changes_no_price(
    trained_on: Run, tmp_path: Path, devices: tuple[str, ...]
) -> None:
    """Of CPUs nothing is learned; of T4, which the jobs run on, nothing was measured."""
    others = [msgspec.structs.replace(linear_of_t4(512), device=name) for name in devices]
    trained_on(store_of_jobs(tmp_path / "bare"), "p")
    answer = trained_on(store_of_jobs(tmp_path / "rich", *others), "q")

    assert 0 == answer.status, answer.err
    assert "not used: 1 operators: device not in the catalog" in answer.err
    assert "nothing was measured on t4; its prices are as learned elsewhere" in answer.err
    assert {1} == {len(times) for times in slowest_by_name(tmp_path / "cache").values()}


def test_learned_prices_of_cpus_are_data_sheets(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``plan`` has it: of CPUs nothing was learned."""
    models = [tiny_model("", number) for number in range(2)]
    monkeypatch.setattr(syllabus, "models_of", lambda split: models)
    train("-o", "p", *SHORT)
    answer = train("-o", "q", *SHORT, "--init", "p", "--finetune", "cpu:4")

    assert 0 == answer.status, answer.err
    assert "analytic" == card_of(tmp_path / "q")["cost_model"]["name"]


def test_a_planner_is_fitted_to_a_cluster_by_the_prices_it_is_planned_with(
    train: Run, meshwright: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [tiny_model("", number) for number in range(2)]
    monkeypatch.setattr(syllabus, "models_of", lambda split: models)
    train("-o", "p", *SHORT)
    answer = train("-o", "q", *SHORT, "--init", "p", "--finetune", "2x2xt4")
    sheets = train(
        *("-o", "r", *SHORT, "--init", "p", "--finetune", "2x2xt4"), "--cost-model", "analytic"
    )
    words = ("plan", "tiny-mlp", "--cluster", "2x2xt4", "--global-batch", "16", "--json")
    plan = meshwright(*words).document["plan"]
    prices = card_of(tmp_path / "q")["cost_model"]

    assert (0, 0) == (answer.status, sheets.status), answer.err
    assert plan["provenance"]["cost_model"] == prices["name"]
    assert load_pricing().sha256 == prices["sha256"]
    assert "analytic" == card_of(tmp_path / "r")["cost_model"]["name"]
