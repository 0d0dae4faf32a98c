"""Learning from what is known to be good: cross entropy towards a teacher's choices.

The exact teacher knows for every candidate the least time that any completion of it takes. Its
target is soft: candidates that cost little more than the best get a share,
``softmax(-log(time) / temperature)``. It teaches at the states of optimal paths and at those that
the pupil itself comes to (DAgger, Ross et al. 2011, arXiv 1011.0686), where the pupil needs it.
The value learns the best return that can still be had.

N = lessons, B = environments, A = candidates, M = lessons of a minibatch
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meshwright.agents.checkpoint import load_training, save_training
from meshwright.agents.policy import UNKNOWN
from meshwright.agents.ppo import Iteration, MaskedCategorical, tensors
from meshwright.agents.ranks import average_gradients, rank_and_size
from meshwright.env.batched import BatchedPlacement
from meshwright.env.instance import Instance

__all__ = [
    "ExactTeacher",
    "Imitation",
    "ImitationConfig",
    "Lessons",
    "PlacementTeacher",
    "Teacher",
    "soft_targets",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImitationConfig:
    """Settings of a phase of imitation."""

    learning_rate: float = 1e-3
    """Falls to 0 over the phase as half a cosine."""
    num_epochs: int = 1
    """Passes over the lessons of an iteration."""
    num_minibatches: int = 8
    unknown_fraction: float = 0.0
    """Of the lessons, learned without the graph of the instance (its embedding is 0): what is
    known of the candidates must then do, so that instances are not learned by heart."""
    value_weight: float = 0.1
    max_gradient_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """N states and what to do there."""

    observation: Mapping[str, Tensor]
    """(N, ...)"""
    target_NA: Tensor
    """Probabilities; rows sum to 1."""
    value_N: Tensor
    """Best return to be had; NaN where it is not known."""

    @classmethod
    def joined(
        cls,
        observations: Sequence[Mapping[str, Tensor]],
        targets: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Self:
        """Those of several steps as one."""
        names = observations[0]
        return cls(
            observation={name: torch.cat([item[name] for item in observations]) for name in names},
            target_NA=torch.cat([*targets]),
            value_N=torch.cat([*values]),
        )

    def __len__(self) -> int:
        """N."""
        return len(self.value_N)


class Teacher(Protocol):
    """Makes lessons for a pupil."""

    num_env_steps: int
    """Decisions taken so far to make lessons."""

    def lessons(self, pupil: nn.Module, generator: torch.Generator) -> Lessons:
        """New lessons, decided by the pupil's weights and ``generator``."""
        ...


def soft_targets(time_BA: Tensor, temperature: float) -> Tensor:
    """(B, A) probabilities, the higher the less the time; infinite times get none."""
    return torch.softmax(-time_BA.double().log() / temperature, dim=-1).float()


@dataclass
class PlacementTeacher:
    """What teachers have in common that play in the environment."""

    environment: BatchedPlacement
    """Over ``instances``."""
    instances: Sequence[Instance]
    """What lessons are drawn from."""
    num_env_steps: int = field(default=0, init=False)
    """See ``Teacher``."""

    def begin(self, generator: torch.Generator) -> Mapping[str, NDArray[Any]]:
        """First observations of new episodes on drawn instances."""
        return self.environment.reset(seed=int(torch.randint(2**31, (1,), generator=generator)))


@dataclass(kw_only=True)
class ExactTeacher(PlacementTeacher):
    """Teaches from the least time that each candidate can still reach."""

    temperature: float = 0.02
    """Of the targets, in units of relative time: 0.01 is one percent."""
    optimal_fraction: float = 0.25
    """Of the environments, that follow the teacher; the pupil leads the others."""

    @torch.no_grad()
    def lessons(self, pupil: nn.Module, generator: torch.Generator) -> Lessons:
        """One episode in every environment."""
        environment = self.environment
        led = slice(0, round((1 - self.optimal_fraction) * environment.num_envs))
        log_reference_I = torch.tensor([math.log(item.reference_s) for item in self.instances])
        observation = tensors(self.begin(generator))
        valid_B = torch.ones(environment.num_envs, dtype=torch.bool)
        found: list[dict[str, Tensor]] = []
        targets: list[Tensor] = []
        values: list[Tensor] = []
        for _ in range(environment.max_decisions):
            time_BA = torch.from_numpy(environment.best_time_s())
            time_BA = torch.where(valid_B.unsqueeze(-1), time_BA, torch.ones_like(time_BA))
            target_BA = soft_targets(time_BA, self.temperature)
            probability_BA = target_BA.clone()
            logits_BA, _ = pupil({name: item[led] for name, item in observation.items()})
            mask_BA = observation["action_mask"][led]
            probability_BA[led] = MaskedCategorical(logits_BA, mask_BA).log_probability_BA.exp()
            found.append({name: item[valid_B] for name, item in observation.items()})
            targets.append(target_BA[valid_B])
            log_best_B = time_BA.min(dim=-1).values.log()
            value_B = log_reference_I[observation["instance"]] - log_best_B
            values.append(value_B[valid_B].float())
            self.num_env_steps += int(valid_B.sum())
            drawn_B = torch.multinomial(probability_BA, 1, generator=generator).squeeze(-1)
            action_B = torch.where(valid_B, drawn_B, 0)
            step = environment.step(action_B.numpy())
            observation = tensors(step.observation)
            valid_B = valid_B & ~torch.from_numpy(step.terminated_B)
            if not valid_B.any():
                break
        return Lessons.joined(found, targets, values)


