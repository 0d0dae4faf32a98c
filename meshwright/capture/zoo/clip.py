"""CLIP: an image tower and a text tower trained to agree.

Sizes: Radford et al. 2021 (arXiv 2103.00020), table 20. The loss compares every image of the
batch with every text, so it is not a mean over samples: a batch cut into micro-batches has
another loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.capture.zoo.family import Family, InputSampler, require, require_divisible
from meshwright.capture.zoo.layers import initialize_weights
from meshwright.capture.zoo.vit import EncoderBlock, PatchEmbedding

__all__ = ["FAMILY", "Clip", "ClipConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Sizes of both towers; feed-forward layers are four times as wide as hidden states."""

    embedding_size: int
    image_hidden: int
    image_num_layers: int
    image_num_heads: int
    patch_size: int
    text_hidden: int
    text_num_layers: int
    text_num_heads: int
    image_size: int = 224
    vocab_size: int = 49408
    seq_len: int = 77

    def __post_init__(self) -> None:
        require_divisible(self, "image_hidden", "image_num_heads")
        require_divisible(self, "text_hidden", "text_num_heads")
        require_divisible(self, "image_size", "patch_size")
        require(self.vocab_size > 1, f"vocab_size={self.vocab_size} must be at least 2")


class ImageTower(nn.Module):
    """Images to embeddings, through a ViT with a norm before its layers."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        hidden = config.image_hidden
        self.embedding = PatchEmbedding(
            image_size=config.image_size, patch_size=config.patch_size, hidden=hidden, bias=False
        )
        self.embedding_norm = nn.LayerNorm(hidden)
        self.layers = nn.ModuleList(
            EncoderBlock(hidden=hidden, num_heads=config.image_num_heads)
            for _ in range(config.image_num_layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.projection = nn.Linear(hidden, config.embedding_size, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) to (B, embedding)."""
        x_BSD = self.embedding_norm(self.embedding(images))
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        return self.projection(self.norm(x_BSD[:, 0]))


class TextTower(nn.Module):
    """Texts to embeddings, read at the token with the greatest number (the end of the text)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        hidden = config.text_hidden
        self.token_embedding = nn.Embedding(config.vocab_size, hidden)
        self.position_embedding = nn.Embedding(config.seq_len, hidden)
        self.layers = nn.ModuleList(
            EncoderBlock(hidden=hidden, num_heads=config.text_num_heads, causal=True)
            for _ in range(config.text_num_layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.projection = nn.Linear(hidden, config.embedding_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S) to (B, embedding)."""
        position_S = torch.arange(tokens.size(1), device=tokens.device)
        x_BSD = self.token_embedding(tokens) + self.position_embedding(position_S)
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        end_B11 = tokens.argmax(dim=1).view(-1, 1, 1)
        end_BD = x_BSD.gather(1, end_B11.expand(-1, 1, x_BSD.size(2))).squeeze(1)
        return self.projection(self.norm(end_BD))


class Clip(nn.Module):
    """Both towers; ``forward`` returns the contrastive loss and the similarities."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.image_tower = ImageTower(config)
        self.text_tower = TextTower(config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        initialize_weights(self)

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """``loss`` (scalar) and ``logits`` (B images, B texts)."""
        image_BD = _unit_length(self.image_tower(images))
        text_BD = _unit_length(self.text_tower(tokens))
        logits = self.log_scale.exp() * (image_BD @ text_BD.t())
        target_B = torch.arange(logits.size(0), device=logits.device)
        loss = (F.cross_entropy(logits, target_B) + F.cross_entropy(logits.t(), target_B)) / 2
        return {"loss": loss, "logits": logits}


def _unit_length(x_BD: Tensor) -> Tensor:
    return x_BD * torch.rsqrt((x_BD * x_BD).sum(dim=1, keepdim=True) + 1e-12)


def _example_inputs(
    config: ClipConfig, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Tensor]:
    """Every text ends with the greatest token, as CLIP's tokenizer makes it."""
    text = sampler.integers((batch_size, seq_len - 1), end=config.vocab_size - 1)
    end = torch.full((batch_size, 1), config.vocab_size - 1, device=sampler.device)
    return {
        "images": sampler.normal((batch_size, 3, config.image_size, config.image_size)),
        "tokens": torch.cat((text, end), dim=1),
    }


FAMILY = Family(
    name="clip",
    build=Clip,
    example_inputs=_example_inputs,
    models={
        "tiny-clip": ClipConfig(
            embedding_size=32,
            image_hidden=64,
            image_num_layers=2,
            image_num_heads=4,
            patch_size=8,
            text_hidden=32,
            text_num_layers=2,
            text_num_heads=4,
            image_size=32,
            vocab_size=128,
            seq_len=16,
        ),
        "clip-vit-b32": ClipConfig(
            embedding_size=512,
            image_hidden=768,
            image_num_layers=12,
            image_num_heads=12,
            patch_size=32,
            text_hidden=512,
            text_num_layers=12,
            text_num_heads=8,
        ),
        "clip-vit-l14": ClipConfig(
            embedding_size=768,
            image_hidden=1024,
            image_num_layers=24,
            image_num_heads=16,
            patch_size=14,
            text_hidden=768,
            text_num_layers=12,
            text_num_heads=12,
        ),
    },
)
