"""A training run on disk: one safetensors file with tensors and facts; nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from meshwright.errors import BadRequest
from meshwright.strict_json import load_json, one_line, write_bytes_atomically

__all__ = ["load_training", "save_training"]

_FACTS = "facts"
"""Key of the JSON text in the file's metadata."""


def save_training(
    path: Path,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    facts: Mapping[str, Any],
) -> None:
    """Write a run's state at once or not at all; ``facts`` must be JSON."""
    tensors: dict[str, Tensor] = {
        f"policy.{name}": item for name, item in policy.state_dict().items()
    }
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": item for name, item in state.items()}
    tensors["generator"] = generator.get_state()
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: item.detach().contiguous() for name, item in tensors.items()}
    write_bytes_atomically(save(whole, metadata={_FACTS: json.dumps(facts)}), path)


def load_training(
    path: Path,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    wanted: Mapping[str, Any],
) -> dict[str, Any]:
    """Put a run's state back and return its facts, which must agree with ``wanted``.

    Raises:
        BadRequest: the file is missing, damaged, or of a run with other settings.
    """
    tensors, facts = _read(path)
    for key, value in wanted.items():
        if facts.get(key) != json.loads(json.dumps(value)):
            raise BadRequest(
                f"{path}: its run had another {key}; go on with its settings, or begin anew "
                f"elsewhere"
            )
    state: dict[int, dict[str, Tensor]] = {}
    for name, item in _with_prefix(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = item
    try:
        policy.load_state_dict(_with_prefix(tensors, "policy."))
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        generator.set_state(tensors["generator"])
    except (KeyError, ValueError, RuntimeError) as exc:
        raise BadRequest(f"{path}: not the state of this policy: {one_line(str(exc))}") from exc
    return facts


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = (file.metadata() or {}).get(_FACTS, "")
    except (OSError, SafetensorError) as exc:
        raise BadRequest(f"{path}: cannot read the checkpoint: {one_line(str(exc))}") from exc
    facts = load_json(text, error=BadRequest, name=f"{path}: facts")
    if not isinstance(facts, dict):
        raise BadRequest(f"{path}: no checkpoint of a training run; its facts are missing")
    return tensors, facts


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
