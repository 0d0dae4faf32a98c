"""Tiny models for the capture tests, and a check of a graph against eager PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.capture import CapturedModel, StepResult, capture, execute

VOCABULARY, WIDTH = 11, 8


def tokens(*, ignored: bool = False) -> tuple[Tensor, Tensor]:
    """Two sequences of five tokens, and targets of which one may be ignored."""
    inputs = torch.arange(10).view(2, 5) % VOCABULARY
    targets = inputs.roll(-1, 1).clone()
    if ignored:
        targets[0, 0] = -100
    return inputs, targets


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.ffn(x)


class TinyGPT(nn.Module):
    """Two layers; the output projection is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        x = self.embed(inputs)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return {
            "logits": logits,
            "loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        }


class RenamedGPT(nn.Module):
    """``TinyGPT`` under other names."""

    def __init__(self, original: TinyGPT) -> None:
        super().__init__()
        self.words = original.embed
        self.blocks = original.layers
        self.projection = original.head
        self.nothing = original.unused

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        x = self.words(a)
        for block in self.blocks:
            x = block(x)
        scores = self.projection(x)
        return {"scores": scores, "loss": F.cross_entropy(scores.flatten(0, 1), b.flatten())}


class SmallConv(nn.Module):
    """Convolution, batch norm, in-place activation, pooling, dropout; returns a tuple."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 4)
        self.scale = torch.full((4,), 2.0, dtype=torch.float64)

    def forward(self, batch: Mapping[str, Any], *, label: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(self.act(self.norm(self.conv(batch["image"]["left"]))), 2)
        scores = self.head(self.drop(x.mean((2, 3)))) * self.scale
        return F.cross_entropy(scores, label), scores


def images() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``SmallConv``."""
    image = torch.linspace(-1, 1, 2 * 3 * 8 * 8, dtype=torch.float64).view(2, 3, 8, 8).sin()
    return ({"image": {"left": image}, "flag": True},), {"label": torch.tensor([0, 3])}


def as_eager(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> tuple[CapturedModel, StepResult]:
    """Captures ``model``, runs the graph, and asserts that eager PyTorch gives the same in fp64.

    Compared are loss, every gradient (and which there are) and every buffer.
    """
    captured = capture(model, args, kwargs)
    inputs = captured.graph_inputs(model, args, kwargs)
    torch.manual_seed(3)
    result = execute(captured.graph, {key: tensor.clone() for key, tensor in inputs.items()})
    torch.manual_seed(3)
    returned = model(*args, **(kwargs or {}))
    loss = returned if isinstance(returned, Tensor) else _loss_in(returned)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    expected = {n: g for n, g in zip(trained, gradients, strict=True) if g is not None}
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(result.loss, loss.detach(), **close)
    torch.testing.assert_close(result.gradients, expected, **close)
    for name, buffer in model.named_buffers():
        if name in result.buffer_updates:
            torch.testing.assert_close(result.buffer_updates[name], buffer, **close)
    return captured, result


def _loss_in(returned: Any) -> Tensor:
    loss = returned["loss"] if isinstance(returned, dict) else returned[0]
    assert isinstance(loss, Tensor)
    return loss
