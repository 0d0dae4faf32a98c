"""ViT: transformer encoder over image patches, with a class token.

Sizes: Dosovitskiy et al. 2020 (arXiv 2010.11929), table 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.capture.zoo.family import Family, InputSampler, require_divisible
from meshwright.capture.zoo.layers import (
    Attention,
    FeedForward,
    dropout_layer,
    initialize_weights,
)

__all__ = ["FAMILY", "EncoderBlock", "PatchEmbedding", "ViT", "ViTConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTConfig:
    """Sizes of a ViT; the feed-forward layer is four times as wide as the hidden state."""

    hidden: int
    num_layers: int
    num_heads: int
    patch_size: int
    image_size: int = 224
    num_classes: int = 1000
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_divisible(self, "hidden", "num_heads")
        require_divisible(self, "image_size", "patch_size")


class PatchEmbedding(nn.Module):
    """Class token and patches, each with a learned position."""

    def __init__(self, *, image_size: int, patch_size: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        num_patches = (image_size // patch_size) ** 2
        self.patch = nn.Conv2d(3, hidden, kernel_size=patch_size, stride=patch_size, bias=bias)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden))
        self.position = nn.Parameter(torch.empty(1, num_patches + 1, hidden))
        nn.init.normal_(self.position, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) to (B, 1 + patches, D)."""
        patch_BSD = self.patch(images).flatten(2).transpose(1, 2)
        class_B1D = self.class_token.expand(images.size(0), -1, -1)
        return torch.cat((class_B1D, patch_BSD), dim=1) + self.position


class EncoderBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with a skip connection."""

    def __init__(
        self,
        *,
        hidden: int,
        num_heads: int,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, num_heads, causal=causal, dropout=dropout)
        self.feed_forward_norm = nn.LayerNorm(hidden)
        self.feed_forward = FeedForward(hidden, 4 * hidden)
        self.dropout = dropout_layer(dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape as the input."""
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD)))
        return x_BSD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BSD)))


class ViT(nn.Module):
    """Image classifier; ``forward`` returns the mean cross entropy."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(
            image_size=config.image_size, patch_size=config.patch_size, hidden=config.hidden
        )
        self.layers = nn.ModuleList(
            EncoderBlock(hidden=config.hidden, num_heads=config.num_heads, dropout=config.dropout)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.num_classes)
        initialize_weights(self)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Loss of classifying ``images`` (B, 3, height, width) as ``labels`` (B,)."""
        x_BSD = self.embedding(images)
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        return F.cross_entropy(self.head(self.norm(x_BSD[:, 0])), labels)


def _example_inputs(
    config: ViTConfig, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Tensor]:
    del seq_len
    return {
        "images": sampler.normal((batch_size, 3, config.image_size, config.image_size)),
        "labels": sampler.integers((batch_size,), end=config.num_classes),
    }


FAMILY = Family(
    name="vit",
    build=ViT,
    example_inputs=_example_inputs,
    models={
        "tiny-vit": ViTConfig(
            hidden=64, num_layers=4, num_heads=4, patch_size=8, image_size=32, num_classes=16
        ),
        "vit-b16": ViTConfig(hidden=768, num_layers=12, num_heads=12, patch_size=16),
        "vit-l16": ViTConfig(hidden=1024, num_layers=24, num_heads=16, patch_size=16),
        "vit-h14": ViTConfig(hidden=1280, num_layers=32, num_heads=16, patch_size=14),
    },
)
