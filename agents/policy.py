"""The planner's network: reads model and cluster as one graph, then points at candidates.

An instance's graph does not change while it is planned, so it is encoded once and looked up at
every decision::

    x_n    = silu(project[type of n](features of n))
    x_n    = norm(x_n + silu(own(x_n) + sum over relations r of W_r mean of x over neighbors by r))
    graph  = pool(mean of x over groups, over devices, over levels)

    context = state + graph + kind of decision + (group, where the decision is about a group)
    c_a     = silu(project(features of candidate a)) * gate(context)
    score_a = w silu(c_a + mean of c over candidates + context),  two layers
    value   = two layers on context

Nothing depends on how many nodes, groups or candidates there are; nodes and candidates may come in
any order. Only valid candidates are computed. The encoder ``"mlp"`` sends no messages (for the
ablation). Inputs are standardized with figures of the training set (``standardize``).

I = instances, N = nodes, E = edges, H = hidden width, G = MAX_GROUPS, B = states, A = candidates,
V = valid candidates of all states, FN, FS, FC = node, state and candidate features
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import RGCNConv

from meshwright.env.instance import DECISIONS, MAX_GROUPS, EdgeType, InstanceGraph, NodeType

__all__ = [
    "UNKNOWN",
    "Encoding",
    "GraphBatch",
    "OnInstances",
    "PlacementPolicy",
    "PolicySettings",
    "collate",
]

_LARGEST_INPUT = 8.0
"""Standard deviations; what lies further out counts as that far."""

UNKNOWN = -1
"""Number of an instance whose graph is not to be looked at."""

_FIRST_GROUP = DECISIONS.index("group_0")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """What decides the shapes of a policy's weights."""

    num_node_features: int
    num_state_features: int
    num_candidate_features: int
    hidden: int = 64
    num_rounds: int = 2
    """Of messages over the graph."""
    encoder: Literal["graph", "mlp"] = "graph"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphBatch:
    """The graphs of I instances as one."""

    node_features: Tensor
    """(N, FN)"""
    node_type: Tensor
    """(N,)"""
    instance: Tensor
    """(N,) place in the batch of the instance that each node is of"""
    group: Tensor
    """(N,) number of the group within its instance; -1 where the node is none"""
    edge_index: Tensor
    """(2, E)"""
    edge_type: Tensor
    """(E,)"""
    num_instances: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """What the decisions about I instances look up."""

    group: Tensor
    """(I, G, H); zero where there is no such group"""
    graph: Tensor
    """(I, H)"""


def collate(graphs: Sequence[InstanceGraph]) -> GraphBatch:
    """One batch of the graphs, nodes in order."""
    sizes = np.array([len(graph.node_type) for graph in graphs])
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    node_type = np.concatenate([graph.node_type for graph in graphs])
    place = np.concatenate([np.arange(size) for size in sizes])
    is_group = node_type == NodeType.GROUP
    edges = [graph.edge_index + start for graph, start in zip(graphs, first, strict=True)]
    return GraphBatch(
        node_features=torch.from_numpy(np.concatenate([graph.node_features for graph in graphs])),
        node_type=torch.from_numpy(node_type),
        instance=torch.from_numpy(np.repeat(np.arange(len(graphs)), sizes)),
        group=torch.from_numpy(np.where(is_group, place, -1)),
        edge_index=torch.from_numpy(np.concatenate(edges, axis=1)),
        edge_type=torch.from_numpy(np.concatenate([graph.edge_type for graph in graphs])),
        num_instances=len(graphs),
    )


