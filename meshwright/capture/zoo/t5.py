"""T5: encoder and decoder with relative position biases.

Sizes: Raffel et al. 2019 (arXiv 1910.10683), section 3.7. One table of position biases per stack
serves all its layers; attention logits are not scaled; no linear layer has a bias; the head is
tied to the embedding and its input scaled by ``hidden ** -0.5``.

Shapes: B = batch, S = queries, K = keys, H = heads, W = head width, D = hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.capture.zoo.family import Family, InputSampler, require
from meshwright.capture.zoo.layers import (
    RMSNorm,
    dropout_layer,
    initialize_weights,
    language_model_loss,
)

__all__ = ["FAMILY", "T5", "T5Config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Config:
    """Sizes of a T5; ``num_layers`` counts each of the two stacks."""

    hidden: int
    num_layers: int
    num_heads: int
    head_width: int
    ffn: int
    vocab_size: int = 32128
    seq_len: int = 512
    num_buckets: int = 32
    max_distance: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        exact = self.num_buckets // 4
        require(
            exact > 0 and self.max_distance > 2 * exact,
            f"num_buckets={self.num_buckets} must be at least 4 and at most "
            f"2 * max_distance={2 * self.max_distance}",
        )


class PositionBias(nn.Module):
    """Learned bias per head and bucket of the distance from query to key."""

    def __init__(self, config: T5Config, *, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.num_buckets = config.num_buckets
        self.max_distance = config.max_distance
        self.table = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, seq_len: int, device: torch.device) -> Tensor:
        """Bias to add to the attention logits, (1, H, S, K); -inf for keys not to be seen."""
        position_S = torch.arange(seq_len, device=device)
        distance_SK = position_S.unsqueeze(0) - position_S.unsqueeze(1)
        bias_SKH = self.table(self._bucket(distance_SK))
        bias_1HSK = bias_SKH.permute(2, 0, 1).unsqueeze(0)
        if self.bidirectional:
            return bias_1HSK
        return bias_1HSK.masked_fill(distance_SK > 0, -math.inf)

    def _bucket(self, distance_SK: Tensor) -> Tensor:
        """Half the buckets are exact, half grow by logarithm up to ``max_distance``."""
        num_buckets = self.num_buckets
        offset: Tensor | int = 0
        if self.bidirectional:
            num_buckets //= 2
            offset = (distance_SK > 0).long() * num_buckets
            distance_SK = distance_SK.abs()
        else:
            distance_SK = (-distance_SK).clamp(min=0)
        exact = num_buckets // 2
        scale = (num_buckets - exact) / math.log(self.max_distance / exact)
        logarithm = torch.log(distance_SK.clamp(min=1).float() / exact) * scale
        far = (exact + logarithm.long()).clamp(max=num_buckets - 1)
        return torch.where(distance_SK < exact, distance_SK, far) + offset


class T5Attention(nn.Module):
    """Attention to ``memory``, with an optional bias on the logits."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        width = config.num_heads * config.head_width
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.hidden, width, bias=False)
        self.key = nn.Linear(config.hidden, width, bias=False)
        self.value = nn.Linear(config.hidden, width, bias=False)
        self.output = nn.Linear(width, config.hidden, bias=False)

    def forward(self, x_BSD: Tensor, memory_BKD: Tensor, bias_1HSK: Tensor | None) -> Tensor:
        """Same shape as ``x_BSD``."""
        mixed_BHSW = F.scaled_dot_product_attention(
            self._split_heads(self.query(x_BSD)),
            self._split_heads(self.key(memory_BKD)),
            self._split_heads(self.value(memory_BKD)),
            attn_mask=bias_1HSK,
            scale=1.0,
        )
        return self.output(mixed_BHSW.transpose(1, 2).flatten(2))

    def _split_heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class T5FeedForward(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape as the input."""
        return self.down(F.relu(self.up(x_BSD)))


class T5Layer(nn.Module):
    """Pre-norm self-attention, attention to the encoder (decoder only), feed-forward."""

    def __init__(self, config: T5Config, *, is_decoder: bool) -> None:
        super().__init__()
        self.self_norm = RMSNorm(config.hidden, epsilon=1e-6)
        self.self_attention = T5Attention(config)
        self.is_decoder = is_decoder
        if is_decoder:
            self.cross_norm = RMSNorm(config.hidden, epsilon=1e-6)
            self.cross_attention = T5Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden, epsilon=1e-6)
        self.feed_forward = T5FeedForward(config)
        self.dropout = dropout_layer(config.dropout)

    def forward(self, x_BSD: Tensor, bias_1HSK: Tensor, memory_BKD: Tensor | None) -> Tensor:
        """Same shape as the input; ``memory_BKD`` is the encoder's result, for the decoder."""
        normed = self.self_norm(x_BSD)
        x_BSD = x_BSD + self.dropout(self.self_attention(normed, normed, bias_1HSK))
        if memory_BKD is not None:
            normed = self.cross_norm(x_BSD)
            x_BSD = x_BSD + self.dropout(self.cross_attention(normed, memory_BKD, None))
        return x_BSD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BSD)))


