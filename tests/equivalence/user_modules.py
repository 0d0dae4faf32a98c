"""Three modules as somebody writes them who has never heard of Meshwright."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SkipNet(nn.Module):
    """Encoder and decoder with skips between them; several outputs, one a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Linear(16, 32)
        self.down2 = nn.Linear(32, 64)
        self.middle = nn.Sequential(
            *(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU()) for _ in range(8))
        )
        self.up2 = nn.Linear(128, 32)
        self.up1 = nn.Linear(64, 16)

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        first = torch.relu(self.down1(x))
        second = torch.relu(self.down2(first))
        middle = self.middle(second)
        up = torch.relu(self.up2(torch.cat([middle, second], dim=-1)))
        out = self.up1(torch.cat([up, first], dim=-1))
        smooth = middle.pow(2).mean()
        return {
            "loss": F.mse_loss(out, target) + 0.01 * smooth,
            "prediction": out,
            "smoothness": smooth,
        }


class TiedTagger(nn.Module):
    """The table of words serves three times: to read words, tags, and to score."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(48, 32)
        self.lstm_like = nn.ModuleList([nn.Linear(32, 32) for _ in range(10)])
        self.score = nn.Linear(32, 48, bias=False)
        self.score.weight = self.words.weight

    def forward(self, tokens: Tensor, tags: Tensor) -> Tensor:
        hidden = self.words(tokens) + self.words(tags).roll(1, dims=1)
        for layer in self.lstm_like:
            hidden = hidden + torch.tanh(layer(hidden))
        return F.cross_entropy(self.score(hidden).flatten(0, 1), tokens.flatten())


def _layers(depth: int) -> list[nn.Module]:
    return [layer for _ in range(depth) for layer in (nn.Linear(32, 32), nn.ReLU())]


class TwoViews(nn.Module):
    """A dictionary in, a flag beside it, and a constant written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), *_layers(5), nn.Linear(32, 24))
        self.right = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), *_layers(5), nn.Linear(32, 24))
        self.head = nn.Linear(24, 4)
        self.register_buffer("scale", torch.linspace(0.5, 2.0, 24))

    def forward(
        self, views: dict[str, Tensor], labels: Tensor, *, mix: float = 0.5, signed: bool = False
    ) -> dict[str, Tensor]:
        left, right = self.left(views["left"]), self.right(views["right"])
        joint = mix * left + (1 - mix) * right
        if signed:
            joint = joint * torch.tensor([1.0, -1.0], dtype=joint.dtype).repeat(12)
        logits = self.head(joint * self.scale)
        return {"loss": F.cross_entropy(logits, labels, reduction="sum") / 8, "logits": logits}
