"""Graphs that are no chains."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from meshwright.capture.captured import capture
from meshwright.graph.opgraph import OpGraph

_WIDTH = 64


def _tower(depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(_WIDTH, _WIDTH, bias=False), nn.Tanh()]
    return nn.Sequential(*layers)


class Towers(nn.Module):
    """Two towers of products on two inputs, and the mean of their product."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.left, self.right = _tower(depth), _tower(depth)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.left(x) * self.right(y)).sum()


@cache
def towers(depth: int = 18, batch: int = 64) -> OpGraph:
    """``Towers`` on a batch; deep enough for several segments each."""
    inputs = (torch.zeros(batch, _WIDTH), torch.zeros(batch, _WIDTH))
    return capture(Towers(depth), inputs).graph
