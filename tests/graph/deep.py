"""Small deep modules whose graphs repeat, nearly repeat, or only look as if they did."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from meshwright.capture.captured import capture
from meshwright.graph.opgraph import OpGraph
from meshwright.graph.simplify import with_explicit_factories


class Block(nn.Module):
    """A residual pair of products; ``width`` is that between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, width)
        self.down = nn.Linear(width, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks one after the other, of the widths given."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.start = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block(width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for block in self.blocks:
            x = block(x)
        return x.square().sum()


class Shared(Stack):
    """One block, again and again."""

    def __init__(self, depth: int) -> None:
        super().__init__((16,))
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for _ in range(self.depth):
            x = self.blocks[0](x)
        return x.square().sum()


class Gathered(Stack):
    """The sum of what all blocks return, taken at the end."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return torch.stack(states).square().sum()


def captured(module: nn.Module, batch: int = 8) -> OpGraph:
    """The graph of ``module`` on a batch, factories explicit."""
    return with_explicit_factories(capture(module, (torch.zeros(batch, 4),)).graph)


@cache
def stack(*widths: int) -> OpGraph:
    """The graph of a ``Stack``."""
    return captured(Stack(widths))
