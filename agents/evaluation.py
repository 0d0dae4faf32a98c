"""How far a policy's plans are from the best there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meshwright.agents.ppo import MaskedCategorical, tensors
from meshwright.env.batched import BatchedPlacement
from meshwright.env.compiled import Compiled

__all__ = ["EXACT", "Evaluation", "Evaluator", "play"]

FloatArray = NDArray[np.float64]

EXACT = 1e-6
"""A gap is none up to here: times are kept in single precision."""


def play(
    policy: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]],
    environment: BatchedPlacement,
    instance_B: NDArray[np.int64],
    generator: torch.Generator | None = None,
    *,
    temperature: float = 1.0,
) -> FloatArray:
    """(B,) step times of the plans that the policy comes to, one episode on each instance.

    Args:
        policy: a ``Policy`` of ``agents.ppo``.
        environment: afterwards holds the plans (``placed``).
        instance_B: numbers of the instances, as many as there are environments.
        generator: draws the decisions; without one the most probable are taken.
        temperature: logits are divided by it: above 1 the drawn ones differ more.
    """
    observation = tensors(environment.reset_to(instance_B))
    with torch.no_grad():
        for _ in range(environment.max_decisions):
            logits_BA, _ = policy(observation)
            distribution = MaskedCategorical(logits_BA / temperature, observation["action_mask"])
            action_B = distribution.mode() if generator is None else distribution.sample(generator)
            step = environment.step(action_B.numpy())
            observation = tensors(step.observation)
            time_B = np.asarray(environment.time_s(), np.float64)
            if not np.isnan(time_B).any():
                break
    return time_B


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluation:
    """Times of a policy's plans over those of the best plans, less 1; one row an instance."""

    greedy_gap: FloatArray
    sampled_gap: FloatArray
    """Of the best of greedy and samples."""
    num_samples: int

    @property
    def metrics(self) -> dict[str, float]:
        """Means, 95th percentiles, and shares of instances whose best plan was found."""
        found: dict[str, float] = {}
        for name, gap in (("greedy", self.greedy_gap), ("sampled", self.sampled_gap)):
            found[f"{name}_gap_mean"] = float(gap.mean())
            found[f"{name}_gap_p95"] = float(np.quantile(gap, 0.95))
            found[f"{name}_exact_fraction"] = float((gap <= EXACT).mean())
        return found


class Evaluator:
    """Plans a set of instances and compares with their exact optima."""

    def __init__(
        self,
        compiled: Compiled,
        *,
        num_samples: int = 64,
        temperature: float = 1.0,
        num_envs: int = 4096,
    ) -> None:
        """Nothing runs yet.

        Args:
            compiled: the instances.
            num_samples: plans drawn for each, besides the greedy one.
            temperature: they are drawn at.
            num_envs: environments at a time, about.
        """
        self.compiled = compiled
        self.optimum_I = compiled.best_s[compiled.root].astype(np.float64)
        self.num_samples = num_samples
        self.temperature = temperature
        self.num_envs = num_envs

    def evaluate(self, policy: nn.Module, *, seed: int) -> Evaluation:
        """Gaps of ``policy``, a ``Policy`` that knows these instances; equal for equal seeds."""
        count = len(self.optimum_I)
        instance_I = np.arange(count)
        greedy_I = play(policy, BatchedPlacement(self.compiled, count), instance_I)
        generator = torch.Generator().manual_seed(seed)
        best_I = greedy_I.copy()
        if self.num_samples:
            for part_P in np.array_split(instance_I, -(-count * self.num_samples // self.num_envs)):
                environment = BatchedPlacement(self.compiled, len(part_P) * self.num_samples)
                instance_B = np.repeat(part_P, self.num_samples)
                time_B = play(
                    policy, environment, instance_B, generator, temperature=self.temperature
                )
                sampled_P = time_B.reshape(len(part_P), self.num_samples).min(axis=1)
                best_I[part_P] = np.minimum(best_I[part_P], sampled_P)
        return Evaluation(
            greedy_gap=greedy_I / self.optimum_I - 1,
            sampled_gap=best_I / self.optimum_I - 1,
            num_samples=self.num_samples,
        )
