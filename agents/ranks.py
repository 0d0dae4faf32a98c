"""Learning on all ranks under torchrun: equal weights everywhere, means of gradients and figures.

Every function does nothing where there is one process alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["average_gradients", "broadcast_state", "mean_over_ranks", "rank_and_size"]


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without a process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def broadcast_state(module: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0."""
    if rank_and_size()[1] == 1:
        return
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, src=0)


def average_gradients(module: nn.Module) -> None:
    """Mean of the gradients over all ranks; one that a rank lacks counts as zero there."""
    size = rank_and_size()[1]
    if size == 1:
        return
    parameters = list(module.parameters())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= size
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).clone()


def mean_over_ranks(amount: float) -> float:
    """Mean of a figure over all ranks, so that all decide alike."""
    size = rank_and_size()[1]
    if size == 1:
        return amount
    total = torch.tensor(amount, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / size
