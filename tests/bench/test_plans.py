"""A planner judged on instances with known optima: toys by hand, figures, the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.agents.planner import PRETRAINED, PolicyDecider, planner_file
from meshwright.agents.weights import new_policy
from meshwright.bench.metrics import mean_interval
from meshwright.bench.plans import GapFigures, JudgedPlanner, judge_planner
from meshwright.bench.plans_report import PlansReport, Told, is_in_sample
from meshwright.env.decode import in_words
from meshwright.env.instance import Instance
from meshwright.env.toys import random_instance, toy_instances, toys
from meshwright.errors import BadRequest
from meshwright.strict_json import JsonValue
from meshwright.tracking import LocalTracker, read_lines

TOLD = Told(
    set_name="toys",
    set_sha256="5e7" * 20,
    num_asked=4,
    planner="pretrained",
    planner_sha256="9a" * 32,
    is_in_sample=False,
    cost_model="analytic",
    cost_model_sha256="",
)


@pytest.fixture(scope="module")
def decider() -> PolicyDecider:
    """It has learned nothing."""
    return PolicyDecider(new_policy(hidden=8, seed=0), temperature=1.5)


@pytest.fixture(scope="module")
def judged(decider: PolicyDecider) -> JudgedPlanner:
    return judge_planner(decider, toy_instances(), num_samples=48, max_evaluations=64)


def test_the_optimum_of_each_toy_is_found_and_its_rule_takes_twice_as_long(
    judged: JudgedPlanner,
) -> None:
    """Rules take 4, 2 and 2 s, the best plans 2, 1 and 1 s; no toy has more than 12 plans."""
    best = [in_words(instance, placed) for instance, placed in toys()]

    assert [2.0, 1.0, 1.0] == [one.optimum_s for one in judged.instances]
    assert [1.0, 1.0, 1.0] == judged.gaps("rule").tolist()
    assert [0.0, 0.0, 0.0] == judged.gaps("searched").tolist()
    assert best == [one.best_plan for one in judged.instances]
    assert best == [one.plan for one in judged.instances]


def test_a_plan_in_words_names_row_groups_and_cut() -> None:
    instance, placed = toys()[0]

    assert (
        "tp 1, cp 1, ep 1, pp 2, dp 1, dp_shard 1, zero_stage 0, num_microbatches 4, 1f1b; "
        "tensor/none; memory"
    ) == in_words(instance, placed)


def test_each_way_is_as_good_as_the_one_before_and_equal_seeds_agree(
    decider: PolicyDecider,
) -> None:
    rng = np.random.default_rng(0)
    strangers = [random_instance(rng, num_groups=1 + number % 3) for number in range(6)]
    one, again = (
        judge_planner(decider, strangers, num_samples=8, max_evaluations=20, seed=3)
        for _ in range(2)
    )
    greedy, sampled, searched = (one.gaps(way) for way in ("greedy", "sampled", "searched"))

    assert 6 == len(one.instances)
    assert bool((greedy >= sampled).all() and (sampled >= searched).all())
    assert bool((searched >= 0).all())
    assert greedy.mean() > searched.mean()
    assert max(judged.evaluations for judged in one.instances) <= 20
    assert one.instances == again.instances


@pytest.mark.parametrize(
    ("num_samples", "max_evaluations", "instances", "part"),
    [
        (0, 64, toy_instances(), "--samples: 0"),
        (8, 9, toy_instances(), "give 10 or more"),
        (8, 64, (), "none is worth anything"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    decider: PolicyDecider,
    num_samples: int,
    max_evaluations: int,
    instances: tuple[Instance, ...],
    part: str,
) -> None:
    with pytest.raises(BadRequest, match=part):
        judge_planner(decider, instances, num_samples=num_samples, max_evaluations=max_evaluations)


def test_figures_of_four_gaps() -> None:
    figures = GapFigures.of(np.array([0.0, 1e-9, 0.1, 0.3]))

    assert 4 == figures.n
    assert pytest.approx(0.1) == figures.mean
    assert (0.1, 0.3, 0.5) == (figures.p95, figures.worst, figures.exact_share)
    assert figures.mean_interval is not None
    assert 0.0 <= figures.mean_interval[0] < 0.1 < figures.mean_interval[1] <= 0.3


def test_a_gap_without_end_leaves_figures_out() -> None:
    figures = GapFigures.of(np.array([0.0, np.inf]))

    assert (None, None, None) == (figures.mean, figures.mean_interval, figures.worst)
    assert 0.5 == figures.exact_share


def test_interval_of_a_mean() -> None:
    """Of 400 throws of a coin the mean is off by 1.96 * 0.5 / sqrt(400) = 0.049 at most."""
    throws = np.arange(400) % 2
    interval = mean_interval(throws)

    assert interval is not None
    assert pytest.approx((0.451, 0.549), abs=0.006) == interval
    assert (2.0, 2.0) == mean_interval([2.0, 2.0, 2.0])
    assert mean_interval([]) is None


def test_the_document_is_json_where_no_rule_fits(judged: JudgedPlanner) -> None:
    report = PlansReport(without_a_rule(judged), TOLD)
    document = json.loads(json.dumps(report.document(), allow_nan=False))

    assert 3 == document["n"]
    assert ["rule", "greedy", "sampled", "searched"] == list(document["overall"])
    assert document["overall"]["rule"]["mean"] is None
    assert 0.0 == document["overall"]["searched"]["mean"]
    assert [None, 1.0, 1.0] == [row["rule_gap"] for row in document["rows"]]
    assert "tensor/none; memory" in document["rows"][0]["plan"]
    assert "1 more are worth nothing" in report.headline()
    assert [4] == [table.row_count for table in report.tables()]


def without_a_rule(judged: JudgedPlanner) -> JudgedPlanner:
    first, *others = judged.instances
    first = replace(first, time_s={**first.time_s, "rule": float("inf")})
    return replace(judged, instances=(first, *others))


def test_the_index_holds_inputs_by_hash_and_finite_metrics(
    judged: JudgedPlanner, tmp_path: Path
) -> None:
    file = tmp_path / "judged.json"
    file.write_text("{}", encoding="utf-8")
    report = PlansReport(without_a_rule(judged), replace(TOLD, cost_model_sha256="c0" * 32))
    tracker = LocalTracker(tmp_path / "index")
    report.tell_inputs(tracker)
    report.tell_outcome(tracker, file)
    index, _ = read_lines(tmp_path / "index" / "index.jsonl")
    metrics, _ = read_lines(tmp_path / "index" / "metrics.jsonl")
    artifacts = {line["name"]: line for line in index if line["event"] == "artifact"}

    assert {
        "instances-5e75e75e75e7": True,
        "planner-9a9a9a9a9a9a": True,
        "cost-model-c0c0c0c0c0c0": True,
        "meshwright-evaluation": False,
    } == {name: line["is_input"] for name, line in artifacts.items()}
    assert [TOLD.set_sha256, TOLD.planner_sha256, "c0" * 32] == (
        artifacts["meshwright-evaluation"]["made_from"]
    )
    assert [("instance", 0), ("instance", 1), ("instance", 2), ("evaluation", 0)] == [
        (line["group"], line["step"]) for line in metrics
    ]
    assert "rule_gap" not in metrics[0]
    assert 1.0 == metrics[1]["rule_gap"]
    assert 0.0 == metrics[-1]["searched_gap_mean"]
    assert 1.0 == metrics[-1]["searched_exact_share"]


@pytest.mark.parametrize(
    ("card", "set_name", "is_trace", "expected"),
    [
        ({"instances": {"name": "general"}}, "validation", False, True),
        ({"instances": {"name": "general"}}, "test-in", False, False),
        ({"instances": {"name": "cluster"}}, "train", False, False),
        ({"instances": {"name": "cluster"}, "started_from": "ab"}, "train", False, True),
        ({"instances": {"name": "cluster"}, "started_from": "ab"}, "test-in", False, False),
        ({"instances": {"name": "traces"}}, "store", True, True),
        ({"instances": {"name": "general"}, "started_from": "ab"}, "store", True, True),
        ({"instances": {"name": "general"}, "started_from": ""}, "store", True, False),
        ({"instances": {"name": "traces"}}, "train", False, False),
        ({}, "train", False, False),
        ({}, "store", True, False),
    ],
)
def test_the_card_says_whether_it_knows_the_instances(
    card: Mapping[str, JsonValue], set_name: str, is_trace: bool, expected: bool
) -> None:
    assert expected == is_in_sample(card, set_name, is_trace=is_trace)


def test_a_planner_is_the_package_s_a_folder_or_a_file(tmp_path: Path) -> None:
    weights = tmp_path / "planner.safetensors"
    weights.touch()

    assert PRETRAINED == planner_file("pretrained")
    assert weights == planner_file(str(tmp_path))
    assert weights == planner_file(str(weights))
    with pytest.raises(BadRequest, match="--planner: nowhere: no folder and no file"):
        planner_file("nowhere")
