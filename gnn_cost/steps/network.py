"""The graph network tuned on measured steps: messages and the factor of a graph, nothing else.

Weights of single operators stay as they were learned from operators; messages over a step's edges
(data, fusion, order) and the graph's factor begin anew at zero effect and learn what operators do
to each other::

    row_s = priced_s * capped(t(row, messages) / t(row, no messages))
    step_s = factor * (ops_s + max(launch_s - (ops_s - priced ops_s), 0)) + the rest

as the device waits less for launches where operators get slower. No row moves by more than
``MAX_FACTOR``, so steps unlike those it was tuned on cannot run away. An ensemble of members of the
operators' network, each with draws of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from meshwright.gnn_cost.batches import Batch, TrainingRows, batch_of, training_rows
from meshwright.gnn_cost.forward import MAX_FACTOR
from meshwright.gnn_cost.network import GraphNetwork
from meshwright.gnn_cost.samples import MeasuredGraphs

__all__ = ["StepNetwork", "StepRows", "network_of"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_HUBER_DELTA = 0.1
_LEARNING_RATE = 5e-3
_BATCH_GRAPHS = 32
_POSITIVE = ("one", "two", "out", "skip")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """G measured steps, ready to be learned from."""

    rows: TrainingRows
    row_s: torch.Tensor
    """(N,) priced."""
    launch_s: torch.Tensor
    """(G,) part of ``rest_s`` that the device waits for launches."""

    @classmethod
    def of(cls, graphs: MeasuredGraphs, *, row_s: FloatArray, launch_s: FloatArray) -> StepRows:
        """Of measured graphs, their rows' prices and their waits for launches."""
        return cls(
            rows=training_rows(graphs),
            row_s=torch.from_numpy(row_s.astype(np.float32)),
            launch_s=torch.from_numpy(launch_s.astype(np.float32)),
        )


def network_of(tensors: Mapping[str, NDArray[Any]], member: int) -> GraphNetwork:
    """One member of an ensemble as a network again: the inverse of ``numpy_tensors``."""
    mine = {
        name: torch.from_numpy(np.array(one[member]))
        for name, one in tensors.items()
        if name.endswith(("_weight", "_bias", "_mean", "_scale")) and not name.startswith("trust")
    }
    sizes, hidden = mine["one_weight"].shape
    num_rounds = len(mine["message_weight"]) if "message_weight" in mine else 0
    network = GraphNetwork(sizes, len(mine["kind_mean"]), hidden=hidden, num_rounds=num_rounds)
    with torch.no_grad():
        for name in ("size", "kind"):
            getattr(network, f"{name}_mean").copy_(mine[f"{name}_mean"])
            getattr(network, f"{name}_std").copy_(1.0 / mine[f"{name}_scale"])
        for name in _POSITIVE:
            getattr(network, name).copy_(mine[f"{name}_weight"].log())
        for name, layer in network.named_children():
            if isinstance(layer, torch.nn.Linear) and name != "graph_output":
                layer.weight.copy_(mine[f"{name}_weight"].T)
                layer.bias.copy_(mine[f"{name}_bias"])
        network.graph_output.weight.copy_(mine["graph_weight"][None])
        network.graph_output.bias.copy_(mine["graph_bias"])
        for number, layer in enumerate(network.messages):
            (weight,) = layer.parameters()
            weight.copy_(mine["message_weight"][number])
    return network


class StepNetwork:
    """One tuned member.

    Args:
        tensors: of the operators' ensemble.
        seed: decides the member and the order of steps.
        num_epochs: over all steps.
    """

    def __init__(
        self, tensors: Mapping[str, NDArray[Any]], *, seed: int = 0, num_epochs: int = 8
    ) -> None:
        """Untuned."""
        self._network = network_of(tensors, seed % len(tensors["one_weight"]))
        self._tuned = [
            *self._network.messages.parameters(),
            *self._network.graph_output.parameters(),
        ]
        self._network.requires_grad_(False)
        for parameter in self._tuned:
            torch.nn.init.zeros_(parameter).requires_grad_(True)
        self._seed, self._num_epochs = seed, num_epochs

    def fit(self, steps: StepRows, chosen: IntArray) -> None:
        """Learn from the chosen steps."""
        rng = np.random.default_rng([self._seed, 7])
        optimizer = torch.optim.Adam(self._tuned, lr=_LEARNING_RATE)
        num_batches = max(len(chosen) // _BATCH_GRAPHS, 1)
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, _LEARNING_RATE, total_steps=self._num_epochs * num_batches
        )
        for _ in range(self._num_epochs):
            for part in np.array_split(rng.permutation(chosen), num_batches):
                batch = batch_of(steps.rows, part)
                error = self._log_step(steps, part, batch) - batch.log_time_s
                loss = F.huber_loss(error, torch.zeros_like(error), delta=_HUBER_DELTA)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self._tuned, 1.0)
                optimizer.step()
                cycle.step()

    def predict(self, steps: StepRows, chosen: IntArray) -> FloatArray:
        """(len(chosen),) seconds."""
        found = []
        with torch.no_grad():
            for first in range(0, len(chosen), _BATCH_GRAPHS):
                part = chosen[first : first + _BATCH_GRAPHS]
                found.append(self._log_step(steps, part, batch_of(steps.rows, part)).exp())
        return torch.cat(found).numpy().astype(np.float64)

    def _log_step(self, steps: StepRows, chosen: IntArray, batch: Batch) -> torch.Tensor:
        """(g,) logarithms of seconds."""
        inputs = batch.inputs
        alone = type(inputs)(
            sizes=inputs.sizes,
            kinds=inputs.kinds,
            ideal_s=inputs.ideal_s,
            edges=inputs.edges[:, :0],
            edge_kind=inputs.edge_kind[:0],
            component=inputs.component,
            num_components=inputs.num_components,
            is_pooled=inputs.is_pooled,
        )
        with torch.no_grad():
            log_alone, _ = self._network(alone)
        log_time, log_factor = self._network(inputs)
        starts, ends = steps.rows.row_start[chosen], steps.rows.row_start[chosen + 1]
        rows = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
        priced = steps.row_s[torch.from_numpy(rows)] * batch.weight
        zero = torch.zeros(len(chosen))
        before_s = zero.index_add(0, batch.graph, priced)
        factor = (log_factor[inputs.component] * batch.has_edge).exp()
        most = math.log(MAX_FACTOR)
        moved = priced * (most * torch.tanh((log_time - log_alone) / most)).exp()
        after_s = zero.index_add(0, batch.graph, moved)
        mean_factor = zero.index_add(0, batch.graph, moved * factor) / after_s
        launch_s = steps.launch_s[torch.from_numpy(chosen)]
        waits_s = torch.clamp(launch_s - (after_s - before_s), min=0.0)
        other_s = torch.clamp(batch.rest_s - launch_s, min=0.0)
        return torch.log(mean_factor * (after_s + waits_s) + other_s)
