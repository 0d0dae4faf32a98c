"""The torch optimizer that a plan names; steps of training and of profiling use the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meshwright.plans.plan import OptimizerName, OptimizerSpec

__all__ = ["make_optimizer"]


def make_optimizer(spec: OptimizerSpec, tensors: Sequence[Tensor]) -> torch.optim.Optimizer | None:
    """The optimizer ``spec`` names over ``tensors``; ``None`` where there is none to update."""
    if not tensors:
        return None
    if spec.name is OptimizerName.SGD:
        return torch.optim.SGD(
            tensors,
            lr=spec.learning_rate,
            momentum=spec.momentum,
            weight_decay=spec.weight_decay,
            foreach=True,
        )
    return torch.optim.AdamW(
        tensors,
        lr=spec.learning_rate,
        betas=(spec.beta1, spec.beta2),
        eps=spec.epsilon,
        weight_decay=spec.weight_decay,
        foreach=True,
    )
