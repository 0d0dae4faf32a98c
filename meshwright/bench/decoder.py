"""Decoders as training frameworks write them, on shapes alone: what measured runs executed.

Where frameworks differ from plain PyTorch in what they launch, an option says so:

- queries, keys and values come from one product, grouped by key/value head (Megatron, MPT), and
  so do gate and up;
- attention is one fused operator, or written out: two products with a softmax and, in training
  with dropout, a mask between. Scale and causal mask are part of the softmax, as in Megatron's
  kernel;
- with ``fuses_pointwise`` a norm is one operator, and so is the rotation of positions: a layer norm
  stands for the RMS norm and one product for the rotation, which read and write as much;
- the loss is computed in fp32, or with ``fused_loss`` in a kernel that makes no fp32 copy of the
  logits;
- a ReLU stands for dropout: it reads and writes as much, but for the mask of one byte, and can be
  cut along any dim, where each rank of a framework draws numbers of its own.

Shapes: B = batch, S = sequence, D = hidden, H = query heads, G = key/value heads, R = H / G,
W = head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.capture.zoo.experts import ExpertLayer, Experts, GatedExperts, Routing
from meshwright.capture.zoo.family import require
from meshwright.capture.zoo.layers import RMSNorm
from meshwright.capture.zoo.llama import rotary_table

__all__ = ["Decoder", "DecoderConfig"]

_LEAST_GROUP = 64
"""Tokens that share a dispatch: small, so that sending rows to experts costs their bytes and
little arithmetic, as the permutation kernels of frameworks do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes and options of a decoder."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    ffn: int
    vocab_size: int
    seq_len: int
    gated: bool = False
    tie_embeddings: bool = True
    rotary: bool = False
    """Otherwise positions are learned."""
    rms_norm: bool = False
    bias: bool = True
    dropout: float = 0.0
    causal: bool = True
    """Otherwise every token sees all others: an encoder (BERT)."""
    fused_attention: bool = True
    fuses_pointwise: bool = False
    fused_loss: bool = False
    num_experts: int = 0
    """0: no layer has experts, else every layer has."""
    top_k: int = 1
    expert_ffn: int = 0

    def __post_init__(self) -> None:
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}",
        )
        require(
            not self.rotary or self.head_width % 2 == 0,
            f"rotary positions need an even head width, not {self.head_width}",
        )
        require(
            not self.num_experts or 1 <= self.top_k <= self.num_experts,
            f"top_k={self.top_k} must be 1 to num_experts={self.num_experts}",
        )


def _norm(config: DecoderConfig) -> nn.Module:
    if config.rms_norm and not config.fuses_pointwise:
        return RMSNorm(config.hidden)
    return nn.LayerNorm(config.hidden, bias=config.bias and not config.rms_norm)


def _dropout(config: DecoderConfig) -> nn.Module:
    return nn.ReLU() if config.dropout > 0 else nn.Identity()


