"""The programs that judge the planner, on instances small enough to know the answers."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.intervals import difference, gap_figures, interquartile_mean, interval, win_rates
from benchmarks.planner_ablation import Unmasked, told, trained, variants
from benchmarks.planner_curves import asked, by_evaluations, curves, solvers_by_seconds
from benchmarks.planner_curves import told as told_of_contexts
from benchmarks.planner_gap import measured, num_fitting
from benchmarks.planner_instances import optima_s, proposals
from benchmarks.planner_on_trace import compared, jobs_of, judged, tuned
from benchmarks.planner_robustness import directions, summary
from benchmarks.planner_training import timed
from benchmarks.planner_zero_shot import inference
from benchmarks.searchers import Lookups, Problem, available, best_by_budget
from meshwright.agents.planner import PolicyDecider
from meshwright.agents.weights import new_policy, save_policy
from meshwright.cluster import parse_cluster
from meshwright.env.batched import BatchedPlacement
from meshwright.env.decode import best_of
from meshwright.env.instance import Instance
from meshwright.env.placement import MASKED_REWARD
from meshwright.env.toys import random_instance, toy_instances
from meshwright.plans.plan import JobSpec
from meshwright.solvers.planner import make_context
from meshwright.solvers.rules import RULES
from meshwright.space.search import SearchContext, SolveResult, SolveStatus
from tests.cost.graphs import tiny_gpt

NAMES = available()


@pytest.fixture(scope="module")
def instances() -> list[Instance]:
    rng = np.random.default_rng(0)
    return [random_instance(rng, num_rows=20) for _ in range(4)]


# --- Figures --------------------------------------------------------------------------------------


def test_interquartile_mean_is_the_mean_of_the_middle_half() -> None:
    assert 3.5 == interquartile_mean(np.array([[0.0, 2.0, 3.0, 4.0], [5.0, 100.0, 1.0, 6.0]]))
    assert 2.0 == interquartile_mean(np.array([[1.0, 2.0, 3.0]]))


def test_intervals_hold_the_value_and_shrink_where_there_is_no_spread() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(5.0, 1.0, size=(10, 40))
    low, high = interval(scores, interquartile_mean)

    assert low < interquartile_mean(scores) < high
    assert 1.0 > high - low
    same = np.repeat(scores[:1], 10, axis=0)
    assert [interquartile_mean(same)] * 2 == pytest.approx(interval(same, interquartile_mean))
    wide = interval(same, interquartile_mean, over="instances")
    assert wide[0] < wide[1]


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for number in range(60):
        scores = rng.normal(0.0, 1.0, size=(1, 60))
        low, high = interval(scores, lambda t: float(t.mean()), over="instances", seed=number)
        hits += low <= 0.0 <= high

    assert 50 <= hits


def test_gap_figures_tell_exact_ones_and_those_without_a_plan() -> None:
    found = gap_figures(np.array([[0.0, 0.1, math.inf, 0.0]]))

    assert 0.5 == found["exact_share"]
    assert 1 == found["without_a_plan"]
    assert found["mean"] is None


def test_wins_and_differences_are_paired() -> None:
    one, other = np.array([[1.0, 2.0, 3.0]]), np.array([[2.0, 2.0, 2.0]])

    assert {"wins": 1 / 3, "ties": pytest.approx(1 / 3), "losses": 1 / 3} == win_rates(one, other)
    assert 0.0 == difference(one, other)["mean"]


# --- Searchers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_searchers_find_the_optimum_with_enough_and_never_more(
    name: str, instances: list[Instance]
) -> None:
    budgets = (4, 64, 200 if name == "cma" else 1000)  # its library is slow
    for instance in instances[: 1 if name == "cma" else 2]:
        problem = Problem(instance)
        times = best_by_budget(name, problem, budgets, seed=0)
        optimum_s = best_of(instance)[0]

        assert all(time_s >= optimum_s for time_s in times)
        assert list(times) == sorted(times, reverse=True) or name in ("annealing", "genetic")
        if name not in ("glance", "local"):  # of plans alike for all groups; from one start
            assert optimum_s * 1.05 >= times[-1]
        again = best_by_budget(name, problem, budgets, seed=0)
        np.testing.assert_array_equal(times, again)


def test_lookups_count_distinct_plans(instances: list[Instance]) -> None:
    look = Lookups(Problem(instances[0]), 100, seed=0)
    plan = look.random()
    for _ in range(3):
        look.time_s(plan)

    assert 1 == len(look.curve)
    assert math.isfinite(look.curve[0])


# --- Programs -------------------------------------------------------------------------------------


def test_gaps_of_a_policy_and_all_searchers(instances: list[Instance]) -> None:
    found = measured(
        "random",
        instances,
        [PolicyDecider(new_policy())] * 2,
        num_seeds=1,
        num_samples=8,
        budgets=(9, 100),
    )
    rows = {(row["method"], row["evaluations"]): row for row in found["methods"]}
    policy = [rows["policy, greedy", 1], rows["policy, 8 samples", 9]]
    (of_rows,) = [row for (name, _), row in rows.items() if name.endswith("best of their rows")]

    assert 4 == found["n"]
    assert policy[0]["mean"] >= policy[1]["mean"] >= of_rows["mean"] >= 0.0
    assert "policy, 8 samples, best of their rows" == of_rows["method"]
    fitting = [sum(num_fitting(item, row) for row in range(20)) for item in instances]
    assert 9 < of_rows["evaluations"] < np.mean(fitting)
    assert policy[1]["mean"] >= rows["policy, samples, local search", 100]["mean"] >= 0.0
    assert 1.0 == pytest.approx(sum(rows["random", 9]["policy_against_it"].values()))
    best = min(optima_s(instances))
    assert rows["rules", 1]["mean"] == pytest.approx((2.0 / optima_s(instances) - 1).mean())
    assert best > 0


def test_proposals_are_the_greedy_plan_and_samples(instances: list[Instance]) -> None:
    policy = PolicyDecider(new_policy())
    first = proposals(policy, instances, num_samples=5, seed=1)
    other = proposals(policy, instances, num_samples=5, seed=2)

    assert [6] * 4 == [len(plans) for plans in first]
    assert [plans[0] for plans in first] == [plans[0] for plans in other]
    assert first != other


def test_inference_is_timed(instances: list[Instance]) -> None:
    found = inference(PolicyDecider(new_policy()), instances)

    assert 0 < found["0 samples"]["median_ms"] <= found["64 samples"]["worst_ms"]


def test_curves_fall_and_name_where_they_lose(instances: list[Instance]) -> None:
    found = curves([PolicyDecider(new_policy())], instances[:2], (8, 64), 1)
    means = {(row["searcher"], row["evaluations"]): row["mean"] for row in found["rows"]}

    assert means["agent", 8] >= means["agent", 64] >= 0.0
    assert 2 == len(found["agent_at_64"]["worst"])


class Fixed:
    """A proposer that has nothing to say."""

    name = "fixed"

    def propose(self, context: Any, deadline_s: float | None = None) -> SolveResult:
        return SolveResult(
            candidates=(), evaluations=7, seconds=0.0, status=SolveStatus.NOT_APPLICABLE
        )


def tiny_context() -> SearchContext:
    return make_context(
        tiny_gpt(16),
        reference="tiny",
        cluster=parse_cluster("2xa100"),
        job=JobSpec(global_batch=16),
        level="O2",
    )


def test_solvers_are_asked_until_the_deadline() -> None:
    context: Any = None

    assert 14 == asked(context, [Fixed(), Fixed()], None)["evaluations"]
    late = asked(context, [Fixed(), Fixed()], -1.0)
    assert 0 == late["evaluations"]
    assert math.inf == late["best_s"]


def test_the_portfolios_are_those_of_the_product_and_differ_in_the_agent() -> None:
    context = tiny_context()
    solvers = solvers_by_seconds(PolicyDecider(new_policy()))
    both = [proposer.name for proposer in solvers["portfolio with"](context)]
    without = [proposer.name for proposer in solvers["portfolio without"](context)]

    assert "policy" == both.pop(len(RULES))
    assert [rule.name for rule in RULES] == both[: len(RULES)]
    assert without == both


def test_without_the_agent_searches_get_as_many_evaluations() -> None:
    found = by_evaluations(tiny_context, PolicyDecider(new_policy(), num_samples=2))
    both, without = (found[f"portfolio {name}"]["evaluations"] for name in ("with", "without"))

    assert both > 256
    assert pytest.approx(both, rel=0.05) == without
    assert all(math.isfinite(row["best_s"]) for row in found.values())


def test_portfolios_are_compared_problem_by_problem() -> None:
    def row(solver: str, best_s: float) -> dict[str, Any]:
        return {
            "budget": "1 s",
            "solver": solver,
            "best_s": best_s,
            "seconds": 1.0,
            "evaluations": 9,
        }

    problems = {
        "a": [row("portfolio without", 2.0), row("portfolio with", 1.0)],
        "b": [row("portfolio without", 3.0), row("portfolio with", 3.3)],
        "nothing fits": [row("portfolio without", math.inf), row("portfolio with", math.inf)],
    }
    found = told_of_contexts(problems)

    assert 2 == found["n"]
    pair = found["portfolio_with_against_without"][0]
    assert (0.5, 0.5) == (pair["wins"], pair["losses"])
    assert ["b"] == pair["loses_on"]
    assert pytest.approx((-1.0 + 0.1) / 2) == pair["with_less_without"]["mean"]


def test_shrinkage_is_in_points_and_counts_what_no_longer_fits() -> None:
    rows = [
        {"seen": "analytic", "judged_by": "learned", "gain_points": 10.0, "gain_points_then": then}
        for then in (9.0, 7.0, math.nan)
    ]
    found = summary(rows)[0]

    assert 2.0 == found["mean_shrinkage_points"]
    assert 1 == found["no_longer_fit"]
    assert found["met"]
    members = ["analytic", "learned", "member 0", "member 1", "member 2"]
    assert ("member 0", ("member 1", "member 2")) == directions(members)[-1]


def test_gain_of_training_on_a_trace_is_paired() -> None:
    found = compared(np.array([[0.3, 0.1]]), np.array([[0.1, 0.1]]))

    assert pytest.approx(0.1) == found["gain"]["mean"]
    assert 0.5 == found["trained_against_general"]["wins"]


def test_jobs_are_parted_and_weights_trained_further(
    instances: list[Instance], tmp_path: Path
) -> None:
    @dataclass
    class Job:
        name: str

    class Jobs:
        def draw(self, seed: int) -> Job:
            return Job(name=str(seed // 2))  # every job twice

    class Making:
        def make(self, spec: Job) -> Instance | None:
            number = int(spec.name)  # every third is worth nothing
            return None if number % 3 == 0 else replace(instances[number % 4], name=spec.name)

    jobs: Any = Jobs()
    maker: Any = Making()
    parts = jobs_of(jobs, maker, 3, 2)
    weights = tmp_path / "general.safetensors"
    save_policy(new_policy(), weights, {})
    own = tuned(weights, 0, parts[0], parts[1], tmp_path / "run", 2)
    before, after = judged(PolicyDecider(new_policy()), parts[2], 0), judged(own, parts[2], 0)

    assert [["1", "2", "4"], ["5"], ["7", "8"]] == [[one.name for one in part] for part in parts]
    assert 2 == len(after.greedy_gap) == len(before.greedy_gap)
    moved = [
        not torch.equal(one, other)
        for one, other in zip(own.policy.parameters(), new_policy().parameters(), strict=True)
    ]
    assert any(moved)


# --- Ablation -------------------------------------------------------------------------------------


def test_without_masks_a_wrong_candidate_ends_the_episode_with_a_penalty() -> None:
    narrow = [random_instance(np.random.default_rng(0), num_rows=40, fitting_share=0.2)]
    environment, num_envs = Unmasked(narrow, 64), 64
    observation: Any = environment.reset_to(np.zeros(num_envs, np.int64))
    valid = BatchedPlacement(narrow, 1).reset_to(np.zeros(1, np.int64))["action_mask"]
    rng = np.random.default_rng(1)

    assert (observation["action_mask"] >= valid).all()
    reward = np.zeros(num_envs)
    ended = np.zeros(num_envs, np.int64)
    for _ in range(environment.max_decisions):
        mask = observation["action_mask"]
        step = environment.step((mask * rng.random(mask.shape)).argmax(axis=1))
        observation, reward = step.observation, reward + step.reward_B
        ended += step.terminated_B
    fails = ~np.isfinite(environment.time_s())
    assert 0 < fails.sum() < num_envs
    assert [1] * num_envs == ended.tolist()
    assert {MASKED_REWARD} == set(reward[fails].tolist())
    assert (reward[~fails] > MASKED_REWARD).all()


def test_without_masks_right_candidates_lead_to_the_same_plans() -> None:
    instances = toy_instances()
    environment = Unmasked(instances, 3)
    environment.reset_to(np.arange(3))
    while np.isnan(environment.time_s()).any():
        environment.step(environment.best_time_s().argmin(axis=1))

    assert [best_of(item)[0] for item in instances] == environment.time_s().tolist()


@pytest.mark.parametrize("name", ["mask off", "group off", "mlp"])
def test_variants_train(name: str, instances: list[Instance], tmp_path: Path) -> None:
    variant = variants(iterations=2, num_envs=16)[name]
    row = trained(variant, 0, instances, instances, tmp_path / name)

    assert 0.0 <= row["sampled_gap_mean"] <= row["greedy_gap_mean"]
    assert 0.0 <= row["does_not_fit_without_mask"] <= 1.0
    line = told([{"variant": name, **row}])[0]
    assert row["sampled_gap_mean"] == line["sampled_gap_mean"]


def test_variants_train_equally_long() -> None:
    lengths = {
        name: one.settings.imitation_iterations + one.settings.ppo_iterations
        for name, one in variants(iterations=61).items()
    }

    assert {61} == set(lengths.values())
    assert 8 == len(lengths)


def test_a_training_is_timed_and_its_card_read(tmp_path: Path) -> None:
    card = {"sha256": "abc", "validation": {"sampled_gap_mean": 0.01}}
    folder = tmp_path / "run"
    program = (
        "import pathlib, sys; folder = pathlib.Path(sys.argv[1]); folder.mkdir(); "
        f"(folder / 'planner.json').write_text({json.dumps(json.dumps(card))})"
    )

    for _ in range(2):  # a folder of a run before is removed
        found = timed([sys.executable, "-c", program, str(folder)], folder)

    assert ("abc", card["validation"]) == (found["sha256"], found["validation"])
    assert 0.0 < found["cpu_s"]
    assert 0.0 < found["wall_s"]
