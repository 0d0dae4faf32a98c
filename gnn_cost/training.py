"""Trains one graph network on measured graphs; a killed training goes on from its last epoch.

The loss is the Huber loss of log(predicted / measured), balanced over groups (source, device,
operator, direction, dtype). Learning rates follow one cycle. Of the epochs the one with the least
error on held-out groups of shapes is kept. Equal settings, data and machine give equal bits,
resumed or not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from torch.nn import functional as F

from meshwright.errors import BadRequest
from meshwright.gnn_cost.batches import TrainingRows, batch_of, group_weights
from meshwright.gnn_cost.features import FEATURES_VERSION
from meshwright.gnn_cost.forward import KIND_NAMES
from meshwright.gnn_cost.network import GraphNetwork
from meshwright.strict_json import write_bytes_atomically

__all__ = ["EpochMetrics", "Trained", "TrainingSettings", "held_out", "train"]

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_HUBER_DELTA = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """What decides the result beside the data."""

    seed: int = 0
    hidden: int = 64
    num_rounds: int = 2
    """Of messages; 0 makes it a network of single operators."""
    max_epochs: int = 40
    patience: int = 12
    """Epochs without a better one before training ends."""
    batch_graphs: int = 512
    learning_rate: float = 5e-3
    """At its peak."""
    weight_decay: float = 1e-4
    balance: float = 0.5
    """0: every graph counts the same; 1: every group does."""
    held_out_fraction: float = 0.1
    split_seed: int = 0
    """Of what is held out: the same for all members of an ensemble."""
    is_bootstrapped: bool = True
    """Groups of shapes count with random weights of mean 1, so that members differ."""
    device_noise: float = 1.0
    """Spread, in training, of what is added to features of devices, over their own spread: so that
    little is made of the few devices there are."""
    unused_kinds: tuple[str, ...] = ()
    """Of ``forward.KIND_NAMES``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochMetrics:
    """One epoch, as it is told to the caller."""

    epoch: int
    num_epochs: int
    loss: float
    held_out_error: float
    """Mean of |log(predicted / measured)|, balanced."""
    is_best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A trained network."""

    tensors: dict[str, NDArray[np.float32]]
    """For ``gnn_cost.forward``."""
    history: tuple[EpochMetrics, ...]
    is_cut: bool
    """The caller stopped it."""


def held_out(rows: TrainingRows, settings: TrainingSettings) -> BoolArray:
    """(G,) graphs that are not trained on: whole groups of shapes."""
    found, inverse = np.unique(rows.split_group, return_inverse=True)
    rng = np.random.default_rng(settings.split_seed)
    return (rng.random(len(found)) < settings.held_out_fraction)[inverse]


def train(
    settings: TrainingSettings,
    rows: TrainingRows,
    *,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochMetrics], None] = lambda _: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Trained:
    """The network of the best epoch.

    Args:
        settings: of the training.
        rows: to learn from; some are held out.
        checkpoint: file to go on from where it is there, written after every epoch.
        on_epoch: told of every epoch as it ends.
        is_stopped: asked after every epoch; true ends training with the best so far.

    Raises:
        BadRequest: nothing to learn from, or the checkpoint is of other settings or data.
    """
    if not rows.count:
        raise BadRequest("operators: no measurement to learn from; give a table with times")
    run = _Run(settings, rows)
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint)
    is_cut = False
    while not run.is_done:
        on_epoch(run.epoch())
        if checkpoint is not None:
            run.save(checkpoint)
        if is_stopped():
            is_cut = len(run.history) < settings.max_epochs
            break
    return Trained(tensors=run.best_tensors(), history=tuple(run.history), is_cut=is_cut)


class _Run:
    """A training under way."""

    def __init__(self, settings: TrainingSettings, rows: TrainingRows) -> None:
        self._settings, self._rows = settings, rows
        is_held = held_out(rows, settings)
        if is_held.all() or not is_held.any():
            is_held = np.zeros(rows.count, np.bool_)
        self._trained_on = np.flatnonzero(~is_held)
        self._held = np.flatnonzero(is_held) if is_held.any() else self._trained_on
        rng = np.random.default_rng([settings.seed, 1])
        self._balance = group_weights(rows.group, balance=settings.balance)
        self._weight = self._balance
        if settings.is_bootstrapped:
            found, inverse = np.unique(rows.split_group, return_inverse=True)
            luck = rng.exponential(size=len(found)).astype(np.float32)
            self._weight = self._balance * np.minimum(luck, 4.0)[inverse]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self._network = GraphNetwork(
                rows.sizes.shape[1],
                rows.kinds.shape[1],
                hidden=settings.hidden,
                num_rounds=settings.num_rounds,
            )
        first_row = rows.row_start[self._trained_on]
        self._network.standardize(
            rows.sizes[first_row],
            rows.kinds[first_row],
            [one not in settings.unused_kinds for one in KIND_NAMES],
        )
        is_device = torch.tensor(["device" in one for one in KIND_NAMES])
        spread = self._network.kind_std.where(self._network.kind_std.isfinite(), torch.tensor(0.0))
        self._noise_scale = settings.device_noise * spread * is_device
        self._parameters = list(self._network.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        for parameter in self._parameters:
            self._optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._best = [one.detach().clone() for one in self._parameters]
        self._best_error = math.inf
        self._stale_epochs = 0
        self.history: list[EpochMetrics] = []

    @property
    def is_done(self) -> bool:
        return (
            len(self.history) >= self._settings.max_epochs
            or self._stale_epochs >= self._settings.patience
        )

    def epoch(self) -> EpochMetrics:
        settings, number = self._settings, len(self.history)
        rng = np.random.default_rng([settings.seed, 2, number])
        order = rng.permutation(self._trained_on)
        parts = np.array_split(order, max(len(order) // settings.batch_graphs, 1))
        losses = []
        noise = torch.Generator().manual_seed(int(rng.integers(2**31)))
        self._network.train()
        for index, chosen in enumerate(parts):
            progress = (number + index / len(parts)) / settings.max_epochs
            for group in self._optimizer.param_groups:
                group["lr"] = settings.learning_rate * _cycle(progress)
            losses.append(self._step(chosen, noise))
        error = self.held_out_error()
        is_best = error < self._best_error
        self._stale_epochs = 0 if is_best else self._stale_epochs + 1
        if is_best:
            self._best_error = error
            self._best = [one.detach().clone() for one in self._parameters]
        metrics = EpochMetrics(
            epoch=number,
            num_epochs=settings.max_epochs,
            loss=float(np.mean(losses)),
            held_out_error=error,
            is_best=is_best,
        )
        self.history.append(metrics)
        return metrics

    def held_out_error(self) -> float:
        self._network.eval()
        total = 0.0
        with torch.no_grad():
            for first in range(0, len(self._held), 16384):
                chosen = self._held[first : first + 16384]
                error = self._errors(chosen).abs()
                total += float((error * torch.from_numpy(self._balance[chosen])).sum())
        return total / float(self._balance[self._held].sum())

    def best_tensors(self) -> dict[str, NDArray[np.float32]]:
        with torch.no_grad():
            for parameter, best in zip(self._parameters, self._best, strict=True):
                parameter.copy_(best)
        return self._network.numpy_tensors()

    def _step(self, chosen: IntArray, noise: torch.Generator) -> float:
        error = self._errors(chosen, noise)
        loss = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=_HUBER_DELTA)
        total = (loss * torch.from_numpy(self._weight[chosen])).mean()
        self._optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        return float(total.detach())

    def _errors(self, chosen: IntArray, noise: torch.Generator | None = None) -> torch.Tensor:
        """(g,) log(predicted / measured)."""
        batch = batch_of(self._rows, chosen)
        inputs = batch.inputs
        if noise is not None and self._settings.device_noise > 0:
            shift = torch.randn(len(chosen), self._noise_scale.shape[0], generator=noise)
            inputs = replace(inputs, kinds=inputs.kinds + (shift * self._noise_scale)[batch.graph])
        log_time, log_factor = self._network(inputs)
        log_time = log_time + log_factor[batch.inputs.component] * batch.has_edge
        graph_s = batch.rest_s.index_add(0, batch.graph, log_time.exp() * batch.weight)
        return torch.log(graph_s) - batch.log_time_s

    def save(self, path: Path) -> None:
        """One file: weights, best weights, the optimizer's memory, and where the training is."""
        tensors: dict[str, NDArray[Any]] = {}
        for index, parameter in enumerate(self._parameters):
            state = self._optimizer.state[parameter]
            tensors[f"weight.{index}"] = parameter.detach().numpy()
            tensors[f"best.{index}"] = self._best[index].numpy()
            for name in ("step", "exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{index}"] = state[name].numpy()
        where = {
            "told": self._told(),
            "best_error": self._best_error,
            "stale_epochs": self._stale_epochs,
            "history": [asdict(one) for one in self.history],
        }
        tensors["where"] = np.frombuffer(json.dumps(where).encode(), np.uint8)
        data = save_tensors({name: np.array(one, order="C") for name, one in tensors.items()})
        write_bytes_atomically(data, path)

    def load(self, path: Path) -> None:
        """Go on from ``save``.

        Raises:
            BadRequest: it is damaged, or of other settings or data.
        """
        try:
            tensors = load_tensors(path.read_bytes())
            where = json.loads(tensors["where"].tobytes())
            if where["told"] != self._told():
                raise BadRequest(
                    f"{path}: belongs to a training with other settings or data; remove it"
                )
            with torch.no_grad():
                for index, parameter in enumerate(self._parameters):
                    state = self._optimizer.state[parameter]
                    parameter.copy_(torch.from_numpy(tensors[f"weight.{index}"]))
                    self._best[index].copy_(torch.from_numpy(tensors[f"best.{index}"]))
                    for name in ("step", "exp_avg", "exp_avg_sq"):
                        state[name].copy_(torch.from_numpy(tensors[f"{name}.{index}"]))
            self._best_error = float(where["best_error"])
            self._stale_epochs = int(where["stale_epochs"])
            self.history = [EpochMetrics(**one) for one in where["history"]]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise BadRequest(f"{path}: damaged checkpoint; remove it to start anew") from error

    def _told(self) -> dict[str, Any]:
        told = json.loads(json.dumps(asdict(self._settings)))
        told["features_version"] = FEATURES_VERSION
        told["num_graphs"] = self._rows.count
        told["sum_of_log_times"] = float(self._rows.log_time_s.sum(dtype=np.float64))
        return dict(told)


def _cycle(progress: float) -> float:
    """Share of the peak learning rate: up in the first eighth, then down along a cosine."""
    if progress < 0.125:
        return 0.05 + 0.95 * progress / 0.125
    return 0.5 * (1.0 + math.cos(math.pi * (progress - 0.125) / 0.875)) + 1e-3
