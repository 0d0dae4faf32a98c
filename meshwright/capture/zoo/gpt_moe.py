"""GPT with a mixture of experts in every second layer, as Alpa benchmarks it.

Sizes: Alpa (arXiv 2201.12023), table 6; its feed-forward layers, dense ones and experts alike,
are eight times as wide as the hidden state. The smallest, 380M, follows the same rule.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from meshwright.capture.zoo.experts import ExpertLayer, Experts, Routing, check_routing
from meshwright.capture.zoo.family import Family, InputSampler, require_divisible
from meshwright.capture.zoo.gpt import GPTBlock, GPTEmbedding
from meshwright.capture.zoo.layers import FeedForward, initialize_weights, language_model_loss

__all__ = ["FAMILY", "GPTMoE", "GPTMoEConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTMoEConfig:
    """Sizes of a GPT with experts; layers 1, 3, 5, ... (from 0) hold them."""

    hidden: int
    num_layers: int
    num_heads: int
    num_experts: int
    top_k: int = 2
    capacity_factor: float = 2.0
    group_size: int = 1024
    ffn_factor: int = 8
    vocab_size: int = 32000
    seq_len: int = 1024
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_divisible(self, "hidden", "num_heads")
        check_routing(self.routing)

    @property
    def routing(self) -> Routing:
        """How tokens find their experts."""
        return Routing(
            num_experts=self.num_experts,
            top_k=self.top_k,
            capacity_factor=self.capacity_factor,
            group_size=self.group_size,
        )


class GPTMoE(nn.Module):
    """The language model; ``forward`` returns the mean next-token loss."""

    def __init__(self, config: GPTMoEConfig) -> None:
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
                feed_forward=_feed_forward(config, has_experts=index % 2 == 1),
            )
            for index in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        initialize_weights(self)
        self.head.weight = self.embedding.token.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Loss of predicting ``targets`` (B, S) from ``tokens`` (B, S)."""
        x_BSD = self.embedding(tokens)
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        return language_model_loss(self.head(self.norm(x_BSD)), targets)


def _feed_forward(config: GPTMoEConfig, *, has_experts: bool) -> nn.Module:
    ffn = config.ffn_factor * config.hidden
    if not has_experts:
        return FeedForward(config.hidden, ffn)
    experts = Experts(config.num_experts, config.hidden, ffn)
    return ExpertLayer(hidden=config.hidden, routing=config.routing, experts=experts)


def _example_inputs(
    config: GPTMoEConfig, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Tensor]:
    shape = (batch_size, seq_len)
    return {
        "tokens": sampler.integers(shape, end=config.vocab_size),
        "targets": sampler.integers(shape, end=config.vocab_size),
    }


def _alpa(hidden: int, num_layers: int, num_experts: int) -> GPTMoEConfig:
    return GPTMoEConfig(hidden=hidden, num_layers=num_layers, num_heads=16, num_experts=num_experts)


FAMILY = Family(
    name="gpt-moe",
    build=GPTMoE,
    example_inputs=_example_inputs,
    models={
        "tiny-gpt-moe": GPTMoEConfig(
            hidden=32,
            num_layers=4,
            num_heads=4,
            num_experts=4,
            ffn_factor=2,
            vocab_size=128,
            seq_len=32,
        ),
        "gpt-moe-380m": _alpa(768, 8, 8),
        "gpt-moe-2.4b": _alpa(1024, 16, 16),
        "gpt-moe-10b": _alpa(1536, 16, 32),
        "gpt-moe-27b": _alpa(2048, 16, 48),
    },
)
