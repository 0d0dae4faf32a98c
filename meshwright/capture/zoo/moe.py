"""Mixtral: a Llama whose feed-forward layers are mixtures of gated experts.

Sizes: Jiang et al. 2024 (arXiv 2401.04088), table 1, and the published configuration of
Mixtral-8x22B-v0.1. Routing differs from the original in one point: experts have a capacity, see
``experts``. No auxiliary loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from meshwright.capture.zoo.experts import ExpertLayer, GatedExperts, Routing, check_routing
from meshwright.capture.zoo.family import Family, InputSampler, require, require_divisible
from meshwright.capture.zoo.layers import RMSNorm, initialize_weights, language_model_loss
from meshwright.capture.zoo.llama import LlamaBlock, rotary_table

__all__ = ["FAMILY", "Mixtral", "MixtralConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtralConfig:
    """Sizes of a Mixtral."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn: int
    vocab_size: int
    seq_len: int
    num_experts: int = 8
    top_k: int = 2
    capacity_factor: float = 1.25
    group_size: int = 1024
    rope_base: float = 1000000.0

    def __post_init__(self) -> None:
        require_divisible(self, "hidden", "num_heads")
        require_divisible(self, "num_heads", "num_kv_heads")
        require(
            self.hidden // self.num_heads % 2 == 0,
            f"rotary positions need an even head width, not {self.hidden}/{self.num_heads}",
        )
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


class Mixtral(nn.Module):
    """The language model; ``forward`` returns the mean next-token loss."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.rope_base = config.rope_base
        self.head_width = config.hidden // config.num_heads
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(
            LlamaBlock(
                hidden=config.hidden,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                feed_forward=ExpertLayer(
                    hidden=config.hidden,
                    routing=config.routing,
                    experts=GatedExperts(config.num_experts, config.hidden, config.ffn),
                ),
            )
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        initialize_weights(self)

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
    config: MixtralConfig, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Tensor]:
    shape = (batch_size, seq_len)
    return {
        "tokens": sampler.integers(shape, end=config.vocab_size),
        "targets": sampler.integers(shape, end=config.vocab_size),
    }


FAMILY = Family(
    name="moe",
    build=Mixtral,
    example_inputs=_example_inputs,
    models={
        "tiny-moe": MixtralConfig(
            hidden=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            ffn=64,
            vocab_size=128,
            seq_len=32,
            num_experts=4,
            capacity_factor=2.0,
        ),
        "mixtral-8x7b": MixtralConfig(
            hidden=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            ffn=14336,
            vocab_size=32000,
            seq_len=4096,
        ),
        "mixtral-8x22b": MixtralConfig(
            hidden=6144,
            num_layers=56,
            num_heads=48,
            num_kv_heads=8,
            ffn=16384,
            vocab_size=32000,
            seq_len=4096,
        ),
    },
)
