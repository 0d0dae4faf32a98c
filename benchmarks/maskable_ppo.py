"""Claim: our PPO and MaskablePPO of sb3-contrib learn the same on our environment.

    OMP_NUM_THREADS=1 python -m benchmarks.maskable_ppo --cache FOLDER [-o FILE]

Equal settings, steps and networks (plain layers on state and candidates, one hidden layer of 64 for
actor and critic), value baseline, on some frozen training instances; gaps of the most probable
plans to the optimum after training, over seeds. ``sb3-contrib`` is a development dependency.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from benchmarks.heading import heading
from benchmarks.intervals import gap_figures
from benchmarks.planner_instances import instances_of, optima_s, write
from meshwright.agents.evaluation import Evaluator
from meshwright.agents.ppo import PPO, PPOConfig
from meshwright.env.batched import BatchedPlacement
from meshwright.env.compiled import compile_instances
from meshwright.env.instance import MAX_CANDIDATES, Instance
from meshwright.env.observation import NUM_CANDIDATE, NUM_STATE
from meshwright.env.placement import PlacementEnv

SHOWN = 12
"""Candidates of a decision that plain layers look at; those beyond may be taken unseen."""
WIDTH = NUM_STATE + SHOWN * NUM_CANDIDATE
STEPS, ROLLOUT, RATE, ENTROPY, EPOCHS, MINIBATCHES = 20_480, 512, 1e-3, 0.01, 4, 8


class Flat(gymnasium.ObservationWrapper[Any, Any, Any]):
    """State and candidates as one row of numbers."""

    def __init__(self, environment: PlacementEnv) -> None:
        super().__init__(environment)
        self.placement = environment
        self.observation_space = spaces.Box(-np.inf, np.inf, (WIDTH,), np.float32)

    def observation(self, observation: Any) -> Any:
        shown = observation["candidates"][:SHOWN].ravel()
        return np.concatenate([observation["state"], shown]).astype(np.float32)

    def action_masks(self) -> Any:
        return self.placement.action_masks()


class Layers(nn.Module):
    """The network that sb3 makes of ``net_arch=[64]``, for our observations."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = _layers(MAX_CANDIDATES, last_gain=0.01)
        self.critic = _layers(1, last_gain=1.0)

    def forward(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        shown = observation["candidates"][:, :SHOWN].flatten(1)
        flat = torch.cat([observation["state"], shown], dim=1)
        return self.actor(flat), self.critic(flat).squeeze(-1)


def _layers(num_out: int, *, last_gain: float) -> nn.Sequential:
    layers: list[nn.Linear] = []
    for wide, narrow, gain in ((WIDTH, 64, 2**0.5), (64, num_out, last_gain)):
        layer = nn.Linear(wide, narrow)
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
        layers.append(layer)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def ours(instances: Sequence[Instance], seed: int, num_steps: int) -> list[float]:
    """Gaps of the greedy plans after training."""
    torch.manual_seed(seed)
    num_envs = 8
    config = PPOConfig(
        num_steps=ROLLOUT // num_envs,
        learning_rate=RATE,
        anneal=False,
        gamma=1.0,
        num_epochs=EPOCHS,
        num_minibatches=MINIBATCHES,
        entropy_weight=ENTROPY,
        clip_value_loss=False,
        seed=seed,
    )
    environment = BatchedPlacement(instances, num_envs, restarts=True)
    trainer = PPO(Layers(), environment, config, num_iterations=num_steps // ROLLOUT)
    trainer.run()
    evaluator = Evaluator(compile_instances(instances), num_samples=0)
    return list(evaluator.evaluate(trainer.policy, seed=seed).greedy_gap)


def theirs(instances: Sequence[Instance], seed: int, num_steps: int) -> list[float]:
    """The same of MaskablePPO."""
    sb3_contrib: Any = importlib.import_module("sb3_contrib")
    vector: Any = importlib.import_module("stable_baselines3.common.vec_env")
    num_envs = 8
    model = sb3_contrib.MaskablePPO(
        "MlpPolicy",
        vector.DummyVecEnv([lambda: Flat(PlacementEnv(instances))] * num_envs),
        learning_rate=RATE,
        n_steps=ROLLOUT // num_envs,
        batch_size=ROLLOUT // MINIBATCHES,
        n_epochs=EPOCHS,
        gamma=1.0,
        ent_coef=ENTROPY,
        policy_kwargs={"net_arch": [64]},
        seed=seed,
        device="cpu",
    )
    model.learn(num_steps)
    environment = Flat(PlacementEnv(instances))
    found = []
    for number, optimum_s in enumerate(optima_s(instances)):
        observation, info = environment.reset(options={"instance": number})
        is_done = (
            environment.placement.episode is not None and environment.placement.episode.is_done
        )
        while not is_done:
            masks = environment.action_masks()
            action, _ = model.predict(observation, action_masks=masks, deterministic=True)
            observation, _, is_done, _, info = environment.step(int(action))
        found.append(float(info["time_s"]) / float(optimum_s) - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder of made instances")
    parser.add_argument("--ready", action="store_true", help="only what the cache has; make none")
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    instances = instances_of("train", options.cache, ready=options.ready, limit=options.instances)
    rows = {}
    for name, learn in (("ours", ours), ("MaskablePPO", theirs)):
        gaps = []
        for seed in range(options.seeds):
            gaps.append(learn(instances, seed, options.steps))
            sys.stderr.write(f"{name} seed {seed}: mean gap {np.mean(gaps[-1]):.4f}\n")
        rows[name] = gap_figures(np.array(gaps))
    intervals = [row["interquartile_mean_interval_over_seeds"] for row in rows.values()]
    document = heading(
        "our PPO and MaskablePPO learn the same on our environment",
        num_steps=options.steps,
        intervals_overlap=bool(
            max(low for low, _ in intervals) <= min(high for _, high in intervals)
        ),
        rows=rows,
    )
    write(document, options.output)


if __name__ == "__main__":
    main()
