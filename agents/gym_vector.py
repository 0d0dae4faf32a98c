"""Gymnasium's vector environments as ``agents.ppo`` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from meshwright.agents.ppo import Transition
from meshwright.errors import BadRequest

__all__ = ["GymVector"]


class GymVector:
    """A vector environment whose episodes begin anew in the step that ends one.

    Observations are a mapping already, or stand under ``"observation"``.
    """

    def __init__(self, vector: VectorEnv[Any, Any, Any]) -> None:
        """Adapt ``vector``.

        Raises:
            BadRequest: it begins episodes a step later, which makes one garbage row an episode.
        """
        mode = vector.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise BadRequest(
                f"the vector environment has autoreset mode {mode}; make it with "
                f"vector_kwargs={{'autoreset_mode': AutoresetMode.SAME_STEP}}"
            )
        self.vector = vector
        self.num_envs = vector.num_envs

    @classmethod
    def make(cls, name: str, num_envs: int) -> GymVector:
        """``num_envs`` of a registered environment, in this process."""
        options = {"autoreset_mode": AutoresetMode.SAME_STEP}
        return cls(
            gymnasium.make_vec(
                name, num_envs=num_envs, vectorization_mode="sync", vector_kwargs=options
            )
        )

    def reset(self, *, seed: int) -> Mapping[str, NDArray[Any]]:
        """First observations of new episodes."""
        return _named(self.vector.reset(seed=seed)[0])

    def step(self, action_B: NDArray[np.int64]) -> Transition:
        """Act in every environment."""
        observation, reward_B, terminated_B, truncated_B, info = self.vector.step(action_B)
        found = _named(observation)
        final = None
        if truncated_B.any():
            final = {name: item.copy() for name, item in found.items()}
            for row in np.flatnonzero(truncated_B):
                for name, item in _named(info["final_obs"][row]).items():
                    final[name][row] = item
        return Transition(
            observation=found,
            reward_B=np.asarray(reward_B, dtype=np.float64),
            terminated_B=terminated_B,
            truncated_B=truncated_B,
            final_observation=final,
        )


def _named(observation: Any) -> Mapping[str, NDArray[Any]]:
    return observation if isinstance(observation, Mapping) else {"observation": observation}
