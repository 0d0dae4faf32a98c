"""Telling attention from what works token by token, and what can run in token slices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.capture.captured import capture
from meshwright.graph.attention import AttentionFinder, is_sliceable
from meshwright.graph.dimensions import label_dimensions
from meshwright.graph.factors import FactorAnalysis, analyze_factors
from meshwright.graph.opgraph import Phase
from meshwright.graph.segments import find_segments


class Attention(nn.Module):
    """One head of width 4 over 6 tokens of 10 words, fused or written out."""

    def __init__(self, *, is_causal: bool = True, is_fused: bool = True) -> None:
        super().__init__()
        self.is_causal, self.is_fused = is_causal, is_fused
        self.embedding = nn.Embedding(10, 4)
        self.projection = nn.Linear(4, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.projection(self.embedding(tokens)).split(4, dim=-1)
        if self.is_fused:
            q, k, v = q[:, None], k[:, None], v[:, None]
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        else:
            mixed = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return (mixed**2).sum()


def analyzed(module: nn.Module, width: int = 6) -> tuple[FactorAnalysis, int | None]:
    graph = capture(module, (torch.zeros(2, width, dtype=torch.long),)).graph
    analysis = analyze_factors(graph)
    labels = label_dimensions(analysis, find_segments(graph, analysis.rules))
    return analysis, labels.sequence


def attention_of(analysis: FactorAnalysis) -> list[str]:
    is_attention = AttentionFinder(analysis)
    return [
        op.target.split(".")[1]
        for op, rule in zip(analysis.graph.ops, analysis.rules, strict=True)
        if op.phase == Phase.FORWARD and not rule.is_view and is_attention(op)
    ]


def test_fused_attention_goes_by_its_name() -> None:
    analysis, _ = analyzed(Attention())

    assert ["_scaled_dot_product_flash_attention_for_cpu"] == attention_of(analysis)


def test_written_out_attention_goes_by_its_scores() -> None:
    """Two products and what lies between; the projection has no two dims of tokens."""
    analysis, _ = analyzed(Attention(is_fused=False))

    assert ["bmm", "_softmax", "bmm"] == attention_of(analysis)


def test_a_width_like_the_length_is_not_attention() -> None:
    """With 12 tokens the projection returns 12 x 12, but 12 of it are the parameter's."""
    analysis, _ = analyzed(Attention(), width=12)

    assert ["_scaled_dot_product_flash_attention_for_cpu"] == attention_of(analysis)


def test_only_causal_attention_can_be_sliced() -> None:
    assert is_sliceable(*analyzed(Attention()))
    assert not is_sliceable(*analyzed(Attention(is_causal=False)))
    assert not is_sliceable(*analyzed(Attention(is_fused=False)))
