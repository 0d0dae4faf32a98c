"""Imitation against optima worked out by enumeration, on toys and drawn instances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from meshwright.agents.evaluation import Evaluator
from meshwright.agents.expert import SearchTeacher, slots_of
from meshwright.agents.imitation import ExactTeacher, Imitation, ImitationConfig, soft_targets
from meshwright.agents.policy import OnInstances
from meshwright.agents.weights import new_policy
from meshwright.env.batched import BatchedPlacement
from meshwright.env.compiled import compile_instances
from meshwright.env.decode import best_of
from meshwright.env.instance import Instance
from meshwright.env.toys import random_instance, toy_instances

TOYS = toy_instances()


def drawn(count: int, seed: int = 0) -> list[Instance]:
    rng = np.random.default_rng(seed)
    return [random_instance(rng, num_groups=1 + number % 3) for number in range(count)]


def pupil(instances: list[Instance] | tuple[Instance, ...], hidden: int = 32) -> OnInstances:
    return OnInstances(new_policy(hidden=hidden), [item.graph for item in instances])


def imitation(
    instances: list[Instance] | tuple[Instance, ...], *, num_envs: int = 64, iterations: int = 40
) -> Imitation:
    environment = BatchedPlacement(instances, num_envs)
    teacher = ExactTeacher(environment, instances)
    config = ImitationConfig(learning_rate=5e-3, num_epochs=2, num_minibatches=4)
    return Imitation(pupil(instances), teacher, config, num_iterations=iterations)


def test_soft_targets_favor_the_best_by_relative_time() -> None:
    """At temperature 0.1 a plan 10 % slower gets exp(-log(1.1) / 0.1) = 1.1 ** -10 of the share."""
    found = soft_targets(torch.tensor([[2.0, 2.2, float("inf")]]), 0.1)

    torch.testing.assert_close(torch.tensor([[1.0, 1.1**-10, 0.0]]) / (1 + 1.1**-10), found)


def test_lessons_are_what_enumeration_says() -> None:
    """At the first decision the value is that of the optimum, its target that of the best."""
    environment = BatchedPlacement(TOYS, 64)
    lessons = ExactTeacher(environment, TOYS).lessons(pupil(TOYS), torch.Generator().manual_seed(0))
    optimum = [best_of(item)[0] for item in TOYS]
    expected = [np.log(item.reference_s / best) for item, best in zip(TOYS, optimum, strict=True)]
    first = slice(0, 64)
    numbers = lessons.observation["instance"][first]

    torch.testing.assert_close(
        torch.tensor(expected, dtype=torch.float32)[numbers], lessons.value_N[first]
    )
    torch.testing.assert_close(torch.ones(len(lessons)), lessons.target_NA.sum(-1))
    assert not bool((lessons.target_NA > 0)[~lessons.observation["action_mask"]].any())
    assert bool((lessons.value_N <= torch.tensor(expected).max() + 1e-6).all())


def test_the_toys_are_learned_within_seconds() -> None:
    learner = imitation(TOYS, iterations=30)
    last = [learner.train_iteration() for _ in range(30)][-1]
    found = Evaluator(compile_instances(TOYS), num_samples=0).evaluate(learner.policy, seed=0)

    assert [0.0] * len(TOYS) == found.greedy_gap.tolist()
    assert last.metrics["agreement"] > 0.9


def test_one_drawn_instance_is_learned_by_heart() -> None:
    """Its times are noise, so that nothing but its own optimum can be learned."""
    instances = drawn(1, seed=3)
    learner = imitation(instances, num_envs=32, iterations=50)
    evaluator = Evaluator(compile_instances(instances), num_samples=8)
    before = evaluator.evaluate(learner.policy, seed=0)
    for _ in range(50):
        learner.train_iteration()
    after = evaluator.evaluate(learner.policy, seed=0)

    assert [0.0] == after.sampled_gap.tolist()
    assert after.greedy_gap[0] <= 0.02 < before.greedy_gap[0]


def test_a_phase_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = (imitation(TOYS, iterations=6) for _ in range(3))
    for _ in range(6):
        whole.train_iteration()
    for _ in range(3):
        first.train_iteration()
    first.save(tmp_path / "half.safetensors")
    second.load(tmp_path / "half.safetensors")
    last = [second.train_iteration() for _ in range(3)][-1]

    assert whole.teacher.num_env_steps == last.num_env_steps
    for one, other in zip(whole.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_slots_of_a_plan_lead_to_it() -> None:
    instances = [*TOYS, *drawn(4)]
    plans = [best_of(item)[1] for item in instances]
    environment = BatchedPlacement(instances, len(instances))
    slots = np.stack([slots_of(item, plan) for item, plan in zip(instances, plans, strict=True)])
    observation = environment.reset_to(np.arange(len(instances)))
    for _ in range(environment.max_decisions):
        is_done = ~np.isnan(environment.time_s())
        chosen = slots[np.arange(len(instances)), observation["decision"]]
        observation = dict(environment.step(np.where(is_done, 0, chosen)).observation)

    assert plans == environment.placed()


def test_expert_lessons_lead_to_plans_no_slower_than_the_samples() -> None:
    instances = drawn(4)
    environment = BatchedPlacement(instances, 32, group_size=8)
    learner = pupil(instances)
    few, many = (
        SearchTeacher(environment, instances, num_samples=8, max_evaluations=count).lessons(
            learner, torch.Generator().manual_seed(0)
        )
        for count in (8, 64)
    )
    numbers = few.observation["instance"][:4].numpy()
    log_optimum = np.log([2.0 / best_of(instances[number])[0] for number in numbers])

    assert 1.0 == float(many.target_NA.max(-1).values.min())
    assert bool((few.value_N[:4] <= many.value_N[:4]).all())
    assert bool((many.value_N[:4].numpy() <= log_optimum + 1e-6).all())


def test_expert_iteration_improves_without_knowing_optima() -> None:
    """On the toys but the trap: whoever has settled beside it looks nowhere else."""
    easy = TOYS[:2]
    environment = BatchedPlacement(easy, 48, group_size=8)
    teacher = SearchTeacher(environment, easy, num_samples=8, max_evaluations=50)
    config = ImitationConfig(learning_rate=1e-2, num_minibatches=1)
    learner = Imitation(pupil(easy), teacher, config, num_iterations=40)
    evaluator = Evaluator(compile_instances(easy), num_samples=0)
    before = evaluator.evaluate(learner.policy, seed=0)
    for _ in range(40):
        learner.train_iteration()
    after = evaluator.evaluate(learner.policy, seed=0)

    assert before.greedy_gap.max() > 0
    assert [0.0, 0.0] == after.greedy_gap.tolist()
