"""BERT: bidirectional encoder trained to fill masked tokens.

Sizes: Devlin et al. 2018 (arXiv 1810.04805), section 3. The head is that of the published
checkpoints: linear, GELU, norm, decoder tied to the token embedding with a bias of its own. No
next-sentence loss, hence no pooler.
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
    language_model_loss,
)

__all__ = ["FAMILY", "Bert", "BertConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BertConfig:
    """Sizes of a BERT; the feed-forward layer is four times as wide as the hidden state."""

    hidden: int
    num_layers: int
    num_heads: int
    vocab_size: int = 30522
    seq_len: int = 512
    num_segments: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_divisible(self, "hidden", "num_heads")


class BertLayer(nn.Module):
    """Post-norm attention and feed-forward, each with a skip connection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config.hidden, config.num_heads, dropout=config.dropout)
        self.attention_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.feed_forward = FeedForward(config.hidden, 4 * config.hidden)
        self.feed_forward_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.dropout = dropout_layer(config.dropout)

    def forward(self, x_BSD: Tensor, mask: Tensor) -> Tensor:
        """Same shape as the input."""
        x_BSD = self.attention_norm(x_BSD + self.dropout(self.attention(x_BSD, mask)))
        return self.feed_forward_norm(x_BSD + self.dropout(self.feed_forward(x_BSD)))


class Bert(nn.Module):
    """Masked language model; ``forward`` returns the mean loss over the masked tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.position_embedding = nn.Embedding(config.seq_len, config.hidden)
        self.segment_embedding = nn.Embedding(config.num_segments, config.hidden)
        self.embedding_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.dropout = dropout_layer(config.dropout)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_layers))
        self.transform = nn.Linear(config.hidden, config.hidden)
        self.transform_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.decoder = nn.Linear(config.hidden, config.vocab_size)
        initialize_weights(self)
        self.decoder.weight = self.token_embedding.weight

    def forward(
        self, tokens: Tensor, segments: Tensor, attention_mask: Tensor, targets: Tensor
    ) -> Tensor:
        """Loss over positions whose target is not -100; all inputs (B, S), mask 1 = real token."""
        position_S = torch.arange(tokens.size(1), device=tokens.device)
        x_BSD = self.token_embedding(tokens) + self.segment_embedding(segments)
        x_BSD = self.embedding_norm(x_BSD + self.position_embedding(position_S))
        x_BSD = self.dropout(x_BSD)
        mask_B11S = attention_mask.bool().unsqueeze(1).unsqueeze(2)
        for layer in self.layers:
            x_BSD = layer(x_BSD, mask_B11S)
        x_BSD = self.transform_norm(F.gelu(self.transform(x_BSD)))
        return language_model_loss(self.decoder(x_BSD), targets)


def _example_inputs(
    config: BertConfig, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Tensor]:
    """15 % of the tokens are to be predicted, as in the paper; no padding."""
    shape = (batch_size, seq_len)
    original = sampler.integers(shape, end=config.vocab_size)
    masked = sampler.chosen(shape, fraction=0.15)
    return {
        "tokens": original.masked_fill(masked, 0),
        "segments": sampler.integers(shape, end=config.num_segments),
        "attention_mask": torch.ones(shape, dtype=torch.int64, device=sampler.device),
        "targets": original.masked_fill(masked.logical_not(), -100),
    }


FAMILY = Family(
    name="bert",
    build=Bert,
    example_inputs=_example_inputs,
    models={
        "tiny-bert": BertConfig(hidden=64, num_layers=4, num_heads=4, vocab_size=256, seq_len=32),
        "bert-base": BertConfig(hidden=768, num_layers=12, num_heads=12),
        "bert-large": BertConfig(hidden=1024, num_layers=24, num_heads=16),
    },
)
