"""A policy as two files: its weights (safetensors) and a card that says what they are (JSON)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from meshwright.agents.policy import PlacementPolicy, PolicySettings
from meshwright.env.graph import NUM_NODE_FEATURES
from meshwright.env.instance import CUTS, DECISIONS, ROW_FEATURES
from meshwright.env.observation import CANDIDATE_FEATURES, STATE_FEATURES
from meshwright.errors import BadRequest
from meshwright.gnn_cost.weights import load_weights, save_weights
from meshwright.strict_json import JsonValue, convert

__all__ = ["POLICY_VERSION", "load_policy", "new_policy", "save_policy"]

POLICY_VERSION = 1
"""Raised when the network's formulas change and equal weights mean something else."""

_KIND = "planner"
_COMMAND = "meshwright train"


def new_policy(
    *, hidden: int = 64, num_rounds: int = 2, encoder: str = "graph", seed: int = 0
) -> PlacementPolicy:
    """An untrained policy for the observations of ``env.observation``.

    Raises:
        BadRequest: there is no such encoder.
    """
    if encoder not in ("graph", "mlp"):
        raise BadRequest(f"encoder is {encoder!r}; choose 'graph' or 'mlp'")
    settings = PolicySettings(
        num_node_features=NUM_NODE_FEATURES,
        num_state_features=len(STATE_FEATURES),
        num_candidate_features=len(CANDIDATE_FEATURES),
        hidden=hidden,
        num_rounds=num_rounds,
        encoder="graph" if encoder == "graph" else "mlp",
    )
    return PlacementPolicy(settings, seed=seed)


def save_policy(policy: PlacementPolicy, path: Path, card: Mapping[str, JsonValue]) -> None:
    """Write ``path`` (``.safetensors``) and beside it the card (``.json``), each atomically."""
    tensors = {name: item.numpy() for name, item in policy.state_dict().items()}
    whole: dict[str, JsonValue] = {
        "policy_version": POLICY_VERSION,
        "columns": _columns(),
        "settings": asdict(policy.settings),
        **card,
    }
    save_weights(path, tensors, kind=_KIND, card=whole)


def load_policy(path: Path) -> tuple[PlacementPolicy, dict[str, JsonValue]]:
    """The policy in ``path`` and its card.

    Raises:
        BadRequest: a file is missing or damaged, or of a version that observes something else.
    """
    versions = {"policy_version": POLICY_VERSION}
    tensors, card = load_weights(path, kind=_KIND, versions=versions, command=_COMMAND)
    card_path = path.with_suffix(".json")
    for name, columns in _columns().items():
        found = card.get("columns")
        if not isinstance(found, dict) or found.get(name) != columns:
            raise BadRequest(
                f"{card_path}: its policy looks at other {name}; make the weights again with "
                f"`{_COMMAND}`"
            )
    settings = convert(
        card.get("settings"), PolicySettings, error=BadRequest, name=f"{card_path}: settings"
    )
    if max(settings.hidden, settings.num_rounds) > _LARGEST or settings.hidden < 1:
        raise BadRequest(
            f"{card_path}: settings: hidden is {settings.hidden}; no policy is so wide"
        )
    policy = PlacementPolicy(settings)
    try:
        policy.load_state_dict({name: torch.from_numpy(one) for name, one in tensors.items()})
    except RuntimeError as error:
        raise BadRequest(
            f"{path}: its tensors do not fit the settings on the card; make the weights again "
            f"with `{_COMMAND}`"
        ) from error
    return policy.eval(), card


_LARGEST = 4096


def _columns() -> dict[str, JsonValue]:
    """Everything whose order the weights rely on."""
    return {
        "decisions": list(DECISIONS),
        "row_features": list(ROW_FEATURES),
        "cuts": list(CUTS),
        "state_features": list(STATE_FEATURES),
        "candidate_features": list(CANDIDATE_FEATURES),
    }
