"""Claim: our PPO learns CartPole and Acrobot as the published implementation does.

    OMP_NUM_THREADS=1 python -m benchmarks.ppo_anchors [--seeds 3] [--steps 500000] [-o FILE]

Anchors (cleanrl's ppo.py, 500k steps, 4 environments x 128 steps, 3 seeds; mean return of the last
episodes): CartPole-v1 490.04 +- 6.12, Acrobot-v1 -86.36 +- 1.32, MountainCar-v0 -200. Here the
return of a seed is the mean over the last 100 episodes of training, as it explores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.heading import heading
from meshwright.agents.gym_vector import GymVector
from meshwright.agents.ppo import PPO, PPOConfig

ANCHORS = {
    "CartPole-v1": (490.04, 6.12),
    "Acrobot-v1": (-86.36, 1.32),
    "MountainCar-v0": (-200.0, 0.0),
}
NUM_ENVS = 4


class SmallPolicy(nn.Module):
    """Two hidden layers of 64 for the actor, two for the critic, orthogonal weights."""

    def __init__(self, num_features: int, num_actions: int) -> None:
        super().__init__()
        self.actor = _layers(num_features, num_actions, last_gain=0.01)
        self.critic = _layers(num_features, 1, last_gain=1.0)

    def forward(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x_BF = observation["observation"].float()
        return self.actor(x_BF), self.critic(x_BF).squeeze(-1)


def _layers(num_in: int, num_out: int, *, last_gain: float) -> nn.Sequential:
    sizes = [(num_in, 64, 2**0.5), (64, 64, 2**0.5), (64, num_out, last_gain)]
    layers: list[nn.Module] = []
    for wide, narrow, gain in sizes:
        layer = nn.Linear(wide, narrow)
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def trainer(name: str, seed: int, num_steps: int) -> PPO:
    """A run that has not begun, with the published settings."""
    torch.manual_seed(seed)
    environment = GymVector.make(name, NUM_ENVS)
    space: Any = environment.vector.single_action_space
    num_features = int(environment.reset(seed=0)["observation"].shape[1])
    config = PPOConfig(seed=seed)
    return PPO(
        SmallPolicy(num_features, int(space.n)),
        environment,
        config,
        num_iterations=num_steps // (NUM_ENVS * config.num_steps),
    )


def train(name: str, seed: int, num_steps: int) -> dict[str, Any]:
    """One run: the returns of its last 100 episodes."""
    returns: list[float] = []
    begin_s = time.monotonic()
    trainer(name, seed, num_steps).run(lambda found: returns.extend(found.episode_returns))
    return {
        "seed": seed,
        "last_100_mean": float(np.mean(returns[-100:])),
        "num_episodes": len(returns),
        "seconds": time.monotonic() - begin_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500_000)
    parser.add_argument("--names", nargs="+", default=list(ANCHORS))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.names:
        runs = []
        for seed in range(1, options.seeds + 1):
            runs.append(train(name, seed, options.steps))
            print(name, runs[-1], file=sys.stderr)
        means = [run["last_100_mean"] for run in runs]
        rows.append(
            {
                "environment": name,
                "published": {"mean": ANCHORS[name][0], "spread": ANCHORS[name][1]},
                "mean": float(np.mean(means)),
                "spread": float(np.std(means)),
                "runs": runs,
            }
        )
    found = heading("PPO reaches the published returns", num_steps=options.steps, rows=rows)
    text = json.dumps(found, indent=2) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