class PlacementPolicy(nn.Module):
    """Encodes instances and decides (module docstring)."""

    node_mean: Tensor
    node_std: Tensor
    state_mean: Tensor
    state_std: Tensor
    candidate_mean: Tensor
    candidate_std: Tensor

    def __init__(self, settings: PolicySettings, *, seed: int = 0) -> None:
        """Random weights by ``seed``; torch's own generator is left as it was."""
        super().__init__()
        self.settings = settings
        hidden = settings.hidden
        widths = {
            "node": settings.num_node_features,
            "state": settings.num_state_features,
            "candidate": settings.num_candidate_features,
        }
        for name, width in widths.items():
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.project = nn.ModuleList(nn.Linear(widths["node"], hidden) for _ in NodeType)
            self.own = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(settings.num_rounds))
            self.norm = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(settings.num_rounds))
            self.messages = nn.ModuleList(
                RGCNConv(hidden, hidden, len(EdgeType), root_weight=False, bias=False)
                for _ in range(settings.num_rounds if settings.encoder == "graph" else 0)
            )
            self.pool = nn.Linear(len(NodeType) * hidden, hidden)
            self.decision = nn.Embedding(len(DECISIONS), hidden)
            self.of_state = nn.Linear(widths["state"], hidden)
            self.of_group = nn.Linear(hidden, hidden, bias=False)
            self.context = nn.Linear(hidden, hidden)
            self.of_candidate = nn.Linear(widths["candidate"], hidden)
            self.gate = nn.Linear(hidden, hidden)
            self.beside = nn.Linear(hidden, hidden, bias=False)
            self.with_context = nn.Linear(hidden, hidden)
            self.second = nn.Linear(hidden, hidden)
            self.score = nn.Linear(hidden, 1, bias=False)
            last = nn.Linear(hidden, 1)
            self.value = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), last)
            nn.init.normal_(self.decision.weight, std=0.1)
            nn.init.orthogonal_(self.score.weight, gain=0.01)
            nn.init.orthogonal_(last.weight, gain=0.1)

    # Once per instance --------------------------------------------------------------------------

    def encode(self, graphs: GraphBatch) -> Encoding:
        """Embeddings of the groups and of the whole of each instance."""
        x_NF = _standard(graphs.node_features, self.node_mean, self.node_std)
        x_NH = x_NF.new_zeros(len(x_NF), self.settings.hidden)
        rows_of_type = [(graphs.node_type == kind).nonzero().squeeze(-1) for kind in NodeType]
        for rows, project in zip(rows_of_type, self.project, strict=True):
            x_NH = x_NH.index_add(0, rows, F.silu(project(x_NF[rows])))
        for number, (own, norm) in enumerate(zip(self.own, self.norm, strict=True)):
            y_NH = own(x_NH)
            if self.settings.encoder == "graph":
                y_NH = y_NH + self.messages[number](x_NH, graphs.edge_index, graphs.edge_type)
            x_NH = norm(x_NH + F.silu(y_NH))
        means = [
            _mean_by(x_NH[rows], graphs.instance[rows], graphs.num_instances)
            for rows in rows_of_type
        ]
        rows = rows_of_type[NodeType.GROUP]
        group_IGH = x_NH.new_zeros(graphs.num_instances, MAX_GROUPS, self.settings.hidden)
        group_IGH = group_IGH.index_put((graphs.instance[rows], graphs.group[rows]), x_NH[rows])
        return Encoding(group=group_IGH, graph=self.pool(torch.cat(means, dim=-1)))

    # At every decision --------------------------------------------------------------------------

    def decide(
        self, encoding: Encoding, instance_B: Tensor, observation: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, A), 0 at candidates that are not valid, and values (B,).

        Args:
            encoding: of some instances.
            instance_B: the place in ``encoding`` that each state is about.
            observation: ``decision`` (B,), ``action_mask`` (B, A), ``candidates`` (B, A, FC) and
                ``state`` (B, FS).
        """
        mask_BA, decision_B = observation["action_mask"], observation["decision"]
        state_BF = _standard(observation["state"], self.state_mean, self.state_std)
        number_B = decision_B - _FIRST_GROUP
        is_group_B = (number_B >= 0) & (number_B < MAX_GROUPS)
        group_BH = encoding.group[instance_B, number_B.clamp(0, MAX_GROUPS - 1)]
        context_BH = (
            self.of_state(state_BF)
            + encoding.graph[instance_B]
            + self.decision(decision_B)
            + self.of_group(group_BH) * is_group_B.unsqueeze(-1)
        )
        context_BH = F.silu(context_BH)
        context_BH = F.silu(context_BH + self.context(context_BH))
        return self._scores(context_BH, mask_BA, observation), self.value(context_BH).squeeze(-1)

    def _scores(
        self, context_BH: Tensor, mask_BA: Tensor, observation: Mapping[str, Tensor]
    ) -> Tensor:
        row_V, place_V = mask_BA.nonzero(as_tuple=True)
        c_VF = _standard(
            observation["candidates"][row_V, place_V], self.candidate_mean, self.candidate_std
        )
        gate_BH = 1 + torch.tanh(self.gate(context_BH))
        c_VH = F.silu(self.of_candidate(c_VF)) * gate_BH[row_V]
        around_BH = self.with_context(context_BH) + self.beside(
            _mean_by(c_VH, row_V, len(context_BH))
        )
        c_VH = F.silu(c_VH + around_BH[row_V])
        c_VH = F.silu(c_VH + self.second(c_VH))
        score_V = self.score(c_VH).squeeze(-1)
        return score_V.new_zeros(mask_BA.shape).index_put((row_V, place_V), score_V)

    # Inputs -------------------------------------------------------------------------------------

    @torch.no_grad()
    def standardize(self, graphs: GraphBatch, observations: Mapping[str, Tensor]) -> None:
        """Take means and standard deviations of inputs from these; weights stay as they are.

        Args:
            graphs: of the training set.
            observations: as ``decide`` takes them, of many states.
        """
        valid_VF = observations["candidates"][observations["action_mask"]]
        columns = {"node": graphs.node_features, "candidate": valid_VF}
        columns["state"] = observations["state"]
        for name, rows_RF in columns.items():
            std_F = rows_RF.double().std(dim=0, correction=0)
            getattr(self, f"{name}_mean").copy_(rows_RF.double().mean(dim=0))
            getattr(self, f"{name}_std").copy_(torch.where(std_F > 1e-6, std_F, 1.0))


def _standard(x_F: Tensor, mean_F: Tensor, std_F: Tensor) -> Tensor:
    return ((x_F - mean_F) / std_F).clamp(-_LARGEST_INPUT, _LARGEST_INPUT)


def _mean_by(x_RH: Tensor, place_R: Tensor, count: int) -> Tensor:
    """(count, H) means of the rows of each place; zero where there are none."""
    sum_H = x_RH.new_zeros(count, x_RH.size(1)).index_add(0, place_R, x_RH)
    return sum_H / torch.bincount(place_R, minlength=count).clamp(min=1).unsqueeze(-1)


class OnInstances(nn.Module):
    """A ``PlacementPolicy`` as a ``Policy`` of ``agents.ppo``: looks up the observed instances.

    ``observation["instance"]`` (B,) counts in ``graphs``, or is ``UNKNOWN``. Without gradients an
    encoding is kept until the weights or the instances change.
    """

    def __init__(self, policy: PlacementPolicy, graphs: Sequence[InstanceGraph]) -> None:
        """Decide about the instances that ``graphs`` are of."""
        super().__init__()
        self.policy = policy
        self.graphs = graphs
        self._kept: tuple[list[int], Tensor, Encoding] | None = None

    def forward(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, A) and values (B,)."""
        distinct_I, place_B = torch.unique(observation["instance"], return_inverse=True)
        return self.policy.decide(self._encoding(distinct_I), place_B, observation)

    def _encoding(self, distinct_I: Tensor) -> Encoding:
        versions = [tensor._version for tensor in self.policy.state_dict(keep_vars=True).values()]
        if not torch.is_grad_enabled() and self._kept is not None:
            versions_then, instances_then, encoding = self._kept
            if versions_then == versions and torch.equal(instances_then, distinct_I):
                return encoding
        found = self.policy.encode(collate([self.graphs[int(i)] for i in distinct_I]))
        if distinct_I[0] == UNKNOWN:  # stands first, being the least
            is_known_I = (distinct_I != UNKNOWN).float()
            found = Encoding(
                group=found.group * is_known_I[:, None, None],
                graph=found.graph * is_known_I[:, None],
            )
        if not torch.is_grad_enabled():
            self._kept = (versions, distinct_I, found)
        return found
