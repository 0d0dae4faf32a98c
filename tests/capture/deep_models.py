"""Deep models in which layers are alike, or only look alike, for the tests of folding."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DEPTH, WIDTH = 7, 4


class Block(nn.Module):
    """One residual layer."""

    def __init__(self, *, factor: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.factor = factor
        self.hidden_factors = [1.0]

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.linear(self.norm(x)).tanh()
        return x + inner * self.factor * self.hidden_factors[0]


Mixing = Callable[["Deep", Tensor], Tensor]


class Deep(nn.Module):
    """Layers between two linear maps; ``mixing`` calls them."""

    def __init__(self, mixing: Mixing, *blocks: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(blocks or (Block() for _ in range(DEPTH)))
        self.last = nn.Linear(WIDTH, 1)
        self.mixing = mixing
        self.num_layers = DEPTH
        self.as_list = list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.mixing(self, self.first(x)))
        return result.square().mean()


def data() -> Tensor:
    return torch.ones(2, 3)


def chain(model: Deep, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(x)
    return x


def work_between_layers(model: Deep, x: Tensor) -> Tensor:
    start = x
    for layer in model.layers:
        x = layer(x + start).relu()
    return x


def running_sum(model: Deep, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for layer in model.layers:
        x = layer(x)
        total = total + x
    return total


def checkpointed(model: Deep, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = checkpoint(layer, x, use_reentrant=False)
    return x


def sliced(model: Deep, x: Tensor) -> Tensor:
    for layer in model.layers[: model.num_layers]:
        x = layer(x)
    return x


def factor_of_position(model: Deep, x: Tensor) -> Tensor:
    for position, layer in enumerate(model.layers):
        x = layer(x) * (position + 1)
    return x


def factor_of_depth(model: Deep, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(x) * (1 / len(model.layers))
    return x


def factor_of_depth_at_the_end(model: Deep, x: Tensor) -> Tensor:
    return chain(model, x) / len(model.layers)


def constant_of_depth(model: Deep, x: Tensor) -> Tensor:
    return chain(model, x) * torch.tensor([float(len(model.layers))])


def constant_of_position(model: Deep, x: Tensor) -> Tensor:
    for position, layer in enumerate(model.layers):
        x = layer(x) * torch.tensor([float(position)])
    return x


def fifth_doubled(model: Deep, x: Tensor) -> Tensor:
    for position, layer in enumerate(model.layers):
        x = layer(x) * (2.0 if position == 5 else 1.0)
    return x


def fifth_detached(model: Deep, x: Tensor) -> Tensor:
    for position, layer in enumerate(model.layers):
        x = layer(x.detach() if position == 5 else x)
    return x


def fifth_without_gradient(model: Deep, x: Tensor) -> Tensor:
    for position, layer in enumerate(model.layers):
        with torch.set_grad_enabled(position != 5):
            x = layer(x) + x
    return x


def fifth_in_other_precision(model: Deep, x: Tensor) -> Tensor:
    for position, layer in enumerate(model.layers):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=position == 5):
            x = layer(x)
    return x


def fifth_on_another_line(model: Deep, x: Tensor) -> Tensor:
    for position, layer in enumerate(model.layers):
        if position == 5:  # noqa: SIM108 - the line is what differs
            x = layer(x) + 1.0
        else:
            x = layer(x) + 1.0
    return x


def fifth_with_a_truth_value(model: Deep, x: Tensor) -> Tensor:
    for position, layer in enumerate(model.layers):
        x = layer(x) * (True if position == 5 else 1)
    return x


def fifth_with_idle_dropout(model: Deep, x: Tensor) -> Tensor:
    for position, layer in enumerate(model.layers):
        x = F.dropout(layer(x), 0.0, training=position == 5)
    return x


def fifth_with_hook(model: Deep, x: Tensor) -> Tensor:
    for position, layer in enumerate(model.layers):
        x = layer(x)
        if position == 5:
            x.register_hook(lambda gradient: gradient * 2)  # type: ignore[no-untyped-call]
    return x


def tapped(model: Deep, x: Tensor) -> Tensor:
    taps = []
    for position, layer in enumerate(model.layers):
        x = layer(x)
        if position in (0, 5):
            taps.append(x)
    return x + torch.stack(taps).sum(0)


def densely_connected(model: Deep, x: Tensor) -> Tensor:
    seen = [x]
    for layer in model.layers:
        seen.append(layer(torch.stack(seen).sum(0)))
    return seen[-1]


def reads_two_back(model: Deep, x: Tensor) -> Tensor:
    before = x
    for layer in model.layers:
        before, x = x, layer(x) + before
    return x


def nested_skips(model: Deep, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    for position, layer in enumerate(model.layers):
        x = layer(x)
        if position >= len(model.layers) / 2:
            x = x + seen[len(model.layers) - 1 - position]
        seen.append(x)
    return x


def reads_third_from_the_end(model: Deep, x: Tensor) -> Tensor:
    seen = [x]
    for layer in model.layers:
        seen.append(layer(seen[-1]))
    return seen[-1] + seen[-3]


def reads_third(model: Deep, x: Tensor) -> Tensor:
    seen = [x]
    for layer in model.layers:
        seen.append(layer(seen[-1]))
    return seen[-1] + seen[3]


def summed(model: Deep, x: Tensor) -> Tensor:
    seen = []
    for layer in model.layers:
        x = layer(x)
        seen.append(x)
    total = seen[0]
    for item in seen[1:]:
        total = total + item
    return total


def stacked(model: Deep, x: Tensor) -> Tensor:
    seen = []
    for layer in model.layers:
        x = layer(x)
        seen.append(x)
    return torch.stack(seen).mean(0)


def counted_loop(model: Deep, x: Tensor) -> Tensor:
    for position in range(model.num_layers):
        x = model.layers[position](x)
    return x


def python_list(model: Deep, x: Tensor) -> Tensor:
    for layer in model.as_list:
        x = layer(x)
    return x


def backwards(model: Deep, x: Tensor) -> Tensor:
    for layer in reversed(model.layers):
        x = layer(x)
    return x


def twice(model: Deep, x: Tensor) -> Tensor:
    return chain(model, chain(model, x))


def randomly_dropped(model: Deep, x: Tensor) -> Tensor:
    for layer in model.layers:
        if random.random() < 0.7:
            x = layer(x)
    return x


REGULAR: tuple[Mixing, ...] = (chain, work_between_layers, running_sum, checkpointed, sliced)
"""In these all layers do the same."""

IRREGULAR: tuple[Mixing, ...] = (
    factor_of_position,
    factor_of_depth,
    factor_of_depth_at_the_end,
    constant_of_depth,
    constant_of_position,
    fifth_doubled,
    fifth_detached,
    fifth_without_gradient,
    fifth_in_other_precision,
    fifth_on_another_line,
    fifth_with_a_truth_value,
    fifth_with_idle_dropout,
    fifth_with_hook,
    tapped,
    densely_connected,
    reads_two_back,
    nested_skips,
    reads_third_from_the_end,
    reads_third,
    summed,
    stacked,
    counted_loop,
    python_list,
    backwards,
    twice,
    randomly_dropped,
)
"""In these some layer does not, or what follows depends on their number."""
