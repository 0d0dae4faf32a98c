"""Model references: what the user writes to name a model.

Three forms, each with optional overrides ``?key=value&key=value``:

- a built-in name, ``gpt2`` or ``gpt2?num_layers=4&hidden=64``; the keys are fields of the
  family's configuration;
- ``package.module:callable``; the overrides are keyword arguments of the callable
  (see ``callables``);
- a directory with a Hugging Face ``config.json``; the keys are fields of it
  (see ``huggingface``).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meshwright.capture.callables import CallableSource
from meshwright.capture.huggingface import HuggingFaceSource
from meshwright.capture.source import (
    ExampleInputs,
    ModelSource,
    checked_batch_size,
    checked_seq_len,
    num_parameters,
    parse_overrides,
    parse_value,
    seeded,
    torch_dtype,
)
from meshwright.capture.zoo import FAMILY_OF_MODEL, Family, InputSampler
from meshwright.errors import BadModel

__all__ = ["BuiltinModel", "BuiltinSource", "builtin_models", "resolve_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltinModel:
    """One line of ``meshwright models``."""

    name: str
    family: str
    num_parameters: int
    default_seq_len: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltinSource:
    """A model of the zoo, a ``ModelSource``."""

    reference: str
    zoo_family: Family
    config: Any

    @property
    def family(self) -> str:
        """Name of the zoo family."""
        return self.zoo_family.name

    @property
    def default_seq_len(self) -> int | None:
        """The configuration's sequence length; None for a family without sequences."""
        return self.zoo_family.default_seq_len(self.config)

    def build(
        self,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "meta",
        *,
        seed: int = 0,
    ) -> nn.Module:
        """The module in training mode; values are drawn in fp32, so alike for every dtype."""
        with seeded(seed, device):
            module = self.zoo_family.build(self.config)
        return module.to(torch_dtype(dtype)).train()

    def example_inputs(
        self,
        batch_size: int,
        seq_len: int | None = None,
        device: str | torch.device = "meta",
        *,
        seed: int = 0,
        dtype: str | torch.dtype = "float32",
    ) -> ExampleInputs:
        """Inputs of one step, all by keyword; dim 0 of each is the batch."""
        default = self.default_seq_len
        length = checked_seq_len(self.reference, seq_len, default, default or 0)
        sampler = InputSampler(device=torch.device(device), dtype=torch_dtype(dtype))
        sampler.generator.manual_seed(seed)
        batch = checked_batch_size(batch_size)
        return (), self.zoo_family.example_inputs(self.config, batch, length, sampler)

    def describe(self) -> dict[str, Any]:
        """Reference, family, number of parameters, default sequence length, configuration."""
        return {
            "reference": self.reference,
            "family": self.family,
            "num_parameters": num_parameters(self.build()),
            "default_seq_len": self.default_seq_len,
            "config": dataclasses.asdict(self.config),
        }


def resolve_model(reference: str) -> ModelSource:
    """The model that ``reference`` names; see the module docstring for its forms.

    Nothing is built yet. Raises BadModel, with what is near, where it names nothing.
    """
    name, overrides = parse_overrides(reference)
    if name in FAMILY_OF_MODEL:
        return _builtin(reference, name, overrides)
    if name and Path(name).is_dir():
        return HuggingFaceSource.open(reference, Path(name), overrides)
    if ":" in name:
        return CallableSource.find(reference, name, overrides)
    if "/" in name or name.startswith("."):
        raise BadModel(f"no directory {name!r}; give one with a Hugging Face config.json in it")
    raise BadModel(
        f"no built-in model {name!r}{_suggestion(name, tuple(FAMILY_OF_MODEL))}; `meshwright "
        f"models` lists them; your own are package.module:callable or a directory with config.json"
    )


def builtin_models() -> tuple[BuiltinModel, ...]:
    """Every built-in model in the zoo's order; parameters are counted on ``meta``."""
    sources = [_builtin(name, name, {}) for name in FAMILY_OF_MODEL]
    return tuple(
        BuiltinModel(
            name=source.reference,
            family=source.family,
            num_parameters=num_parameters(source.build()),
            default_seq_len=source.default_seq_len,
        )
        for source in sources
    )


def _builtin(reference: str, name: str, overrides: dict[str, str]) -> BuiltinSource:
    family = FAMILY_OF_MODEL[name]
    config = family.models[name]
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values: dict[str, Any] = {}
    for key, text in overrides.items():
        if key not in fields:
            raise BadModel(
                f"{name} has no setting {key!r}{_suggestion(key, tuple(fields))}; "
                f"it has {', '.join(fields)}"
            )
        values[key] = parse_value(key, text, fields[key])
        _require_positive(key, values[key])
    config = dataclasses.replace(config, **values)
    return BuiltinSource(reference=reference, zoo_family=family, config=config)


def _require_positive(key: str, value: object) -> None:
    """Sizes are at least 1; dropout, the one fraction, is in [0, 1)."""
    sizes = value if isinstance(value, tuple) else (value,)
    if key == "dropout":
        if not (isinstance(value, float) and 0.0 <= value < 1.0):
            raise BadModel(f"dropout={value} must be at least 0 and below 1")
        return
    if any(not isinstance(size, bool) and not 0 < size < 2**40 for size in sizes):
        raise BadModel(f"{key}={value} must be positive (and below 2**40)")


def _suggestion(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.lower(), known, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
