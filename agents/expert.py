"""Expert iteration: search improves on what the policy draws, and the policy learns what was found.

Anthony et al. 2017 (arXiv 1705.08439). Of the samples of an instance the best is the start of a
local search; the decisions that lead to what it finds are the lesson. No optimum is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from meshwright.agents.evaluation import play
from meshwright.agents.imitation import Lessons, PlacementTeacher
from meshwright.agents.local_search import Improved, improve
from meshwright.agents.ppo import tensors
from meshwright.env.decode import Placed
from meshwright.env.instance import DECISIONS, MAX_GROUPS, ROW_DECISIONS, Instance

__all__ = ["SearchTeacher", "slots_of"]


def slots_of(instance: Instance, placed: Placed) -> NDArray[np.int64]:
    """(len(DECISIONS),) the candidate to choose at every decision to come to ``placed``."""
    slots = np.zeros(len(DECISIONS), np.int64)
    for decision in range(len(ROW_DECISIONS)):
        size = instance.rows[placed.row, decision]
        slots[decision] = np.searchsorted(instance.values(decision), size)
    first = len(ROW_DECISIONS)
    slots[first : first + instance.num_groups] = placed.variants
    slots[first + MAX_GROUPS] = placed.cut
    return slots


@dataclass(kw_only=True)
class SearchTeacher(PlacementTeacher):
    """Teaches the best plans that samples and local search find."""

    num_samples: int = 16
    """Drawn of each instance; the environments are a whole number of as many."""
    max_evaluations: int = 256
    """Plans that the search for one instance may look up."""

    @torch.no_grad()
    def lessons(self, pupil: nn.Module, generator: torch.Generator) -> Lessons:
        """One path for each of some instances."""
        environment, size = self.environment, self.num_samples
        drawn_B = np.asarray(self.begin(generator)["instance"])
        instance_G = drawn_B.reshape(-1, size)[:, 0].copy()
        play(pupil, environment, np.repeat(instance_G, size), generator)
        starts_B = environment.placed()
        found_G: list[Improved] = []
        for group, number in enumerate(instance_G):
            starts = starts_B[group * size : (group + 1) * size]
            found_G.append(
                improve(
                    self.instances[int(number)],
                    [start for start in starts if start is not None],
                    max_evaluations=self.max_evaluations,
                )
            )
        return self._paths(instance_G, found_G)

    def _paths(self, instance_G: NDArray[np.int64], found_G: Sequence[Improved]) -> Lessons:
        """The states on the way to the plans found, every environment of a group going there."""
        size = self.num_samples
        pairs = list(zip(instance_G, found_G, strict=True))
        slots_GD = np.stack([slots_of(self.instances[int(i)], best.placed) for i, best in pairs])
        value_G = [np.log(self.instances[int(i)].reference_s / best.time_s) for i, best in pairs]
        observation = tensors(self.environment.reset_to(np.repeat(instance_G, size)))
        rows: list[dict[str, torch.Tensor]] = []
        targets: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        is_valid_G = np.ones(len(pairs), np.bool_)
        for _ in range(self.environment.max_decisions):
            first_G = {name: item[::size] for name, item in observation.items()}
            action_G = slots_GD[np.arange(len(pairs)), first_G["decision"].numpy()]
            action_G = np.where(is_valid_G, action_G, 0)
            valid_G = torch.from_numpy(is_valid_G.copy())
            target_GA = torch.zeros(first_G["action_mask"].shape)
            target_GA[torch.arange(len(pairs)), torch.from_numpy(action_G)] = 1.0
            rows.append({name: item[valid_G] for name, item in first_G.items()})
            targets.append(target_GA[valid_G])
            values.append(torch.tensor(value_G, dtype=torch.float32)[valid_G])
            self.num_env_steps += int(is_valid_G.sum()) * size
            step = self.environment.step(np.repeat(action_G, size))
            observation = tensors(step.observation)
            is_valid_G = is_valid_G & ~step.terminated_B[::size]
            if not is_valid_G.any():
                break
        return Lessons.joined(rows, targets, values)