class T5Stack(nn.Module):
    """The encoder or the decoder: layers that share one position bias, and a last norm."""

    def __init__(self, config: T5Config, *, is_decoder: bool) -> None:
        super().__init__()
        self.position_bias = PositionBias(config, bidirectional=not is_decoder)
        self.layers = nn.ModuleList(
            T5Layer(config, is_decoder=is_decoder) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden, epsilon=1e-6)

    def forward(self, x_BSD: Tensor, memory_BKD: Tensor | None = None) -> Tensor:
        """Same shape as the input."""
        bias_1HSK = self.position_bias(x_BSD.size(1), x_BSD.device)
        for layer in self.layers:
            x_BSD = layer(x_BSD, bias_1HSK, memory_BKD)
        return self.norm(x_BSD)


class T5(nn.Module):
    """Sequence-to-sequence model; ``forward`` returns the mean loss of the target tokens."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.head_scale = config.hidden**-0.5
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.encoder = T5Stack(config, is_decoder=False)
        self.decoder = T5Stack(config, is_decoder=True)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        initialize_weights(self)
        # The head's input is scaled by hidden ** -0.5, which asks for a wider embedding.
        nn.init.normal_(self.embedding.weight, std=1.0)
        self.head.weight = self.embedding.weight

    def forward(self, source_tokens: Tensor, decoder_tokens: Tensor, targets: Tensor) -> Tensor:
        """Loss of predicting ``targets`` from ``decoder_tokens``, both (B, S), and the source."""
        memory_BKD = self.encoder(self.embedding(source_tokens))
        x_BSD = self.decoder(self.embedding(decoder_tokens), memory_BKD)
        return language_model_loss(self.head(x_BSD * self.head_scale), targets)


def _example_inputs(
    config: T5Config, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Tensor]:
    """Source and target have the same length; the decoder's tokens are the shifted targets."""
    shape = (batch_size, seq_len)
    targets = sampler.integers(shape, end=config.vocab_size)
    start = torch.zeros((batch_size, 1), dtype=torch.int64, device=sampler.device)
    return {
        "source_tokens": sampler.integers(shape, end=config.vocab_size),
        "decoder_tokens": torch.cat((start, targets[:, :-1]), dim=1),
        "targets": targets,
    }


FAMILY = Family(
    name="t5",
    build=T5,
    example_inputs=_example_inputs,
    models={
        "tiny-t5": T5Config(
            hidden=32,
            num_layers=2,
            num_heads=4,
            head_width=8,
            ffn=64,
            vocab_size=128,
            seq_len=16,
            num_buckets=8,
            max_distance=16,
        ),
        "t5-small": T5Config(hidden=512, num_layers=6, num_heads=8, head_width=64, ffn=2048),
        "t5-base": T5Config(hidden=768, num_layers=12, num_heads=12, head_width=64, ffn=3072),
        "t5-large": T5Config(hidden=1024, num_layers=24, num_heads=16, head_width=64, ffn=4096),
        "t5-3b": T5Config(hidden=1024, num_layers=24, num_heads=32, head_width=128, ffn=16384),
        "t5-11b": T5Config(hidden=1024, num_layers=24, num_heads=128, head_width=128, ffn=65536),
    },
)