class Imitation:
    """A pupil, its teacher, and how far they have come; begins, saves and goes on as ``PPO``."""

    def __init__(
        self, policy: nn.Module, teacher: Teacher, config: ImitationConfig, *, num_iterations: int
    ) -> None:
        """Nothing runs yet; ``policy`` is a ``Policy`` of ``agents.ppo``."""
        self.policy = policy
        self.teacher = teacher
        self.config = config
        self.num_iterations = num_iterations
        self.iteration = 0
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, eps=1e-5)
        seed = config.seed * 1_000_003 + rank_and_size()[0]
        self.generator = torch.Generator().manual_seed(seed)

    def train_iteration(self) -> Iteration:
        """New lessons, and some passes over them; the return is not looked at."""
        share = self.iteration / self.num_iterations
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * (1 + math.cos(math.pi * share)) / 2
        metrics = self._learn(self.teacher.lessons(self.policy, self.generator))
        self.iteration += 1
        return Iteration(
            number=self.iteration,
            num_env_steps=self.teacher.num_env_steps,
            episode_returns=(),
            metrics=metrics,
        )

    def _learn(self, lessons: Lessons) -> dict[str, float]:
        sums = {"cross_entropy": 0.0, "excess": 0.0, "value": 0.0, "agreement": 0.0}
        config, count = self.config, 0
        for _ in range(config.num_epochs):
            order_N = torch.randperm(len(lessons), generator=self.generator)
            for rows_M in order_N.tensor_split(min(config.num_minibatches, len(lessons))):
                observation = {name: item[rows_M] for name, item in lessons.observation.items()}
                drawn_M = torch.rand(len(rows_M), generator=self.generator)
                unknown_M = drawn_M < config.unknown_fraction
                observation["instance"] = observation["instance"].masked_fill(unknown_M, UNKNOWN)
                logits_MA, value_M = self.policy(observation)
                found = MaskedCategorical(logits_MA, observation["action_mask"])
                target_MA = lessons.target_NA[rows_M]
                log_MA = found.log_probability_BA.masked_fill(~observation["action_mask"], 0.0)
                cross_entropy = -(target_MA * log_MA).sum(-1).mean()
                best_M = lessons.value_N[rows_M]
                known_M = best_M.isfinite()
                error_M = torch.where(known_M, value_M - best_M.nan_to_num(), 0.0)
                value_loss = 0.5 * (error_M**2).mean()
                self.optimizer.zero_grad()
                (cross_entropy + config.value_weight * value_loss).backward()
                average_gradients(self.policy)
                nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_gradient_norm)
                self.optimizer.step()
                sums["cross_entropy"] += float(cross_entropy.detach())
                entropy = -(target_MA * target_MA.clamp(min=1e-30).log()).sum(-1).mean()
                sums["excess"] += float(cross_entropy.detach()) - float(entropy)
                sums["value"] += float(value_loss.detach())
                agree_M = found.mode() == target_MA.argmax(-1)
                sums["agreement"] += float(agree_M.float().mean())
                count += 1
        return {name: amount / max(count, 1) for name, amount in sums.items()}

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors) with all that the phase goes on from, bit for bit."""
        facts = {"config": asdict(self.config), "iteration": self.iteration}
        facts |= {"num_iterations": self.num_iterations}
        facts |= {"num_env_steps": self.teacher.num_env_steps}
        save_training(path, self.policy, self.optimizer, self.generator, facts)

    def load(self, path: Path) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            BadRequest: the file is missing, damaged, or of a run with other settings.
        """
        wanted = {"config": asdict(self.config), "num_iterations": self.num_iterations}
        facts = load_training(path, self.policy, self.optimizer, self.generator, wanted)
        self.iteration = int(facts["iteration"])
        self.teacher.num_env_steps = int(facts["num_env_steps"])
