"""Our PPO on Gymnasium's form of our environment."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.ppo_anchors import SmallPolicy
from meshwright.agents.gym_vector import GymVector
from meshwright.agents.ppo import PPO, PPOConfig, tensors
from meshwright.env.instance import MAX_CANDIDATES
from meshwright.env.observation import NUM_CANDIDATE, NUM_STATE
from meshwright.env.placement import ENVIRONMENT_ID

SHOWN = 6
"""Candidates that the toys have at most."""

pytestmark = pytest.mark.usefixtures("one_thread")


class OnToys(nn.Module):
    """State and candidates as one row of numbers, through plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = SmallPolicy(NUM_STATE + SHOWN * NUM_CANDIDATE, MAX_CANDIDATES)

    def forward(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        shown = observation["candidates"][:, :SHOWN].flatten(1)
        found: tuple[Tensor, Tensor] = self.layers(
            {"observation": torch.cat([observation["state"], shown], dim=1)}
        )
        return found


def test_masks_become_truth_values_and_nothing_else_changes() -> None:
    mask = np.array([[1, 0, 1]], dtype=np.int8)
    state = np.array([[0.5]], dtype=np.float32)
    found = tensors({"action_mask": mask, "state": state})

    assert torch.equal(torch.tensor([[True, False, True]]), found["action_mask"])
    assert torch.equal(torch.tensor([[0.5]]), found["state"])
    assert {"state"} == set(tensors({"state": state}))


def test_the_toys_are_learned_through_gymnasium() -> None:
    """The best plans of all toys are twice as fast as their references: log 2 = 0.69."""
    torch.manual_seed(0)
    config = PPOConfig(num_steps=64, learning_rate=3e-3, anneal=False, gamma=1.0)
    trainer = PPO(OnToys(), GymVector.make(ENVIRONMENT_ID, 4), config, num_iterations=10)
    returns = [trainer.train_iteration().episode_returns for _ in range(10)]
    means = [float(np.mean(found)) for found in returns]

    assert min(min(found) for found in returns) > -2.5, "no masked action was taken"
    assert means[0] < 0.2
    assert np.mean(means[-3:]) > 0.3
