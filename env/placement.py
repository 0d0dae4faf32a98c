"""``meshwright/Placement-v0``: one plan an episode, decision by decision, for Gymnasium.

An action is a candidate's number; ``action_masks`` says which are valid, and no episode gets stuck.
The reward comes at the end, ``log(reference_s / time_s)`` of the finished plan. Whoever takes an
action that is masked, or no candidate's number at all, ends the episode with ``MASKED_REWARD``.
An episode that has ended takes no further step before ``reset``.

A = MAX_CANDIDATES.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from meshwright.env.drawing import drawn, told
from meshwright.env.episode import Episode
from meshwright.env.graph import MAX_EDGES, MAX_NODES, NUM_NODE_FEATURES, padded
from meshwright.env.instance import DECISIONS, MAX_CANDIDATES, EdgeType, Instance, NodeType
from meshwright.env.observation import NUM_CANDIDATE, NUM_STATE
from meshwright.env.toys import toy_instances
from meshwright.errors import BadRequest

__all__ = ["ENVIRONMENT_ID", "MASKED_REWARD", "GraphObservation", "PlacementEnv", "register"]

Observation = dict[str, Any]

_MOST = 64.0
"""No feature is larger: logarithms are scaled or cut off."""

ENVIRONMENT_ID = "meshwright/Placement-v0"

MASKED_REWARD = -10.0
"""Of an episode that a masked action ends: worse than any plan that fits."""


class PlacementEnv(gymnasium.Env[Observation, np.int64]):
    """Gymnasium's environment over some instances; each episode draws one."""

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 2}  # noqa: RUF012

    def __init__(
        self, instances: Sequence[Instance] | None = None, *, render_mode: str | None = None
    ) -> None:
        """Nothing is drawn yet.

        Args:
            instances: what to plan; by default the toys.
            render_mode: ``ansi`` (text), ``rgb_array`` (a picture), or ``None``.

        Raises:
            BadRequest: there is no instance, or no such mode.
        """
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise BadRequest(f"render_mode {render_mode!r} is none of ansi, rgb_array")
        self.instances = toy_instances() if instances is None else tuple(instances)
        if not self.instances:
            raise BadRequest("no instances to plan; give at least one")
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(MAX_CANDIDATES)
        self.observation_space = spaces.Dict(
            {
                "decision": spaces.Discrete(len(DECISIONS)),
                "action_mask": spaces.MultiBinary(MAX_CANDIDATES),
                "candidates": _box(MAX_CANDIDATES, NUM_CANDIDATE),
                "state": _box(NUM_STATE),
                "instance": spaces.Discrete(len(self.instances)),
                "node_features": _box(MAX_NODES, NUM_NODE_FEATURES),
                "node_type": spaces.MultiDiscrete([len(NodeType)] * MAX_NODES),
                "edge_index": spaces.MultiDiscrete(np.full((2, MAX_EDGES), MAX_NODES)),
                "edge_type": spaces.MultiDiscrete([len(EdgeType)] * MAX_EDGES),
                "num_nodes": spaces.Discrete(MAX_NODES + 1),
                "num_edges": spaces.Discrete(MAX_EDGES + 1),
            }
        )
        self.episode: Episode | None = None
        """The plan as it grows; ``None`` before the first ``reset``."""
        self._number = 0
        self._has_ended = False

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a plan.

        Args:
            seed: of the instances drawn from here on.
            options: ``{"instance": 3}`` takes that one instead of drawing.

        Raises:
            BadRequest: there is no such instance, or no such option.
            NoFeasiblePlan: nothing fits in it.
        """
        asked = self._asked(options or {})
        super().reset(seed=seed)
        drawn_number = int(self.np_random.integers(len(self.instances)))
        self._number = drawn_number if asked is None else asked
        self.episode = Episode(self.instances[self._number])
        self._has_ended = False
        return self._observe(), {"instance": self.instances[self._number].name}

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Make a decision; where nothing is left to decide, any action will do.

        Returns observation, reward, whether the plan is complete, never truncated, and for a
        complete plan its ``time_s`` and ``placed`` (row, variants and cut).

        Raises:
            BadRequest: before ``reset``, after the end, or the action is no whole number.
        """
        episode = self._running()
        if self._has_ended:
            raise BadRequest("the episode has ended; call reset before the next step")
        slot = _whole(action, "the action")
        if not episode.is_done:
            if not (0 <= slot < len(episode.valid) and episode.valid[slot]):
                self._has_ended = True
                return self._observe(), MASKED_REWARD, True, False, {"masked": True}
            episode.choose(slot)
        placed = episode.placed
        if placed is None:
            return self._observe(), 0.0, False, False, {}
        self._has_ended = True
        reward = math.log(episode.instance.reference_s / episode.time_s)
        info = {
            "time_s": episode.time_s,
            "placed": (placed.row, *placed.variants, placed.cut),
        }
        return self._observe(), reward, True, False, info

    def action_masks(self) -> NDArray[np.bool_]:
        """(A,) which actions are valid; of a complete plan the first, which does nothing."""
        valid = self._running().valid
        mask = np.zeros(MAX_CANDIDATES, dtype=bool)
        mask[: len(valid)] = valid
        if not len(valid):
            mask[0] = True
        return mask

    def render(self) -> Any:
        """The plan as it grows: text, or an (H, W, 3) picture, by ``render_mode``."""
        if self.render_mode is None:
            return None
        episode = self._running()
        return told(episode) if self.render_mode == "ansi" else drawn(episode)

    def _asked(self, options: Mapping[str, Any]) -> int | None:
        unknown = sorted(str(name) for name in options if name != "instance")
        if unknown:
            raise BadRequest(f"no option {unknown[0]!r} of reset; there is only 'instance'")
        if "instance" not in options:
            return None
        number = _whole(options["instance"], "option instance")
        if not 0 <= number < len(self.instances):
            raise BadRequest(f"no instance {number}; there are {len(self.instances)}")
        return number

    def _running(self) -> Episode:
        if self.episode is None:
            raise BadRequest("the environment has not been reset; call reset first")
        return self.episode

    def _observe(self) -> Observation:
        episode = self._running()
        candidates = np.zeros((MAX_CANDIDATES, NUM_CANDIDATE), dtype=np.float32)
        if not episode.is_done:
            found = episode.candidates()
            candidates[: len(found)] = found
        graph: dict[str, Any] = padded(episode.instance.graph)
        return {
            "decision": np.int64(episode.decision),
            "action_mask": self.action_masks().astype(np.int8),
            "candidates": candidates,
            "state": episode.state(),
            "instance": np.int64(self._number),
            **graph,
            "num_nodes": np.int64(graph["num_nodes"]),
            "num_edges": np.int64(graph["num_edges"]),
        }


