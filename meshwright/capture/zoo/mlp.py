"""A multi-layer perceptron that classifies vectors: the smallest real training job."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.capture.zoo.family import Family, InputSampler, require

__all__ = ["FAMILY", "MLP", "MLPConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPConfig:
    """Sizes of a perceptron: ``num_layers`` hidden layers and a head."""

    inputs: int
    hidden: int
    num_layers: int
    num_classes: int

    def __post_init__(self) -> None:
        require(self.num_layers > 0, f"num_layers={self.num_layers} must be positive")


class MLP(nn.Module):
    """Classifier; ``forward`` returns the mean cross entropy."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        widths = (config.inputs, *(config.hidden for _ in range(config.num_layers)))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, outputs), nn.GELU())
            for inputs, outputs in itertools.pairwise(widths)
        )
        self.head = nn.Linear(config.hidden, config.num_classes)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Loss of classifying ``features`` (B, inputs) as ``labels`` (B,)."""
        for layer in self.layers:
            features = layer(features)
        return F.cross_entropy(self.head(features), labels)


def _example_inputs(
    config: MLPConfig, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Tensor]:
    del seq_len
    return {
        "features": sampler.normal((batch_size, config.inputs)),
        "labels": sampler.integers((batch_size,), end=config.num_classes),
    }


FAMILY = Family(
    name="mlp",
    build=MLP,
    example_inputs=_example_inputs,
    models={
        "tiny-mlp": MLPConfig(inputs=32, hidden=64, num_layers=3, num_classes=16),
        "mlp-mnist": MLPConfig(inputs=784, hidden=1024, num_layers=2, num_classes=10),
        "mlp-1b": MLPConfig(inputs=8192, hidden=8192, num_layers=16, num_classes=8192),
    },
)
