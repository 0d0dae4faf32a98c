"""PPO against facts that need no training curve: advantages by hand, masks, first epochs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meshwright.agents.gym_vector import GymVector
from meshwright.agents.ppo import (
    PPO,
    MaskedCategorical,
    PPOConfig,
    Transition,
    best_advantages,
    generalized_advantages,
    group_advantages,
)
from meshwright.errors import BadRequest

T = True
F = False


class Chain:
    """Two decisions, 0 or 1, each rewarded with its own number; action 2 is never valid.

    The best return is 2, reached by (1, 1).
    """

    num_actions = 3

    def __init__(self, num_envs: int = 8) -> None:
        self.num_envs = num_envs
        self._place = 0

    def reset(self, *, seed: int) -> Mapping[str, NDArray[Any]]:
        del seed
        self._place = 0
        return self._observation()

    def step(self, action_B: NDArray[np.int64]) -> Transition:
        assert (action_B < 2).all(), "a masked action was taken"
        self._place = (self._place + 1) % 2
        ended_B = np.full(self.num_envs, self._place == 0)
        return Transition(
            observation=self._observation(),
            reward_B=action_B.astype(np.float64),
            terminated_B=ended_B,
            truncated_B=np.zeros(self.num_envs, dtype=np.bool_),
        )

    def _observation(self) -> Mapping[str, NDArray[Any]]:
        place_BF = np.zeros((self.num_envs, 2), dtype=np.float32)
        place_BF[:, self._place] = 1.0
        mask_BA = np.tile(np.array([True, True, False]), (self.num_envs, 1))
        return {"place": place_BF, "action_mask": mask_BA}


class Table(nn.Module):
    """A logit and a value for every place."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(2, Chain.num_actions, bias=False)
        self.value = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.value.weight)

    def forward(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        place_BF = observation["place"]
        return self.logits(place_BF), self.value(place_BF).squeeze(-1)


def trainer(num_iterations: int = 40, **settings: Any) -> PPO:
    given = {"num_steps": 4, "learning_rate": 0.05, "gamma": 1.0, "entropy_weight": 0.0}
    config = PPOConfig(**{**given, **settings})
    return PPO(Table(), Chain(), config, num_iterations=num_iterations)


def test_advantages_stop_at_ends_and_bootstrap_only_at_truncation() -> None:
    """Gamma 0.5, lambda 0.5; V = 1 everywhere, r = 1. Steps: ordinary, truncated, terminated.

    Truncated: delta = 1 + 0.5 * 4 - 1 = 2 with V(final) = 4. Terminated: delta = 1 - 1 = 0.
    Ordinary: delta = 1 + 0.5 - 1 = 0.5, plus 0.25 * 2 of the truncated step = 1.
    """
    ones = torch.ones(3, 1)

    found = generalized_advantages(
        ones,
        ones,
        torch.tensor([[1.0], [4.0], [9.0]]),
        terminated_TB=torch.tensor([[F], [F], [T]]),
        ended_TB=torch.tensor([[F], [T], [T]]),
        gamma=0.5,
        gae_lambda=0.5,
    )

    assert [[1.0], [2.0], [0.0]] == found.tolist()


def test_group_advantages_are_returns_less_the_mean_of_the_group() -> None:
    found = group_advantages(torch.tensor([1.0, 3.0, 10.0, 20.0]), 2)

    assert [-1.0, 1.0, -5.0, 5.0] == found.tolist()


def test_best_advantages_are_what_an_episode_adds_to_the_best_of_its_group() -> None:
    """Groups (1, 3, 2), (5, 5, 4) and (0, -2, -9): all but the best add nothing, nor does a tie."""
    returns = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 4.0, 0.0, -2.0, -9.0])

    assert [0, 1, 0, 0, 0, 0, 2, 0, 0] == best_advantages(returns, 3).tolist()


def test_best_advantages_estimate_the_gradient_of_the_best_of_two() -> None:
    """One decision, worth 0 or 1 with chances 1/4 and 3/4: E[best of 2] = 1 - (1/4)^2.

    Its derivative by the logit of the good one is 2 (1/4) * (3/4)(1/4) = 0.09375; over the four
    pairs, weighted by their chances, sum of A_i (1[good] - 3/4) gives the same.
    """
    chances = (0.25, 0.75)
    total = 0.0
    for one in (0, 1):
        for other in (0, 1):
            advantage = best_advantages(torch.tensor([float(one), float(other)]), 2)
            slope = advantage[0] * (one - 0.75) + advantage[1] * (other - 0.75)
            total += chances[one] * chances[other] * float(slope)

    assert 0.09375 == pytest.approx(total)


