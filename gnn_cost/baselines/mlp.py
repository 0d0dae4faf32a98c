"""A small network for each group of families, blind to the rest of the graph.

It emits three bounded numbers for each row: the shares of their usual rates that its arithmetic and
its traffic reach, and the floor::

    t = floor_s + arithmetic_s / share + traffic_s / other_share
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meshwright.cost.work import Family
from meshwright.gnn_cost.baselines.base import family_weights
from meshwright.gnn_cost.features import (
    FEATURE_NAMES,
    MAX_FLOOR_S,
    MIN_FLOOR_S,
    arithmetic_and_traffic_s,
    operator_features,
)
from meshwright.gnn_cost.samples import MeasuredGraphs

__all__ = ["FamilyMlp"]

FloatArray = NDArray[np.float64]

# N = rows of operators, G = graphs, F = features, H = hidden units, K = families

_GROUPS = (
    (Family.MATMUL, Family.BATCHED_MATMUL, Family.GROUPED_MATMUL),
    (Family.ATTENTION, Family.ATTENTION_BACKWARD),
    (Family.CONVOLUTION, Family.CONVOLUTION_BACKWARD),
)
"""Families that share a network; all others share one more."""

_LARGEST_BATCH, _FEWEST_STEPS = 1024, 16
"""Graphs of a step, and steps of an epoch where there are few graphs."""

_LEAST_SHARE, _LARGEST_SHARE = 1e-3, 1.5
"""Of what is usual; data that lie in cache are faster."""


class _Networks(nn.Module):
    """One network for each group of families, all run at once as a batched product."""

    def __init__(self, num_features: int, hidden: int, num_groups: int) -> None:
        super().__init__()

        def weights(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(num_groups, rows, columns) / rows**0.5)

        self.first_KFH = weights(num_features, hidden)
        self.first_bias_K1H = nn.Parameter(torch.zeros(num_groups, 1, hidden))
        self.second_KHH = weights(hidden, hidden)
        self.second_bias_K1H = nn.Parameter(torch.zeros(num_groups, 1, hidden))
        self.last_KH3 = weights(hidden, 3)
        self.last_bias_K13 = nn.Parameter(torch.zeros(num_groups, 1, 3))

    def forward(self, features_NF: Tensor, group: int) -> Tensor:
        hidden_NH = features_NF @ self.first_KFH[group] + self.first_bias_K1H[group]
        hidden_NH = nn.functional.silu(hidden_NH)
        hidden_NH = hidden_NH @ self.second_KHH[group] + self.second_bias_K1H[group]
        hidden_NH = nn.functional.silu(hidden_NH)
        return hidden_NH @ self.last_KH3[group] + self.last_bias_K13[group]


class FamilyMlp:
    """Bounded shares and floor of each row from its features alone.

    Args:
        seed: of weights and batches.
        hidden: units of each of two layers.
        num_epochs: over all graphs.
        without: features that are not looked at.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        hidden: int = 64,
        num_epochs: int = 30,
        without: tuple[str, ...] = (),
    ) -> None:
        """Unfitted."""
        self._seed, self._hidden, self._num_epochs = seed, hidden, num_epochs
        self._columns = [
            place for place, name in enumerate(FEATURE_NAMES) if name not in frozenset(without)
        ]
        self._networks: _Networks | None = None
        self._mean = np.zeros(0)
        self._scale = np.ones(0)

    def fit(self, graphs: MeasuredGraphs) -> None:
        """Learn by Adam on the absolute error of logarithms of times."""
        features = self._raw_features(graphs)
        self._mean, self._scale = features.mean(axis=0), features.std(axis=0) + 1e-3
        rng = np.random.default_rng(self._seed)
        torch.manual_seed(self._seed)
        networks = _Networks(len(self._columns), self._hidden, len(_GROUPS) + 1)
        optimizer = torch.optim.AdamW(networks.parameters(), lr=3e-3, weight_decay=1e-3)
        inputs = self._inputs(graphs, features)
        first = np.searchsorted(graphs.graph, np.arange(graphs.count + 1))
        weight_G = torch.tensor(family_weights(graphs), dtype=torch.float32)
        log_time_G = torch.tensor(np.log(graphs.time_s * 1e6), dtype=torch.float32)
        rest_us_G = torch.tensor(graphs.rest_s * 1e6, dtype=torch.float32)
        batch = min(_LARGEST_BATCH, max(32, graphs.count // _FEWEST_STEPS))
        num_steps = self._num_epochs * -(-graphs.count // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps + 1)
        for _ in range(self._num_epochs):
            order = rng.permutation(graphs.count)
            for start in range(0, graphs.count, batch):
                chosen = order[start : start + batch]
                rows, of_graph = _rows_of(first, chosen)
                row_us = _row_us(networks, *(one[rows] for one in inputs))
                sums_us = torch.zeros(len(chosen)).index_add_(0, of_graph, row_us)
                log_us = torch.log(sums_us + rest_us_G[chosen])
                loss = (weight_G[chosen] * (log_us - log_time_G[chosen]).abs()).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
                optimizer.step()
                schedule.step()
        self._networks = networks

    def predict(self, graphs: MeasuredGraphs) -> FloatArray:
        """Times, (G,)."""
        assert self._networks is not None, "fit before predict"
        with torch.no_grad():
            inputs = self._inputs(graphs, self._raw_features(graphs))
            row_us = _row_us(self._networks, *inputs).double().numpy()
        rows_s = np.bincount(graphs.graph, row_us * 1e-6, minlength=graphs.count)
        return rows_s + graphs.rest_s

    def _raw_features(self, graphs: MeasuredGraphs) -> NDArray[np.float32]:
        rows = operator_features(graphs.work, graphs.devices, graphs.device[graphs.graph])
        return rows[:, self._columns]

    def _inputs(
        self, graphs: MeasuredGraphs, features: NDArray[np.float32]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled features, least microseconds (N, 2), group of families and weight of every row."""
        scaled = np.clip((features - self._mean) / self._scale, -3.0, 3.0)
        of_rows = graphs.device[graphs.graph]
        both_s = arithmetic_and_traffic_s(graphs.work, graphs.devices, of_rows)
        least_us = np.stack(both_s, axis=1) * 1e6
        group = np.full(len(Family), len(_GROUPS))
        for place, families in enumerate(_GROUPS):
            group[list(families)] = place
        return (
            torch.tensor(scaled, dtype=torch.float32),
            torch.tensor(least_us, dtype=torch.float32),
            torch.tensor(group[graphs.work.family]),
            torch.tensor(graphs.weight, dtype=torch.float32),
        )


def _rows_of(
    first: NDArray[np.int64], chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Tensor]:
    """Rows of the chosen graphs, and which of the chosen each belongs to."""
    counts = first[chosen + 1] - first[chosen]
    of_graph = np.repeat(np.arange(len(chosen)), counts)
    starts = np.repeat(first[chosen] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    return starts + np.arange(len(of_graph)), torch.tensor(of_graph)


def _row_us(
    networks: _Networks, features_NF: Tensor, least_us_N2: Tensor, group_N: Tensor, weight_N: Tensor
) -> Tensor:
    """Weighted microseconds of every row: floor, arithmetic and traffic."""
    row_us = torch.zeros(len(features_NF))
    for group in range(len(_GROUPS) + 1):
        mine = torch.nonzero(group_N == group).squeeze(1)
        if len(mine) == 0:
            continue
        raw_N3 = networks(features_NF[mine], group)
        share_N2 = _LEAST_SHARE + (_LARGEST_SHARE - _LEAST_SHARE) * torch.sigmoid(raw_N3[:, :2])
        span_us = (MAX_FLOOR_S - MIN_FLOOR_S) * 1e6
        floor_us = MIN_FLOOR_S * 1e6 + span_us * torch.sigmoid(raw_N3[:, 2] - 2.0)
        row_us = row_us.index_add(0, mine, floor_us + (least_us_N2[mine] / share_N2).sum(1))
    return row_us * weight_N
