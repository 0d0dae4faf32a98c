"""Small captured graphs that cost and solver tests share; each is captured once."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from meshwright.capture.captured import capture
from meshwright.capture.references import resolve_model
from meshwright.graph.opgraph import OpGraph


class TwoLinear(nn.Module):
    """Two products without bias, 4 -> 8 -> 2, and the mean of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8, bias=False)
        self.second = nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).sum()


class WholeBatch(nn.Module):
    """Its loss needs the whole batch at once: a product of two sums over it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = (x * self.weight).sum()
        return y * y


@cache
def two_linear(batch: int = 16) -> OpGraph:
    """``TwoLinear`` on a batch of 16."""
    return capture(TwoLinear(), (torch.zeros(batch, 4),)).graph


@cache
def whole_batch(batch: int = 8) -> OpGraph:
    """``WholeBatch`` on a batch of 8."""
    return capture(WholeBatch(), (torch.zeros(batch, 4),)).graph


@cache
def zoo(reference: str, batch: int, dtype: str = "float32") -> OpGraph:
    """A zoo model at a global batch."""
    source = resolve_model(reference)
    args, kwargs = source.example_inputs(batch, dtype=dtype)
    return capture(source.build(dtype), args, kwargs).graph


@cache
def tiny_gpt(batch: int = 16) -> OpGraph:
    """Two blocks of width 32."""
    reference = "tiny-gpt?num_layers=2&hidden=32&num_heads=4&vocab_size=64&seq_len=8"
    return zoo(reference, batch)
