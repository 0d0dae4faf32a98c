"""The graph network: how far operators stay from what the data sheet promises.

An operator has sizes s (logarithms of what grows with it: least times, blocks, whole waves, whole
tiles) and a kind (family, dtype, device). The kind, and messages over the typed edges of the graph
(each kind of edge in both directions, a weight of its own, mean over the neighbors), decide slopes
and thresholds of two layers that only ever increase in the sizes::

    c = silu(W silu(W kind + b) + b)
    z1 = bend((s * gate(c)) W+ * gate(c) + W c)            W+ > 0, gate > 0, bend increasing
    c = c + sum over directed kinds r of W_r mean of z1 over the neighbors by r     (each round)
    z2 = bend(z1 W+ * gate(c) + W c)
    t(i) = ideal_s + min(exp(z2 w+ * gate(c) + s w+ + w c), most)
    t of a graph = (sum over i of weight * t(i)) * factor(mean of z1, weighted by time) + rest_s

So by construction no operator is predicted faster when one of its sizes, its arithmetic or its
traffic grows, and none is faster than its ideal time or slower than ``most``, whatever the weights;
``factor`` is within ``MAX_FACTOR`` of 1. Without edges no message arrives and the factor is 1.
Messages and factor start at zero effect.

``numpy_tensors`` names the weights for ``gnn_cost.forward``, which does the same without torch.

N = operators, P = sizes, K = kinds, H = hidden width, E = edges, C = connected graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import RGCNConv

from meshwright.cost.work import EdgeKind
from meshwright.gnn_cost.forward import (
    GATE_RANGE,
    LARGEST_UNIT,
    LOG_MAX_SLOWDOWN,
    LOG_MAX_START_S,
    MAX_FACTOR,
    NUM_DIRECTED_KINDS,
    TIME_UNIT_LOG_S,
)

__all__ = ["GraphInputs", "GraphNetwork", "directed"]

_LARGEST_LOG_WEIGHT = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInputs:
    """What the network reads of a batch of operators."""

    sizes: Tensor
    """(N, P)"""
    kinds: Tensor
    """(N, K)"""
    ideal_s: Tensor
    """(N,)"""
    edges: Tensor
    """(2, E), both directions: ``directed``."""
    edge_kind: Tensor
    """(E,)"""
    component: Tensor
    """(N,) connected graph of each row."""
    num_components: int
    is_pooled: Tensor
    """(N,) 1 for rows that stand for their graph when its factor is found, else 0."""


def directed(edges_2E: Tensor, edge_kind_E: Tensor) -> tuple[Tensor, Tensor]:
    """Every edge, then every edge turned round, whose kinds count on from those of ``EdgeKind``."""
    return (
        torch.cat([edges_2E, edges_2E.flip(0)], dim=1),
        torch.cat([edge_kind_E, edge_kind_E + len(EdgeKind)]),
    )


class GraphNetwork(nn.Module):
    """Times of operators and the factor of their graphs (module docstring)."""

    size_mean: Tensor
    size_std: Tensor
    kind_mean: Tensor
    kind_std: Tensor

    def __init__(self, num_sizes: int, num_kinds: int, *, hidden: int, num_rounds: int) -> None:
        super().__init__()
        for name, width in (("size", num_sizes), ("kind", num_kinds)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))
        self.first = nn.Linear(num_kinds, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.size_gate = nn.Linear(hidden, num_sizes)
        self.one_gate, self.one_shift = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.two_gate, self.two_shift = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.out_gate, self.out_shift = nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
        nn.init.normal_(self.one_shift.bias, std=1.5)
        nn.init.normal_(self.two_shift.bias)
        self.one = _log_weights(num_sizes, hidden, shift=0.0)
        self.two = _log_weights(hidden, hidden, shift=-0.5)
        self.out = _log_weights(hidden, 1, shift=0.0)
        self.skip = _log_weights(num_sizes, 1, shift=-1.0)
        self.messages = nn.ModuleList(
            RGCNConv(hidden, hidden, NUM_DIRECTED_KINDS, root_weight=False, bias=False)
            for _ in range(num_rounds)
        )
        self.graph_output = nn.Linear(hidden, 1)
        for weight in (*self._message_weights(), *self.graph_output.parameters()):
            nn.init.zeros_(weight)

    def forward(self, inputs: GraphInputs) -> tuple[Tensor, Tensor]:
        """(N,) logarithms of times in seconds without the factor; (C,) those of the factors."""
        size_NP = (inputs.sizes - self.size_mean) / self.size_std
        kind_NK = (inputs.kinds - self.kind_mean) / self.kind_std
        c_NH = F.silu(self.second(F.silu(self.first(kind_NK))))
        if inputs.edges.size(1):
            for convolution in self.messages:
                z1_NH = self._one(size_NP * _gate(self.size_gate(c_NH)), c_NH)
                c_NH = c_NH + convolution(z1_NH, inputs.edges, inputs.edge_kind)
        size_NP = size_NP * _gate(self.size_gate(c_NH))
        z1_NH = self._one(size_NP, c_NH)
        z2_NH = z1_NH @ _positive(self.two) * _gate(self.two_gate(c_NH)) + self.two_shift(c_NH)
        answer_N1 = (_bend(z2_NH) * _gate(self.out_gate(c_NH))) @ _positive(self.out)
        answer_N1 = answer_N1 + size_NP @ _positive(self.skip) + self.out_shift(c_NH)
        log_ideal_N = inputs.ideal_s.log()
        start_N = torch.full_like(log_ideal_N, LOG_MAX_START_S)
        most_N = torch.logaddexp(log_ideal_N + LOG_MAX_SLOWDOWN, start_N)
        log_excess_N = torch.minimum(answer_N1[:, 0] + TIME_UNIT_LOG_S, most_N)
        log_time_N = torch.logaddexp(log_excess_N, log_ideal_N)
        return log_time_N, self._log_factor(z1_NH, log_time_N.detach().exp(), inputs)

    def standardize(
        self,
        sizes_NP: NDArray[np.float32],
        kinds_NK: NDArray[np.float32],
        is_used_K: Sequence[bool],
    ) -> None:
        """Take mean and spread from these rows; kinds not used count nothing from then on."""
        used = {"size": [True] * sizes_NP.shape[1], "kind": list(is_used_K)}
        for name, values in (("size", sizes_NP), ("kind", kinds_NK)):
            mean = torch.from_numpy(values.mean(axis=0, dtype=np.float64))
            std = torch.from_numpy(values.std(axis=0, dtype=np.float64))
            counts = torch.tensor(used[name]) & (std > 1e-6)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(torch.where(counts, std, torch.inf))

    def numpy_tensors(self) -> dict[str, NDArray[np.float32]]:
        """The weights under the names that ``gnn_cost.forward`` reads, matrices (in, out)."""
        tensors: dict[str, Tensor] = {
            "size_mean": self.size_mean,
            "size_scale": 1.0 / self.size_std,
            "kind_mean": self.kind_mean,
            "kind_scale": 1.0 / self.kind_std,
            "graph_weight": self.graph_output.weight[0],
            "graph_bias": self.graph_output.bias[0],
            "one_weight": _positive(self.one),
            "two_weight": _positive(self.two),
            "out_weight": _positive(self.out),
            "skip_weight": _positive(self.skip),
        }
        for name, layer in self.named_children():
            if isinstance(layer, nn.Linear) and name != "graph_output":
                tensors[f"{name}_weight"], tensors[f"{name}_bias"] = layer.weight.T, layer.bias
        if len(self.messages):
            tensors["message_weight"] = torch.stack(self._message_weights())
        return {
            name: np.array(one.detach().numpy(), dtype=np.float32, order="C")
            for name, one in tensors.items()
        }

    def _message_weights(self) -> list[Tensor]:
        return [parameter for one in self.messages for parameter in one.parameters()]

    def _one(self, size_NP: Tensor, c_NH: Tensor) -> Tensor:
        z_NH = size_NP @ _positive(self.one) * _gate(self.one_gate(c_NH)) + self.one_shift(c_NH)
        return _bend(z_NH)

    def _log_factor(self, z1_NH: Tensor, time_s_N: Tensor, inputs: GraphInputs) -> Tensor:
        weight_N1 = (time_s_N * inputs.is_pooled).unsqueeze(1) * 1e6
        pooled_CH = z1_NH.new_zeros(inputs.num_components, z1_NH.size(1))
        total_C1 = z1_NH.new_zeros(inputs.num_components, 1)
        pooled_CH = pooled_CH.index_add(0, inputs.component, weight_N1 * z1_NH)
        total_C1 = total_C1.index_add(0, inputs.component, weight_N1)
        mean_CH = pooled_CH / total_C1.clamp(min=1e-6)
        return math.log(MAX_FACTOR) * torch.tanh(self.graph_output(mean_CH)[:, 0])


def _log_weights(rows: int, columns: int, *, shift: float) -> nn.Parameter:
    """Logarithms of positive weights; of widely different sizes, so that units differ."""
    return nn.Parameter(1.2 * torch.randn(rows, columns) - math.log(rows) + shift)


def _positive(log_weight: Tensor) -> Tensor:
    return log_weight.clamp(max=_LARGEST_LOG_WEIGHT).exp()


def _gate(raw: Tensor) -> Tensor:
    return (GATE_RANGE * torch.tanh(raw / GATE_RANGE)).exp()


def _bend(z: Tensor) -> Tensor:
    """A third of the units convex, a third concave, a third bounded; all increasing."""
    third = z.size(1) // 3
    z = z.clamp(-LARGEST_UNIT, LARGEST_UNIT)
    root = (z * z + 4.0).sqrt()
    parts = [
        (z[:, :third] + root[:, :third]) / 2,
        (z[:, third : 2 * third] - root[:, third : 2 * third]) / 2,
        2 * z[:, 2 * third :] / root[:, 2 * third :],
    ]
    return torch.cat(parts, dim=1)
