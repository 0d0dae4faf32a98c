"""Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347), in one file.

Reads top to bottom: settings, distribution over valid actions, advantages, loss, rollouts, the
trainer, its checkpoint. Details follow "The 37 implementation details of PPO" (Huang et al. 2022):
orthogonal initialization is the policy's own business; Adam's epsilon is 1e-5; advantages are
normalized over each minibatch; the learning rate falls linearly; gradients are clipped by norm.

Three baselines. ``value``: generalized advantages (arXiv 1506.02438), bootstrapped at truncation
with the value of the last observation. ``group``: environments in blocks of ``group_size`` play the
same instance, and an episode's advantage is its return less the mean of its group's. ``best``: what
counts is the best return of the group (MEX), and an episode's advantage is what it adds to that.

Under torchrun every rank collects and learns; gradients are averaged.

T = steps of a rollout, B = environments, N = T * B samples, M = samples of a minibatch, A = actions
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meshwright.agents.checkpoint import load_training, save_training
from meshwright.agents.ranks import average_gradients, mean_over_ranks, rank_and_size
from meshwright.env.batched import Transition
from meshwright.errors import BadRequest

__all__ = [
    "PPO",
    "BatchedEnvironment",
    "Iteration",
    "MaskedCategorical",
    "PPOConfig",
    "Policy",
    "Samples",
    "Transition",
    "best_advantages",
    "generalized_advantages",
    "group_advantages",
    "tensors",
]

Observation = Mapping[str, Tensor]
"""Name to (B, ...); ``action_mask`` (B, A), true where an action is valid, is optional."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOConfig:
    """Settings of a training run; the defaults are those published for CartPole."""

    num_steps: int = 128
    """T: steps of every environment between updates."""
    learning_rate: float = 2.5e-4
    anneal: bool = True
    """The learning rate falls linearly to 0 over the run."""
    gamma: float = 0.99
    gae_lambda: float = 0.95
    num_minibatches: int = 4
    num_epochs: int = 4
    clip_range: float = 0.2
    clip_value_loss: bool = True
    entropy_weight: float = 0.01
    value_weight: float = 0.5
    max_gradient_norm: float = 0.5
    target_kl: float | None = None
    """Stop the epochs of an update when the policy has moved this far."""
    normalize_advantages: bool = True
    baseline: Literal["value", "group", "best"] = "value"
    group_size: int = 1
    """K: environments in a row that play the same instance; baselines of groups need 2 or more."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.baseline != "value" and self.group_size < 2:
            raise BadRequest(
                f"group_size is {self.group_size}; a {self.baseline} baseline needs 2 or more "
                f"rollouts of an instance, or use baseline='value'"
            )


# --- What may be done -----------------------------------------------------------------------------


class MaskedCategorical:
    """A distribution over the valid actions alone: others have probability 0 and no gradient."""

    def __init__(self, logits_BA: Tensor, mask_BA: Tensor | None = None) -> None:
        if mask_BA is not None:
            logits_BA = logits_BA.masked_fill(~mask_BA, float("-inf"))
        self.log_probability_BA = torch.log_softmax(logits_BA, dim=-1)
        self._mask_BA = mask_BA

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(B,) actions."""
        probability_BA = self.log_probability_BA.exp()
        return torch.multinomial(probability_BA, 1, generator=generator).squeeze(-1)

    def mode(self) -> Tensor:
        """(B,) most probable actions."""
        return self.log_probability_BA.argmax(-1)

    def log_probability(self, action_B: Tensor) -> Tensor:
        """Of each row's action; (B,)."""
        return self.log_probability_BA.gather(-1, action_B.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """(B,) in nats."""
        log_BA = self.log_probability_BA
        if self._mask_BA is not None:
            log_BA = log_BA.masked_fill(~self._mask_BA, 0.0)
            return -(log_BA * log_BA.exp() * self._mask_BA).sum(-1)
        return -(log_BA * log_BA.exp()).sum(-1)


class Policy(Protocol):
    """A module that decides and values."""

    def __call__(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Logits (B, A) and values (B,)."""
        ...


class BatchedEnvironment(Protocol):
    """B environments that step together."""

    num_envs: int

    def reset(self, *, seed: int) -> Mapping[str, NDArray[Any]]:
        """First observations of new episodes, decided by ``seed`` alone."""
        ...

    def step(self, action_B: NDArray[np.int64]) -> Transition:
        """Act in every environment."""
        ...


# --- How good it was ------------------------------------------------------------------------------


def generalized_advantages(
    reward_TB: Tensor,
    value_TB: Tensor,
    next_value_TB: Tensor,
    *,
    terminated_TB: Tensor,
    ended_TB: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Advantages (T, B) by generalized advantage estimation.

    ::

        delta_t = r_t + gamma (1 - terminated_t) V(s_t+1) - V(s_t)
        A_t     = delta_t + gamma lambda (1 - ended_t) A_t+1

    Args:
        reward_TB: of every step.
        value_TB: of the state before it.
        next_value_TB: of the state after it: of the final observation where the episode ended.
        terminated_TB: the episode is over; nothing comes after.
        ended_TB: terminated or truncated; the sum stops here.
        gamma: discount.
        gae_lambda: weight of longer looks ahead.
    """
    delta_TB = reward_TB + gamma * next_value_TB * (~terminated_TB) - value_TB
    advantage_TB = torch.zeros_like(delta_TB)
    after_B = torch.zeros_like(delta_TB[0])
    for t in reversed(range(len(delta_TB))):
        after_B = delta_TB[t] + gamma * gae_lambda * (~ended_TB[t]) * after_B
        advantage_TB[t] = after_B
    return advantage_TB


def group_advantages(return_B: Tensor, group_size: int) -> Tensor:
    """(B,) returns less the mean of their group, blocks of ``group_size`` in a row."""
    grouped = return_B.reshape(-1, group_size)
    return (grouped - grouped.mean(dim=1, keepdim=True)).reshape(-1)


def best_advantages(return_B: Tensor, group_size: int) -> Tensor:
    """(B,) by how much the best return of the group would fall without this one.

    The best of the others does not depend on an episode, so this is an unbiased estimate for the
    expectation of the best of K (Walder and Karkhanis 2025, arXiv 2505.15201).
    """
    grouped = return_B.reshape(-1, group_size)
    top = grouped.topk(2, dim=1)
    advantage = torch.zeros_like(grouped)
    return advantage.scatter(1, top.indices[:, :1], top.values[:, :1] - top.values[:, 1:]).flatten()


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """N samples of a rollout."""

    observation: dict[str, Tensor]
    action_N: Tensor
    log_probability_N: Tensor
    advantage_N: Tensor
    return_N: Tensor
    value_N: Tensor

    def rows(self, index_M: Tensor) -> Samples:
        """Those samples alone."""
        return Samples(
            observation={name: item[index_M] for name, item in self.observation.items()},
            **{name: getattr(self, name)[index_M] for name in _SAMPLE_COLUMNS},
        )


Collect = Callable[[], tuple[Samples, list[float]]]
"""Gives a rollout, and the returns of the episodes that ended in it."""


class Loss(NamedTuple):
    """A minibatch's loss, with what is worth watching of it."""

    total: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor
    approximate_kl: Tensor
    """Mean of (ratio - 1) - log(ratio), of the new policy from the old."""
    clipped_fraction: Tensor
    ratio_M: Tensor


def ppo_loss(policy: Policy, samples: Samples, config: PPOConfig) -> Loss:
    """The clipped surrogate, value and entropy losses over the samples of a minibatch."""
    logits_MA, value_M = policy(samples.observation)
    distribution = MaskedCategorical(logits_MA, samples.observation.get("action_mask"))
    log_ratio_M = distribution.log_probability(samples.action_N) - samples.log_probability_N
    ratio_M = log_ratio_M.exp()
    advantage_M = samples.advantage_N
    if config.normalize_advantages and len(advantage_M) > 1:
        advantage_M = (advantage_M - advantage_M.mean()) / (advantage_M.std() + 1e-8)
    clip = config.clip_range
    clipped_M = ratio_M.clamp(1 - clip, 1 + clip)
    policy_loss = -torch.minimum(advantage_M * ratio_M, advantage_M * clipped_M).mean()
    error_M = (value_M - samples.return_N) ** 2
    if config.clip_value_loss:
        near_M = samples.value_N + (value_M - samples.value_N).clamp(-clip, clip)
        error_M = torch.maximum(error_M, (near_M - samples.return_N) ** 2)
    value_loss = 0.5 * error_M.mean()
    entropy = distribution.entropy().mean()
    return Loss(
        total=policy_loss + config.value_weight * value_loss - config.entropy_weight * entropy,
        policy=policy_loss.detach(),
        value=value_loss.detach(),
        entropy=entropy.detach(),
        approximate_kl=((ratio_M - 1) - log_ratio_M).mean().detach(),
        clipped_fraction=((ratio_M - 1).abs() > clip).float().mean().detach(),
        ratio_M=ratio_M.detach(),
    )


class Iteration(NamedTuple):
    """What an iteration of training gave."""

    number: int
    """Counted from 1."""
    num_env_steps: int
    """Since the beginning of the run."""
    episode_returns: tuple[float, ...]
    """Of the episodes that ended."""
    metrics: dict[str, float]
    """Losses and the like, means over minibatches."""


# --- Training -------------------------------------------------------------------------------------


class PPO:
    """Collects rollouts with a policy and improves it.

    With baselines of groups every rollout begins with new episodes; otherwise they go on.
    """

    def __init__(
        self,
        policy: nn.Module,
        environment: BatchedEnvironment,
        config: PPOConfig,
        *,
        num_iterations: int,
    ) -> None:
        """Nothing runs yet.

        Args:
            policy: a ``Policy``.
            environment: what to act in.
            config: the settings.
            num_iterations: rollouts and updates of the whole run; for annealing.

        Raises:
            BadRequest: environments do not make whole groups.
        """
        count, size = environment.num_envs, config.group_size
        if count % size:
            raise BadRequest(f"{count} environments do not make groups of {size}; add or drop some")
        self.policy = policy
        self.environment = environment
        self.config = config
        self.num_iterations = num_iterations
        self.iteration = 0
        self.num_env_steps = 0
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, eps=1e-5)
        self.generator = torch.Generator().manual_seed(config.seed * 1_000_003 + rank_and_size()[0])
        self._observation: Observation | None = None
        self._return_B = torch.zeros(environment.num_envs)

    def run(self, on_iteration: Callable[[Iteration], None] | None = None) -> None:
        """Train to the end, telling ``on_iteration`` of each iteration."""
        tell = on_iteration or (lambda found: None)
        while self.iteration < self.num_iterations:
            tell(self.train_iteration())

    def train_iteration(self, collect: Collect | None = None) -> Iteration:
        """One rollout, by ``collect`` where others play, and its update."""
        if self.config.anneal:
            share = 1.0 - self.iteration / self.num_iterations
            for group in self.optimizer.param_groups:
                group["lr"] = share * self.config.learning_rate
        samples, finished = (collect or self.collect)()
        metrics = self.update(samples)
        self.iteration += 1
        return Iteration(
            number=self.iteration,
            num_env_steps=self.num_env_steps,
            episode_returns=tuple(finished),
            metrics=metrics,
        )

    # Rollout ----------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self) -> tuple[Samples, list[float]]:
        """See ``Collect``."""
        config, num_envs = self.config, self.environment.num_envs
        if self._observation is None or config.baseline != "value":
            seed = int(torch.randint(2**31, (1,), generator=self.generator))
            self._observation = tensors(self.environment.reset(seed=seed))
            self._return_B = torch.zeros(num_envs)
        observations: list[Observation] = []
        columns: dict[str, list[Tensor]] = {name: [] for name in _COLUMNS}
        finished: list[float] = []
        for _ in range(config.num_steps):
            observation = self._observation
            logits_BA, value_B = self.policy(observation)
            distribution = MaskedCategorical(logits_BA, observation.get("action_mask"))
            action_B = distribution.sample(self.generator)
            found = self.environment.step(action_B.numpy())
            terminated_B = torch.from_numpy(found.terminated_B)
            truncated_B = torch.from_numpy(found.truncated_B)
            reward_B = torch.from_numpy(found.reward_B).float()
            valid = found.is_valid_B
            valid_B = torch.ones_like(terminated_B) if valid is None else torch.from_numpy(valid)
            self._observation = tensors(found.observation)
            final_value_B = torch.zeros(num_envs)
            if found.final_observation is not None and truncated_B.any():
                rows = truncated_B.nonzero().squeeze(-1)
                last = {k: v[rows] for k, v in tensors(found.final_observation).items()}
                final_value_B[rows] = self.policy(last)[1]
            ended_B = terminated_B | truncated_B
            observations.append(observation)
            step = (action_B, distribution.log_probability(action_B), value_B, reward_B,
                    terminated_B, ended_B, final_value_B, valid_B)  # fmt: skip
            for name, item in zip(_COLUMNS, step, strict=True):
                columns[name].append(item)
            self._return_B += reward_B * valid_B
            finished += self._return_B[ended_B & valid_B].tolist()
            self._return_B[ended_B] = 0.0
        stacked = {name: torch.stack(items) for name, items in columns.items()}
        self.num_env_steps += int(stacked["valid"].sum())
        return self._samples(observations, stacked), finished

    def _samples(self, observations: list[Observation], of: dict[str, Tensor]) -> Samples:
        """The rollout's samples, advantages worked out, waiting environments left out."""
        config = self.config
        assert self._observation is not None, "a rollout has been collected"
        value_TB = of["value"]
        if config.baseline != "value":
            advantages = group_advantages if config.baseline == "group" else best_advantages
            return_B = (of["reward"] * of["valid"]).sum(dim=0)
            advantage_TB = advantages(return_B, config.group_size).expand_as(value_TB)
            return_TB = return_B.expand_as(value_TB)
        else:
            last_B = self.policy(self._observation)[1]
            next_value_TB = torch.cat([value_TB[1:], last_B.unsqueeze(0)])
            next_value_TB = torch.where(of["ended"], of["final_value"], next_value_TB)
            advantage_TB = generalized_advantages(
                of["reward"],
                value_TB,
                next_value_TB,
                terminated_TB=of["terminated"],
                ended_TB=of["ended"],
                gamma=config.gamma,
                gae_lambda=config.gae_lambda,
            )
            return_TB = advantage_TB + value_TB
        rows = of["valid"].flatten().nonzero().squeeze(-1)
        return Samples(
            observation={
                name: torch.stack([item[name] for item in observations]).flatten(0, 1)[rows]
                for name in observations[0]
            },
            action_N=of["action"].flatten()[rows],
            log_probability_N=of["log_probability"].flatten()[rows],
            advantage_N=advantage_TB.flatten()[rows],
            return_N=return_TB.flatten()[rows],
            value_N=value_TB.flatten()[rows],
        )

    # Update -----------------------------------------------------------------------------------

    def update(self, samples: Samples) -> dict[str, float]:
        """Improve the policy by a rollout, and say how it went."""
        config = self.config
        sums: dict[str, float] = {}
        count, size, first_error = 0, len(samples.action_N), 0.0
        for epoch in range(config.num_epochs):
            kl = 0.0
            order_N = torch.randperm(size, generator=self.generator)
            for rows_M in order_N.tensor_split(min(config.num_minibatches, size)):
                loss = ppo_loss(self.policy, samples.rows(rows_M), config)
                self.optimizer.zero_grad()
                loss.total.backward()
                average_gradients(self.policy)
                norm = nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_gradient_norm)
                self.optimizer.step()
                if epoch == 0 and count == 0:
                    first_error = float((loss.ratio_M - 1).abs().max())
                kl = float(loss.approximate_kl)
                for name in ("policy", "value", "entropy", "approximate_kl", "clipped_fraction"):
                    sums[name] = sums.get(name, 0.0) + float(getattr(loss, name))
                sums["gradient_norm"] = sums.get("gradient_norm", 0.0) + float(norm)
                count += 1
            if config.target_kl is not None and mean_over_ranks(kl) > config.target_kl:
                break
        variance = float(samples.return_N.var()) if len(samples.return_N) > 1 else 0.0
        residual = samples.return_N - samples.value_N
        explained = 1 - float(residual.var()) / variance if variance > 0 else float("nan")
        metrics = {name: amount / max(count, 1) for name, amount in sums.items()}
        return metrics | {"first_ratio_error": first_error, "explained_variance": explained}

    # Checkpoint -------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors) with all that a run goes on from.

        A run whose rollouts begin with new episodes goes on bit for bit.
        """
        facts = {"config": asdict(self.config), "iteration": self.iteration}
        facts |= {"num_iterations": self.num_iterations, "num_env_steps": self.num_env_steps}
        save_training(path, self.policy, self.optimizer, self.generator, facts)

    def load(self, path: Path) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            BadRequest: the file is missing, damaged, or of a run with other settings.
        """
        wanted = {"config": asdict(self.config), "num_iterations": self.num_iterations}
        facts = load_training(path, self.policy, self.optimizer, self.generator, wanted)
        self.iteration = int(facts["iteration"])
        self.num_env_steps = int(facts["num_env_steps"])
        self._observation = None


_SAMPLE_COLUMNS = ("action_N", "log_probability_N", "advantage_N", "return_N", "value_N")
_COLUMNS = ("action", "log_probability", "value", "reward", "terminated", "ended", "final_value",
            "valid")  # fmt: skip


def tensors(observation: Mapping[str, NDArray[Any]]) -> Observation:
    """The same arrays as tensors; the mask, numbers in Gymnasium, as truth values."""
    found = {name: torch.from_numpy(np.asarray(item)) for name, item in observation.items()}
    if "action_mask" in found:
        found["action_mask"] = found["action_mask"].bool()
    return found