class _Attention(nn.Module):
    """Causal attention of one fused product."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.per_group = config.num_heads // config.num_kv_heads
        width, groups = config.head_width, config.num_kv_heads
        self.projection = nn.Linear(
            config.hidden, groups * (self.per_group + 2) * width, bias=config.bias
        )
        self.output = nn.Linear(config.num_heads * width, config.hidden, bias=config.bias)
        self.dropout = _dropout(config)

    def forward(self, x_BSD: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attended input; same shape."""
        width, per_group = self.config.head_width, self.per_group
        grouped = self.projection(x_BSD).unflatten(2, (self.config.num_kv_heads, -1))
        query, key, value = grouped.split([per_group * width, width, width], dim=3)
        query_BHSW = query.unflatten(3, (per_group, width)).flatten(2, 3).transpose(1, 2)
        key_BGSW, value_BGSW = key.transpose(1, 2), value.transpose(1, 2)
        if turn is not None:
            query_BHSW = self._turned(query_BHSW, *turn)
            key_BGSW = self._turned(key_BGSW, *turn)
        key_BHSW, value_BHSW = self._repeat(key_BGSW), self._repeat(value_BGSW)
        if self.config.fused_attention:
            mixed_BHSW = F.scaled_dot_product_attention(
                query_BHSW, key_BHSW, value_BHSW, is_causal=self.config.causal
            )
        else:
            score_BHSK = torch.matmul(query_BHSW, key_BHSW.transpose(2, 3))
            mixed_BHSW = torch.matmul(self.dropout(F.softmax(score_BHSK, dim=3)), value_BHSW)
        return self.output(mixed_BHSW.transpose(1, 2).flatten(2))

    def _turned(self, x_BHSW: Tensor, cos_SW: Tensor, sin_SW: Tensor) -> Tensor:
        if self.config.fuses_pointwise:
            return x_BHSW * cos_SW
        first, second = x_BHSW.chunk(2, dim=-1)
        return x_BHSW * cos_SW + torch.cat((-second, first), dim=-1) * sin_SW

    def _repeat(self, x_BGSW: Tensor) -> Tensor:
        if self.per_group == 1:
            return x_BGSW
        x_BGRSW = x_BGSW.unsqueeze(2).expand(-1, -1, self.per_group, -1, -1)
        return x_BGRSW.flatten(1, 2)


class _FeedForward(nn.Module):
    """Linear, GELU, linear, or gated: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gated = config.gated
        self.up = nn.Linear(config.hidden, config.ffn, bias=config.bias)
        if config.gated:
            self.gate = nn.Linear(config.hidden, config.ffn, bias=config.bias)
        self.down = nn.Linear(config.ffn, config.hidden, bias=config.bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape as the input."""
        up_BSF = self.up(x_BSD)
        if self.gated:
            return self.down(F.silu(self.gate(x_BSD)) * up_BSF)
        return self.down(F.gelu(up_BSF, approximate="tanh"))


def _experts(config: DecoderConfig) -> nn.Module:
    ffn = config.expert_ffn or config.ffn
    group = _LEAST_GROUP
    # Experts take whole rows: as many tokens to a group as gives each of them at least one.
    while group * config.top_k < config.num_experts and group < config.seq_len:
        group *= 2
    while group > 1 and config.seq_len % group:
        group //= 2
    kind = GatedExperts if config.gated else Experts
    return ExpertLayer(
        hidden=config.hidden,
        routing=Routing(
            num_experts=config.num_experts,
            top_k=config.top_k,
            capacity_factor=1.0,
            group_size=group,
        ),
        experts=kind(config.num_experts, config.hidden, ffn),
    )


class _Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a skip connection."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = _Attention(config)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = _experts(config) if config.num_experts else _FeedForward(config)
        self.dropout = _dropout(config)

    def forward(self, x_BSD: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Same shape as the input."""
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD), turn))
        return x_BSD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BSD)))


class Decoder(nn.Module):
    """The language model; ``forward`` returns the mean next-token loss."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        if not config.rotary:
            self.position = nn.Embedding(config.seq_len, config.hidden)
        self.dropout = _dropout(config)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.norm = _norm(config)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Loss of predicting ``targets`` (B, S) from ``tokens`` (B, S)."""
        x_BSD = self.embedding(tokens)
        turn = None
        if self.config.rotary:
            turn = rotary_table(
                seq_len=tokens.size(1), head_width=self.config.head_width, base=1e4, like=x_BSD
            )
        else:
            x_BSD = x_BSD + self.position(torch.arange(tokens.size(1), device=tokens.device))
        x_BSD = self.dropout(x_BSD)
        for layer in self.layers:
            x_BSD = layer(x_BSD, turn)
        logits_BSV = self.head(self.norm(x_BSD))
        if not self.config.fused_loss:
            logits_BSV = logits_BSV.float()
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets.flatten())
