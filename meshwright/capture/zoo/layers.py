"""Layers that several families share.

Shapes: B = batch, S = queries (sequence), K = keys, H = heads, D = hidden size, W = head width.
Attention runs through ``scaled_dot_product_attention`` in (B, H, S, W) layout with separate
query, key and value projections, so that a split by heads is a split of one dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Attention",
    "FeedForward",
    "RMSNorm",
    "dropout_layer",
    "initialize_weights",
    "language_model_loss",
]


def dropout_layer(probability: float) -> nn.Module:
    """Dropout, or nothing at all for probability 0: no random operator enters the graph."""
    return nn.Dropout(probability) if probability > 0.0 else nn.Identity()


def initialize_weights(module: nn.Module, *, std: float = 0.02) -> None:
    """Draw linear and embedding weights from N(0, std), zero the biases, as GPT-2 does."""
    if next(module.parameters()).is_meta:
        # There is nothing to fill, and drawing shapes is most of the time of building them.
        return
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            nn.init.normal_(child.weight, std=std)
        if isinstance(child, nn.Linear) and child.bias is not None:
            nn.init.zeros_(child.bias)


def language_model_loss(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean cross entropy over the positions whose target is not -100; a scalar."""
    return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())


class RMSNorm(nn.Module):
    """Root mean square norm over the last dim.

    Written out because ``nn.RMSNorm`` decomposes into an in-place addition.
    """

    def __init__(self, hidden: int, *, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.epsilon = epsilon

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Normalized and scaled input; same shape."""
        mean_square = (x_BSD * x_BSD).mean(dim=-1, keepdim=True)
        return x_BSD * torch.rsqrt(mean_square + self.epsilon) * self.weight


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or to another (``memory``)."""

    def __init__(
        self, hidden: int, num_heads: int, *, causal: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.dropout = dropout
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, hidden)

    def forward(self, x_BSD: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attended input; same shape. ``mask`` broadcasts to (B, H, S, K), true = may attend."""
        mixed_BHSW = F.scaled_dot_product_attention(
            self._split_heads(self.query(x_BSD)),
            self._split_heads(self.key(x_BSD)),
            self._split_heads(self.value(x_BSD)),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal,
        )
        return self.output(mixed_BHSW.transpose(1, 2).flatten(2))

    def _split_heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, hidden: int, ffn: int, *, approximate: str = "none") -> None:
        super().__init__()
        self.up = nn.Linear(hidden, ffn)
        self.activation = nn.GELU(approximate=approximate)
        self.down = nn.Linear(ffn, hidden)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape as the input."""
        return self.down(self.activation(self.up(x_BSD)))