_GRAPH_KEYS = (
    *("node_features", "node_type", "edge_index", "edge_type"),
    *("num_nodes", "num_edges"),
)


class GraphObservation(gymnasium.ObservationWrapper[Observation, np.int64, Observation]):
    """The graph as a ``GraphInstance`` under ``graph``, instead of padded arrays.

    A node's features begin with its type, one-hot; an edge has its type.
    """

    def __init__(self, env: gymnasium.Env[Observation, np.int64]) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Dict), "a placement environment"
        kept = {
            name: space
            for name, space in env.observation_space.spaces.items()
            if name not in _GRAPH_KEYS
        }
        graph = spaces.Graph(
            node_space=_box(len(NodeType) + NUM_NODE_FEATURES),
            edge_space=spaces.Discrete(len(EdgeType)),
        )
        self.observation_space = spaces.Dict({**kept, "graph": graph})

    def observation(self, observation: Observation) -> Observation:
        """The same with a graph."""
        num_nodes, num_edges = int(observation["num_nodes"]), int(observation["num_edges"])
        one_hot = np.eye(len(NodeType), dtype=np.float32)[observation["node_type"][:num_nodes]]
        kept = {name: item for name, item in observation.items() if name not in _GRAPH_KEYS}
        graph = spaces.GraphInstance(
            nodes=np.concatenate([one_hot, observation["node_features"][:num_nodes]], axis=1),
            edges=observation["edge_type"][:num_edges],
            edge_links=observation["edge_index"][:, :num_edges].T,
        )
        return {**kept, "graph": graph}

    def action_masks(self) -> NDArray[np.bool_]:
        """Of the environment below."""
        inner = self.unwrapped
        assert isinstance(inner, PlacementEnv), "a placement environment"
        return inner.action_masks()


def _whole(number: Any, what: str) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise BadRequest(f"{what} is {number!r}; give a whole number") from None


def _box(*shape: int) -> spaces.Box:
    return spaces.Box(-_MOST, _MOST, shape=shape, dtype=np.float32)


def register() -> None:
    """Make ``ENVIRONMENT_ID`` known to Gymnasium; again does nothing."""
    if ENVIRONMENT_ID not in gymnasium.registry:
        gymnasium.register(ENVIRONMENT_ID, entry_point="meshwright.env.placement:PlacementEnv")


register()
