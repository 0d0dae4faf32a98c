"""What the model zoo is made of: families, their configurations, their inputs.

A family is one architecture: a frozen configuration class, a function that builds the module
and one that makes its data inputs. A named model is a configuration of its family. The
configuration field ``seq_len``, where a family has one, is the default and greatest length of
its token sequences; families without it have no sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.errors import BadModel

__all__ = ["Family", "InputSampler", "require", "require_divisible"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSampler:
    """Makes data inputs: random values, or only shapes on the meta device.

    Values are drawn on the CPU from one generator in call order, so they depend on the seed
    alone and not on the device they end on.
    """

    device: torch.device
    dtype: torch.dtype
    """Of floating-point inputs; whole numbers are int64."""
    generator: torch.Generator = field(default_factory=torch.Generator)

    def integers(self, shape: tuple[int, ...], *, end: int) -> Tensor:
        """Int64 tensor of ``shape`` uniform over ``0 .. end - 1``."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.int64, device=self.device)
        values = torch.randint(0, end, shape, generator=self.generator, device="cpu")
        return values.to(self.device)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Floating-point tensor of ``shape``, standard normal."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return values.to(device=self.device, dtype=self.dtype)

    def chosen(self, shape: tuple[int, ...], *, fraction: float) -> Tensor:
        """Boolean tensor of ``shape``, true with probability ``fraction``."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.bool, device=self.device)
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return (values < fraction).to(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of the zoo."""

    name: str
    build: Callable[[Any], nn.Module]
    """Configuration to module, on the current default device."""
    example_inputs: Callable[[Any, int, int, InputSampler], dict[str, Tensor]]
    """(configuration, batch size, sequence length, sampler) to the forward's keyword arguments;
    dim 0 of each is the batch. The sequence length is 0 for a family that has none."""
    models: Mapping[str, Any]
    """Model name to configuration."""

    def default_seq_len(self, config: Any) -> int | None:
        """The configuration's sequence length, or None where the family has no sequence."""
        seq_len: int | None = getattr(config, "seq_len", None)
        return seq_len


def require(condition: bool, message: str) -> None:
    """Raise ``BadModel(message)`` unless ``condition`` holds."""
    if not condition:
        raise BadModel(message)


def require_divisible(config: object, dividend: str, divisor: str) -> None:
    """Raise ``BadModel`` unless one field of ``config`` is a multiple of another, both positive."""
    whole, part = getattr(config, dividend), getattr(config, divisor)
    require(
        whole > 0 and part > 0 and whole % part == 0,
        f"{dividend}={whole} must be a positive multiple of {divisor}={part}; change one of them",
    )
