"""Llama 2 and 3: rotary positions, RMS norm, gated feed-forward, grouped-query attention.

Sizes: Llama 2 from Touvron et al. 2023 (arXiv 2307.09288), Llama 3 and 3.1 from Grattafiori et
al. 2024 (arXiv 2407.21783), table 3. The rescaling of rotary frequencies for long contexts that
Llama 3.1 added is left out: it changes values, neither shapes nor operators.

Shapes: B = batch, S = sequence, H = query heads, G = key/value heads, R = H / G, W = head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.capture.zoo.family import Family, InputSampler, require, require_divisible
from meshwright.capture.zoo.layers import RMSNorm, initialize_weights, language_model_loss

__all__ = [
    "FAMILY",
    "GatedFeedForward",
    "Llama",
    "LlamaBlock",
    "LlamaConfig",
    "RotaryAttention",
    "rotary_table",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Sizes of a Llama."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn: int
    vocab_size: int
    seq_len: int
    rope_base: float = 500000.0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        require_divisible(self, "hidden", "num_heads")
        require_divisible(self, "num_heads", "num_kv_heads")
        require(
            self.hidden // self.num_heads % 2 == 0,
            f"rotary positions need an even head width, not {self.hidden}/{self.num_heads}",
        )


def rotary_table(
    *, seq_len: int, head_width: int, base: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, each (S, W), in ``like``'s dtype and device.

    Frequencies are ``base ** (-2 i / W)`` (Su et al. 2021, arXiv 2104.09864), both halves of
    the head alike. Computed in at least fp32: bfloat16 cannot tell positions above 256 apart.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    half = torch.arange(0, head_width, 2, dtype=wide, device=like.device)
    position_S = torch.arange(seq_len, dtype=wide, device=like.device)
    angle = position_S.unsqueeze(1) * torch.pow(base, half / -head_width)
    angle_SW = torch.cat((angle, angle), dim=1)
    return angle_SW.cos().to(like.dtype), angle_SW.sin().to(like.dtype)


def _rotate(x_BHSW: Tensor, cos_SW: Tensor, sin_SW: Tensor) -> Tensor:
    first, second = x_BHSW.chunk(2, dim=-1)
    return x_BHSW * cos_SW + torch.cat((-second, first), dim=-1) * sin_SW


class RotaryAttention(nn.Module):
    """Causal attention with rotary positions; groups of query heads share keys and values."""

    def __init__(self, hidden: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.head_width = hidden // num_heads
        self.queries_per_kv = num_heads // num_kv_heads
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key = nn.Linear(hidden, num_kv_heads * self.head_width, bias=False)
        self.value = nn.Linear(hidden, num_kv_heads * self.head_width, bias=False)
        self.output = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_BSD: Tensor, cos_SW: Tensor, sin_SW: Tensor) -> Tensor:
        """Attended input; same shape."""
        query_BHSW = _rotate(self._split_heads(self.query(x_BSD)), cos_SW, sin_SW)
        key_BGSW = _rotate(self._split_heads(self.key(x_BSD)), cos_SW, sin_SW)
        value_BGSW = self._split_heads(self.value(x_BSD))
        mixed_BHSW = F.scaled_dot_product_attention(
            query_BHSW, self._repeat(key_BGSW), self._repeat(value_BGSW), is_causal=True
        )
        return self.output(mixed_BHSW.transpose(1, 2).flatten(2))

    def _split_heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(2, (-1, self.head_width)).transpose(1, 2)

    def _repeat(self, x_BGSW: Tensor) -> Tensor:
        if self.queries_per_kv == 1:
            return x_BGSW
        batch, groups, seq_len, width = x_BGSW.shape
        x_BGRSW = x_BGSW.unsqueeze(2).expand(batch, groups, self.queries_per_kv, seq_len, width)
        return x_BGRSW.reshape(batch, groups * self.queries_per_kv, seq_len, width)


class GatedFeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, ffn, bias=False)
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape as the input."""
        return self.down(F.silu(self.gate(x_BSD)) * self.up(x_BSD))


class LlamaBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with a skip connection."""

    def __init__(
        self, *, hidden: int, num_heads: int, num_kv_heads: int, feed_forward: nn.Module
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(hidden)
        self.attention = RotaryAttention(hidden, num_heads, num_kv_heads)
        self.feed_forward_norm = RMSNorm(hidden)
        self.feed_forward = feed_forward

    def forward(self, x_BSD: Tensor, cos_SW: Tensor, sin_SW: Tensor) -> Tensor:
        """Same shape as the input."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SW, sin_SW)
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))


class Llama(nn.Module):
    """The language model; ``forward`` returns the mean next-token loss."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.rope_base = config.rope_base
        self.head_width = config.hidden // config.num_heads
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(
            LlamaBlock(
                hidden=config.hidden,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                feed_forward=GatedFeedForward(config.hidden, config.ffn),
            )
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        initialize_weights(self)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Loss of predicting ``targets`` (B, S) from ``tokens`` (B, S)."""
        x_BSD = self.embedding(tokens)
        cos_SW, sin_SW = rotary_table(
            seq_len=tokens.size(1), head_width=self.head_width, base=self.rope_base, like=x_BSD
        )
        for layer in self.layers:
            x_BSD = layer(x_BSD, cos_SW, sin_SW)
        return language_model_loss(self.head(self.norm(x_BSD)), targets)


def _example_inputs(
    config: LlamaConfig, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Tensor]:
    shape = (batch_size, seq_len)
    return {
        "tokens": sampler.integers(shape, end=config.vocab_size),
        "targets": sampler.integers(shape, end=config.vocab_size),
    }


def _llama2(
    hidden: int, num_layers: int, num_heads: int, num_kv_heads: int, ffn: int
) -> LlamaConfig:
    return LlamaConfig(
        hidden=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        ffn=ffn,
        vocab_size=32000,
        seq_len=4096,
        rope_base=10000.0,
    )


def _llama3(hidden: int, num_layers: int, num_heads: int, ffn: int) -> LlamaConfig:
    return LlamaConfig(
        hidden=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        ffn=ffn,
        vocab_size=128256,
        seq_len=8192,
    )


FAMILY = Family(
    name="llama",
    build=Llama,
    example_inputs=_example_inputs,
    models={
        "tiny-llama": LlamaConfig(
            hidden=64,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            ffn=128,
            vocab_size=256,
            seq_len=32,
        ),
        "llama2-7b": _llama2(4096, 32, 32, 32, 11008),
        "llama2-13b": _llama2(5120, 40, 40, 40, 13824),
        "llama2-70b": _llama2(8192, 80, 64, 8, 28672),
        "llama3-8b": _llama3(4096, 32, 32, 14336),
        "llama3-70b": _llama3(8192, 80, 64, 28672),
        "llama3-405b": _llama3(16384, 126, 128, 53248),
    },
)
