"""Agreement with MaskablePPO of sb3-contrib, where it is installed."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from meshwright.agents.evaluation import Evaluator
from meshwright.agents.ppo import PPO, MaskedCategorical, PPOConfig
from meshwright.env.batched import BatchedPlacement
from meshwright.env.compiled import compile_instances
from meshwright.env.decode import best_of
from meshwright.env.instance import MAX_CANDIDATES
from meshwright.env.observation import NUM_CANDIDATE, NUM_STATE
from meshwright.env.placement import PlacementEnv
from meshwright.env.toys import toy_instances

sb3_contrib = pytest.importorskip("sb3_contrib", reason="a development dependency; not installed")

EASY = toy_instances()[:2]
"""Without the trap, which no policy gradient gets out of for certain."""

SHOWN = 6
"""Candidates that the toys have at most."""


class Flat(gymnasium.ObservationWrapper[Any, Any, Any]):
    """State and candidates as one row of numbers, for a policy of plain layers."""

    def __init__(self, env: PlacementEnv) -> None:
        super().__init__(env)
        width = NUM_STATE + SHOWN * NUM_CANDIDATE
        self.observation_space = spaces.Box(-np.inf, np.inf, (width,), np.float32)

    def observation(self, observation: Any) -> Any:
        shown = observation["candidates"][:SHOWN].ravel()
        return np.concatenate([observation["state"], shown]).astype(np.float32)

    def action_masks(self) -> Any:
        return self.env.unwrapped.action_masks()  # type: ignore[attr-defined]


class Layers(nn.Module):
    """The same numbers through plain layers, as a policy of ours."""

    def __init__(self) -> None:
        super().__init__()
        width = NUM_STATE + SHOWN * NUM_CANDIDATE
        self.actor = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, MAX_CANDIDATES))
        self.critic = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, observation: Any) -> Any:
        shown = observation["candidates"][:, :SHOWN].flatten(1)
        flat = torch.cat([observation["state"], shown], dim=1)
        return self.actor(flat), self.critic(flat).squeeze(-1)


def test_masked_distributions_are_those_of_maskable_ppo() -> None:
    from sb3_contrib.common.maskable.distributions import MaskableCategorical

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=generator)
    mask = torch.rand(50, 7, generator=generator) < 0.6
    mask[:, 0] = True
    theirs = MaskableCategorical(logits=logits, masks=mask.numpy())
    ours = MaskedCategorical(logits, mask)
    actions = ours.sample(generator)

    torch.testing.assert_close(theirs.log_prob(actions), ours.log_probability(actions))
    torch.testing.assert_close(theirs.entropy(), ours.entropy())
    assert torch.equal(theirs.probs.argmax(-1), ours.mode())


def test_both_find_the_optima_of_the_toys_with_equal_settings() -> None:
    """Equal networks, steps, rates and losses; each finds the best plan of both toys."""
    theirs = sb3_contrib.MaskablePPO(
        "MlpPolicy",
        Flat(PlacementEnv(EASY)),
        learning_rate=3e-3,
        n_steps=256,
        batch_size=64,
        n_epochs=4,
        gamma=1.0,
        ent_coef=0.01,
        policy_kwargs={"net_arch": [64]},
        seed=0,
        device="cpu",
    )
    theirs.learn(256 * 12)
    environment = Flat(PlacementEnv(EASY))
    found = []
    for number in range(len(EASY)):
        observation, _ = environment.reset(options={"instance": number})
        is_done, info = False, {}
        while not is_done:
            action, _ = theirs.predict(
                observation, action_masks=environment.action_masks(), deterministic=True
            )
            observation, _, is_done, _, info = environment.step(int(action))
        found.append(info["time_s"])
    torch.manual_seed(0)
    config = PPOConfig(
        num_steps=32,
        learning_rate=3e-3,
        anneal=False,
        gamma=1.0,
        num_epochs=4,
        clip_value_loss=False,
    )
    ours = PPO(Layers(), BatchedPlacement(EASY, 8, restarts=True), config, num_iterations=12)
    ours.run()
    gap = Evaluator(compile_instances(EASY), num_samples=0).evaluate(ours.policy, seed=0).greedy_gap

    assert [best_of(item)[0] for item in EASY] == pytest.approx(found)
    assert [0.0, 0.0] == gap.tolist()
