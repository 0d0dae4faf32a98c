"""Where a model comes from: what every kind of model reference resolves to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from meshwright.errors import BadModel, BadRequest

__all__ = [
    "ExampleInputs",
    "ModelSource",
    "checked_batch_size",
    "checked_seq_len",
    "num_parameters",
    "parse_overrides",
    "parse_value",
    "seeded",
    "torch_dtype",
]

ExampleInputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


class ModelSource(Protocol):
    """A model that can be built at no cost or for real, with inputs to match."""

    @property
    def reference(self) -> str:
        """What the user wrote."""
        ...

    @property
    def family(self) -> str:
        """Architecture: a family of the zoo, a Hugging Face model type, or ``"user"``."""
        ...

    @property
    def default_seq_len(self) -> int | None:
        """Sequence length where none is given; None for a model without token sequences."""
        ...

    def build(
        self,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "meta",
        *,
        seed: int = 0,
    ) -> nn.Module:
        """The module in training mode: shapes only on ``meta``, else initialized from ``seed``."""
        ...

    def example_inputs(
        self,
        batch_size: int,
        seq_len: int | None = None,
        device: str | torch.device = "meta",
        *,
        seed: int = 0,
        dtype: str | torch.dtype = "float32",
    ) -> ExampleInputs:
        """Inputs of one training step: shapes only on ``meta``, else random from ``seed``.

        ``dtype`` is that of floating-point inputs. Raises BadRequest for a batch size or
        sequence length that the model cannot take.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Reference, family, number of parameters, default sequence length, configuration."""
        ...


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The floating-point dtype of this name (``"bfloat16"``); BadRequest if there is none."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        message = f"no floating-point dtype {dtype!r}; use float32, bfloat16, float16 or float64"
        raise BadRequest(message)
    return named


@contextmanager
def seeded(seed: int, device: str | torch.device) -> Iterator[None]:
    """Tensors are made on ``device`` from ``seed``; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        yield


def num_parameters(module: nn.Module) -> int:
    """Elements of all distinct parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def checked_seq_len(reference: str, requested: int | None, default: int | None, limit: int) -> int:
    """The sequence length to use, 0 for a model without sequences.

    Raises BadRequest for a length that such a model cannot take or that is above ``limit``.
    """
    if default is None:
        if requested is not None:
            raise BadRequest(
                f"{reference} has no sequence length, but {requested} was asked for; "
                f"leave the sequence length out"
            )
        return 0
    seq_len = default if requested is None else requested
    if not 1 <= seq_len <= limit:
        raise BadRequest(
            f"sequence length {seq_len} is not between 1 and {limit}, the longest {reference} takes"
        )
    return seq_len


def checked_batch_size(batch_size: int) -> int:
    """``batch_size``, if it is positive; BadRequest otherwise."""
    if batch_size < 1:
        raise BadRequest(f"batch size {batch_size} must be at least 1")
    return batch_size


def parse_overrides(reference: str) -> tuple[str, dict[str, str]]:
    """Split ``"name?a=1&b=2"`` into the name and the overrides as written."""
    name, mark, query = reference.partition("?")
    overrides: dict[str, str] = {}
    for item in query.split("&") if mark else ():
        key, equals, value = item.partition("=")
        if not key or not equals or not value:
            raise BadModel(f"cannot read {item!r} in {reference!r}; write NAME?key=value&key=value")
        if key in overrides:
            raise BadModel(f"{key!r} is given twice in {reference!r}; give it once")
        overrides[key] = value
    return name, overrides


def parse_value(key: str, text: str, like: object) -> Any:
    """``text`` as a value of ``like``'s type: bool, int, float, str or a tuple of ints.

    Raises BadModel where it is not one.
    """
    kinds: Mapping[type, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        tuple: "whole numbers joined by commas",
    }
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(like, int):
            return int(text)
        if isinstance(like, float):
            return float(text)
        if isinstance(like, tuple):
            return tuple(int(part) for part in text.split(","))
    except (KeyError, ValueError):
        raise BadModel(f"{key}={text} must be {kinds[type(like)]}") from None
    return text
