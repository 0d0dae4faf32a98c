"""GPT: decoder-only transformer with learned positions, as GPT-2 and GPT-3.

Sizes: GPT-2 from Radford et al. 2019, table 2 (the smallest, announced as 117M, has 124M
parameters); GPT-3 from Brown et al. 2020 (arXiv 2005.14165), table 2.1; ``gpt-*`` from Alpa
(arXiv 2201.12023), table 5. The vocabulary of the latter two is padded from 50257 to 51200 as
Alpa and Megatron do. The attention patterns of GPT-3 are dense here; the paper's alternate with
sparse ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meshwright.capture.zoo.family import Family, InputSampler, require_divisible
from meshwright.capture.zoo.layers import (
    Attention,
    FeedForward,
    dropout_layer,
    initialize_weights,
    language_model_loss,
)

__all__ = ["FAMILY", "GPT", "GPTBlock", "GPTConfig", "GPTEmbedding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """Sizes of a GPT; the feed-forward layer is four times as wide as the hidden state."""

    hidden: int
    num_layers: int
    num_heads: int
    vocab_size: int = 51200
    seq_len: int = 1024
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_divisible(self, "hidden", "num_heads")


class GPTBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with a skip connection."""

    def __init__(
        self, *, hidden: int, num_heads: int, dropout: float, feed_forward: nn.Module
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, num_heads, causal=True, dropout=dropout)
        self.feed_forward_norm = nn.LayerNorm(hidden)
        self.feed_forward = feed_forward
        self.dropout = dropout_layer(dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape as the input."""
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD)))
        return x_BSD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BSD)))


class GPTEmbedding(nn.Module):
    """Sum of token and position embeddings."""

    def __init__(self, *, vocab_size: int, seq_len: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, hidden)
        self.position = nn.Embedding(seq_len, hidden)
        self.dropout = dropout_layer(dropout)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Hidden states, (B, S, D)."""
        positions_S = torch.arange(tokens_BS.size(1), device=tokens_BS.device)
        return self.dropout(self.token(tokens_BS) + self.position(positions_S))


class GPT(nn.Module):
    """The language model; ``forward`` returns the mean next-token loss."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = GPTEmbedding(
            vocab_size=config.vocab_size,
            seq_len=config.seq_len,
            hidden=config.hidden,
            dropout=config.dropout,
        )
        self.layers = nn.ModuleList(
            GPTBlock(
                hidden=config.hidden,
                num_heads=config.num_heads,
                dropout=config.dropout,
                feed_forward=FeedForward(config.hidden, 4 * config.hidden, approximate="tanh"),
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        initialize_weights(self)
        if config.tie_embeddings:
            self.head.weight = self.embedding.token.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Loss of predicting ``targets`` (B, S) from ``tokens`` (B, S)."""
        x_BSD = self.embedding(tokens)
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        return language_model_loss(self.head(self.norm(x_BSD)), targets)


def _example_inputs(
    config: GPTConfig, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Tensor]:
    shape = (batch_size, seq_len)
    return {
        "tokens": sampler.integers(shape, end=config.vocab_size),
        "targets": sampler.integers(shape, end=config.vocab_size),
    }


def _gpt2(hidden: int, num_layers: int, num_heads: int) -> GPTConfig:
    return GPTConfig(
        hidden=hidden, num_layers=num_layers, num_heads=num_heads, vocab_size=50257, seq_len=1024
    )


def _alpa(hidden: int, num_layers: int, num_heads: int) -> GPTConfig:
    return GPTConfig(hidden=hidden, num_layers=num_layers, num_heads=num_heads)


def _gpt3(hidden: int, num_layers: int, num_heads: int) -> GPTConfig:
    return GPTConfig(hidden=hidden, num_layers=num_layers, num_heads=num_heads, seq_len=2048)


FAMILY = Family(
    name="gpt",
    build=GPT,
    example_inputs=_example_inputs,
    models={
        "tiny-gpt": GPTConfig(hidden=64, num_layers=4, num_heads=4, vocab_size=256, seq_len=32),
        "gpt2": _gpt2(768, 12, 12),
        "gpt2-medium": _gpt2(1024, 24, 16),
        "gpt2-large": _gpt2(1280, 36, 20),
        "gpt2-xl": _gpt2(1600, 48, 25),
        "gpt-350m": _alpa(1024, 24, 16),
        "gpt-760m": _alpa(1536, 24, 16),
        "gpt-1.3b": _alpa(2048, 24, 32),
        "gpt-2.6b": _alpa(2560, 32, 32),
        "gpt-6.7b": _alpa(4096, 32, 32),
        "gpt-15b": _alpa(5120, 48, 40),
        "gpt-39b": _alpa(8192, 48, 64),
        "gpt3-125m": _gpt3(768, 12, 12),
        "gpt3-350m": _gpt3(1024, 24, 16),
        "gpt3-760m": _gpt3(1536, 24, 16),
        # Table 2.1 gives 24 heads of width 128, which do not make 2048; 16 do.
        "gpt3-1.3b": _gpt3(2048, 24, 16),
        "gpt3-2.7b": _gpt3(2560, 32, 32),
        "gpt3-6.7b": _gpt3(4096, 32, 32),
        # Table 2.1 gives a hidden size of 5140, which 40 heads do not divide; 5120 is meant.
        "gpt3-13b": _gpt3(5120, 40, 40),
        "gpt3-175b": _gpt3(12288, 96, 96),
    },
)
