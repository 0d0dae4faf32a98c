"""An ensemble of graph networks with trust and intervals: everything a prediction needs.

Members see the same graphs with other seeds and other weights of groups of shapes. What is held out
is the same for all of them, so the ensemble's errors there calibrate its intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.catalog import makers_of
from meshwright.gnn_cost.batches import TrainingRows, training_rows
from meshwright.gnn_cost.features import FEATURES_VERSION
from meshwright.gnn_cost.intervals import fit_intervals
from meshwright.gnn_cost.operators.splits import take
from meshwright.gnn_cost.operators.typical import fit_typical
from meshwright.gnn_cost.predictor import MODEL_VERSION, LearnedOperators
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.gnn_cost.training import EpochMetrics, Trained, TrainingSettings, held_out, train
from meshwright.gnn_cost.trust import edges_seen, fit_trust

__all__ = ["EnsembleSettings", "FittedEnsemble", "GraphEnsemble", "fit_ensemble"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleSettings:
    """What decides the result beside the data."""

    num_members: int = 3
    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedEnsemble:
    """What training gave."""

    tensors: dict[str, NDArray[Any]]
    """For ``LearnedOperators``."""
    device_names: frozenset[str]
    """Of what was learned from."""
    histories: tuple[tuple[EpochMetrics, ...], ...]
    """Of each member."""
    is_held_out: BoolArray
    """(G,) graphs no member was trained on."""
    is_cut: bool
    """The caller stopped it."""

    @property
    def model(self) -> LearnedOperators:
        """Ready to predict."""
        makers = makers_of(self.device_names)
        return LearnedOperators(tensors=self.tensors, makers=makers, device_names=self.device_names)

    @property
    def card(self) -> dict[str, int]:
        """What the card must say for the weights to be read."""
        return {"features_version": FEATURES_VERSION, "model_version": MODEL_VERSION}


class GraphEnsemble:
    """The ensemble as the benchmarks' baselines are: ``fit`` and ``predict``."""

    def __init__(self, settings: EnsembleSettings | None = None) -> None:
        self._settings = settings or EnsembleSettings()
        self._model: LearnedOperators | None = None

    @property
    def model(self) -> LearnedOperators:
        """What was fitted."""
        assert self._model is not None, "fit first"
        return self._model

    def fit(self, graphs: MeasuredGraphs) -> None:
        """Learn from measured graphs, forgetting what was learned."""
        self._model = fit_ensemble(self._settings, graphs).model

    def predict(self, graphs: MeasuredGraphs) -> FloatArray:
        """Times of graphs, ``rest_s`` included; (G,) seconds."""
        return self.model.predict(graphs)


def fit_ensemble(
    settings: EnsembleSettings,
    graphs: MeasuredGraphs,
    *,
    checkpoints: Path | None = None,
    on_epoch: Callable[[int, EpochMetrics], None] = lambda member, metrics: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> FittedEnsemble:
    """Train all members, then trust, typical efficiencies and intervals.

    Args:
        settings: of the training.
        graphs: to learn from.
        checkpoints: folder with a file for each member to go on from.
        on_epoch: told the member and its epoch as it ends.
        is_stopped: asked after every epoch; true ends training with the best so far (of at least
            one member).

    Raises:
        BadRequest: nothing to learn from, or a checkpoint is of other settings or data.
    """
    rows = training_rows(graphs)
    members: list[Trained] = []
    for number in range(settings.num_members):
        if members and (members[-1].is_cut or is_stopped()):
            break
        own = replace(settings.training, seed=settings.training.seed + number)
        path = None if checkpoints is None else checkpoints / f"member-{number}.safetensors"
        members.append(
            train(
                own,
                rows,
                checkpoint=path,
                on_epoch=lambda metrics, number=number: on_epoch(number, metrics),  # type: ignore[misc]
                is_stopped=is_stopped,
            )
        )
    is_held = held_out(rows, settings.training)
    names = members[0].tensors
    tensors: dict[str, NDArray[Any]] = {
        name: np.stack([one.tensors[name] for one in members]) for name in names
    }
    tensors |= _surroundings(graphs, rows, is_held, settings.training.seed)
    tensors |= _intervals(tensors, graphs, is_held)
    return FittedEnsemble(
        tensors=tensors,
        device_names=frozenset(graphs.devices[at].name for at in np.unique(graphs.device)),
        histories=tuple(one.history for one in members),
        is_held_out=is_held,
        is_cut=len(members) < settings.num_members or members[-1].is_cut,
    )


def _surroundings(
    graphs: MeasuredGraphs, rows: TrainingRows, is_held: BoolArray, seed: int
) -> Mapping[str, NDArray[Any]]:
    """Trust and typical efficiencies of what was trained on."""
    trained = ~is_held if not is_held.all() else np.ones_like(is_held)
    is_single = np.diff(rows.row_start) == 1
    # What stands beside products in a measured layer hardly shows in its time.
    known = np.isin(graphs.work.family, graphs.work.family[is_single[graphs.graph]])
    of_row = trained[graphs.graph] & (is_single[graphs.graph] | ~known)
    tensors = dict(
        fit_trust(
            rows.features[of_row], graphs.work.family[of_row], rng=np.random.default_rng(seed)
        )
    )
    kept = take(graphs, trained)
    return tensors | edges_seen(kept.work) | fit_typical(kept)


def _intervals(
    tensors: dict[str, NDArray[Any]], graphs: MeasuredGraphs, is_held: BoolArray
) -> Mapping[str, NDArray[Any]]:
    chosen = take(graphs, is_held if is_held.any() else np.ones_like(is_held))
    model = LearnedOperators(tensors=tensors)
    scale, family = model.graph_scales(chosen)
    return fit_intervals(np.log(chosen.time_s / model.predict(chosen)), scale, family)