def test_a_masked_distribution_is_the_one_over_the_valid_actions() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.7]])
    mask = torch.tensor([[True, False, True, True]])
    whole = MaskedCategorical(logits, mask)
    alone = torch.distributions.Categorical(logits=logits[:, [0, 2, 3]])

    torch.testing.assert_close(alone.entropy(), whole.entropy())
    for action, place in ((0, 0), (2, 1), (3, 2)):
        torch.testing.assert_close(
            alone.log_prob(torch.tensor([place])), whole.log_probability(torch.tensor([action]))
        )


def test_masked_logits_get_no_gradient() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)
    distribution = MaskedCategorical(logits, torch.tensor([[True, False, True]]))

    (distribution.log_probability(torch.tensor([2])) + distribution.entropy()).sum().backward()

    assert logits.grad is not None
    assert 0.0 == logits.grad[0, 1].item()
    assert bool((logits.grad[0, [0, 2]] != 0).all())


def test_masked_actions_are_never_sampled() -> None:
    logits = torch.tensor([[0.0, 50.0, 0.0]]).expand(200, 3)
    mask = torch.tensor([[True, False, True]]).expand(200, 3)

    drawn = MaskedCategorical(logits, mask).sample(torch.Generator().manual_seed(0))

    assert {0, 2} == set(drawn.tolist())


def test_before_the_first_update_the_ratio_is_one() -> None:
    found = trainer().train_iteration()

    assert found.metrics["first_ratio_error"] < 1e-6


@pytest.mark.parametrize(
    "settings", [{}, {"baseline": "group", "group_size": 4, "num_steps": 2}], ids=["value", "group"]
)
def test_the_optimum_of_a_tiny_problem_is_found(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ppo = trainer(num_iterations=60, anneal=False, **settings)
    ppo.run()
    places = {"place": torch.eye(2), "action_mask": torch.tensor([[T, T, F]]).expand(2, 3)}
    logits, _ = ppo.policy(places)

    assert [1, 1] == MaskedCategorical(logits, places["action_mask"]).mode().tolist()


def test_equal_seeds_give_equal_bits_and_others_do_not() -> None:
    def weights(seed: int) -> Tensor:
        ppo = trainer(num_iterations=5, seed=seed)
        ppo.run()
        return torch.cat([p.detach().flatten() for p in ppo.policy.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"baseline": "group", "group_size": 4, "num_steps": 2}
    whole = trainer(num_iterations=6, **settings)
    whole.run()
    first = trainer(num_iterations=6, **settings)
    for _ in range(3):
        first.train_iteration()
    first.save(tmp_path / "half.safetensors")
    second = trainer(num_iterations=6, **settings)
    second.load(tmp_path / "half.safetensors")
    second.run()

    for one, other in zip(whole.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    assert whole.num_env_steps == second.num_env_steps


def test_a_checkpoint_of_other_settings_or_of_rubbish_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    trainer().save(path)

    with pytest.raises(BadRequest, match="another config"):
        trainer(clip_range=0.3).load(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(BadRequest, match="cannot read the checkpoint"):
        trainer().load(path)


def test_groups_must_be_whole() -> None:
    with pytest.raises(BadRequest, match="groups of 3"):
        trainer(baseline="group", group_size=3)
    with pytest.raises(BadRequest, match="group baseline needs 2"):
        PPOConfig(baseline="group")


def test_gymnasium_environments_give_the_last_observation_of_truncated_episodes() -> None:
    """CartPole ends by falling long before 500 steps, MountainCar is cut off at 200."""
    environment = GymVector.make("MountainCar-v0", 2)
    environment.reset(seed=0)
    steps = [environment.step(np.ones(2, dtype=np.int64)) for _ in range(200)]
    last = steps[-1]

    assert [True, True] == last.truncated_B.tolist()
    assert last.final_observation is not None
    assert not np.allclose(last.final_observation["observation"], last.observation["observation"])
    assert all(step.final_observation is None for step in steps[:-1])
