"""Mixture of experts with dense dispatch: shapes do not depend on the routing.

Each token goes to the ``top_k`` experts with the largest router probability, weighted by these
probabilities divided by their sum. An expert takes at most

    capacity = ceil(capacity_factor * top_k * group / num_experts)

tokens of each routing group (consecutive tokens of one sequence) and drops later ones, whose
contribution is then missing from the sum (Lepikhin et al. 2020, arXiv 2006.16668; here all
choices of a token have the same priority). Dispatch and combination are products with one-hot
tensors; the experts are dim 0 of their weights and of two batched products.

Shapes: N = groups (batch times groups per sequence), T = tokens of a group, E = experts,
C = capacity, D = hidden size, F = feed-forward width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.capture.zoo.family import require

__all__ = ["ExpertLayer", "Experts", "GatedExperts", "Routing", "check_routing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How tokens find their experts."""

    num_experts: int
    top_k: int
    capacity_factor: float
    group_size: int
    """Tokens per routing group; a shorter sequence is one group."""

    def capacity(self, group: int) -> int:
        """Tokens of a group of ``group`` tokens that one expert can take; at most all of them."""
        share = self.capacity_factor * self.top_k * group / self.num_experts
        return min(group, max(1, math.ceil(share)))


def check_routing(routing: Routing) -> None:
    """Raise ``BadModel`` if the routing makes no sense."""
    require(
        1 <= routing.top_k <= routing.num_experts,
        f"top_k={routing.top_k} must be between 1 and num_experts={routing.num_experts}",
    )
    require(
        routing.capacity_factor > 0.0 and routing.group_size > 0,
        "capacity_factor and group_size must be positive",
    )


class Experts(nn.Module):
    """Experts of two layers with a GELU between."""

    def __init__(self, num_experts: int, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, hidden, ffn))
        self.up_bias = nn.Parameter(torch.zeros(num_experts, 1, ffn))
        self.down = nn.Parameter(torch.empty(num_experts, ffn, hidden))
        self.down_bias = nn.Parameter(torch.zeros(num_experts, 1, hidden))
        nn.init.normal_(self.up, std=0.02)
        nn.init.normal_(self.down, std=0.02)

    def forward(self, x_ECD: Tensor) -> Tensor:
        """Each expert applied to its own rows; same shape."""
        inner_ECF = F.gelu(torch.bmm(x_ECD, self.up) + self.up_bias)
        return torch.bmm(inner_ECF, self.down) + self.down_bias


class GatedExperts(nn.Module):
    """SwiGLU experts without biases."""

    def __init__(self, num_experts: int, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, hidden, ffn))
        self.up = nn.Parameter(torch.empty(num_experts, hidden, ffn))
        self.down = nn.Parameter(torch.empty(num_experts, ffn, hidden))
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x_ECD: Tensor) -> Tensor:
        """Each expert applied to its own rows; same shape."""
        inner_ECF = F.silu(torch.bmm(x_ECD, self.gate)) * torch.bmm(x_ECD, self.up)
        return torch.bmm(inner_ECF, self.down)


class ExpertLayer(nn.Module):
    """Router, dispatch, experts, combination; takes the place of a feed-forward layer."""

    def __init__(self, *, hidden: int, routing: Routing, experts: nn.Module) -> None:
        super().__init__()
        self.routing = routing
        self.router = nn.Linear(hidden, routing.num_experts, bias=False)
        self.experts = experts

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape as the input."""
        batch, seq_len, hidden = x_BSD.shape
        group = min(seq_len, self.routing.group_size)
        require(
            seq_len % group == 0,
            f"sequence length {seq_len} must be a multiple of group_size={group}",
        )
        x_NTD = x_BSD.reshape(batch * (seq_len // group), group, hidden)
        gate_NTE, dispatch_NTEC = self._route(x_NTD)
        combine_NTEC = gate_NTE.unsqueeze(-1) * dispatch_NTEC
        num_groups, _, num_experts, capacity = dispatch_NTEC.shape
        rows_NED = torch.bmm(dispatch_NTEC.flatten(2).transpose(1, 2), x_NTD)
        rows_ENCD = rows_NED.unflatten(1, (num_experts, capacity)).transpose(0, 1)
        done_ERD = self.experts(rows_ENCD.flatten(1, 2))
        done_NECD = done_ERD.unflatten(1, (num_groups, capacity)).transpose(0, 1)
        mixed_NTD = torch.bmm(combine_NTEC.flatten(2), done_NECD.flatten(1, 2))
        return mixed_NTD.reshape(batch, seq_len, hidden)

    def _route(self, x_NTD: Tensor) -> tuple[Tensor, Tensor]:
        """Weight of each expert, (N, T, E), and one-hot slots of each token, (N, T, E, C)."""
        num_experts = self.routing.num_experts
        probability_NTE = F.softmax(self.router(x_NTD), dim=-1)
        choice_NTK = probability_NTE.topk(self.routing.top_k, dim=-1).indices
        expert_E = torch.arange(num_experts, device=x_NTD.device)
        chosen_NTE = (choice_NTK.unsqueeze(-1) == expert_E).sum(dim=2)
        gate_NTE = probability_NTE * chosen_NTE.to(x_NTD.dtype)
        gate_NTE = gate_NTE / gate_NTE.sum(dim=-1, keepdim=True)
        # Slots count from 1 in order of arrival, so an expert not chosen (0) matches no slot.
        slot_NTE = chosen_NTE.cumsum(dim=1) * chosen_NTE
        slot_C = torch.arange(1, self.routing.capacity(x_NTD.size(1)) + 1, device=x_NTD.device)
        taken_NTEC = slot_NTE.unsqueeze(-1) == slot_C
        return gate_NTE, taken_NTEC.to(x_NTD.dtype)
