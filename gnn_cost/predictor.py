"""Prices operators by the learned model, without torch: ``meshwright.cost.pricing.OperatorPricer``.

For each operator the members of the ensemble agree on the mean of their log times; trust in what is
known of the device draws it to what is typical for the family on any device::

    log t = device trust * mean over members of log t + (1 - device trust) * log t_typical

No operator is faster than its ideal time, none slower than ``LARGEST_OVER_TYPICAL`` times what is
typical and a start, and none is predicted faster when one of its sizes grows
(``gnn_cost.network``); device trust is the same for all sizes, so it changes nothing of that. The
trust that is told, and that widens intervals, falls with the distance of sizes too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.catalog import makers_of
from meshwright.cluster.model import Device
from meshwright.cost.pricing import Priced
from meshwright.cost.work import Family, OperatorWork
from meshwright.errors import BadRequest
from meshwright.gnn_cost.features import FEATURES_VERSION, ideal_time_s, operator_features
from meshwright.gnn_cost.forward import (
    KIND_NAMES,
    LOG_MAX_START_S,
    NUM_DIRECTED_KINDS,
    NUM_SIZES,
    log_times,
)
from meshwright.gnn_cost.intervals import half_widths, scales
from meshwright.gnn_cost.operators.typical import typical_times_s
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.gnn_cost.trust import (
    device_distance,
    device_trust,
    is_measured,
    is_seen,
    trust_of,
)
from meshwright.gnn_cost.weights import load_weights

__all__ = [
    "LARGEST_OVER_TYPICAL",
    "MODEL_VERSION",
    "WEIGHTS_KIND",
    "LearnedOperators",
    "load_operators",
    "makers_fitted",
    "pretrained",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MODEL_VERSION = 3
"""Grows when the same tensors would mean something else."""

WEIGHTS_KIND = "operators"

LARGEST_OVER_TYPICAL = 20.0
"""Times what is typical of its family that an operator may take, beside a start of at most
``exp(LOG_MAX_START_S)`` seconds."""

_NO_EDGES = np.zeros((2, 0), np.int64), np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prediction:
    """(N,) each."""

    log_time: FloatArray
    """Of seconds; trust has its say already."""
    spread: FloatArray
    """Standard deviation of the members' log times."""
    trust: FloatArray
    """By sizes and device."""
    is_measured: NDArray[np.bool_]
    """Its device was, with its family and width of elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedOperators:
    """An ensemble of graph networks, and what keeps it in bounds.

    The flags switch parts off, so that what they bring can be measured.
    """

    tensors: dict[str, NDArray[Any]]
    """Of ``gnn_cost.ensemble``."""
    makers: frozenset[str] = frozenset()
    """Of the devices it was fitted on; empty where that is not known, and then of all."""
    device_names: frozenset[str] = frozenset()
    """Of the devices it was fitted on; empty where that is not known, and then those whose data
    sheets are equal."""
    uses_ensemble: bool = True
    """Else the first member speaks alone."""
    uses_trust: bool = True
    """Else trust is 1 everywhere."""
    uses_messages: bool = True
    """Else every operator is priced as if it were alone."""

    def operators(self, work: OperatorWork, device: Device) -> Priced:
        """Times of all rows on one device; never below the ideal time."""
        device_rows = np.zeros(work.count, np.int64)
        prediction = self._predict(work, (device,), device_rows)
        return Priced(time_s=np.exp(prediction.log_time), trust=prediction.trust)

    def intervals(self, work: OperatorWork, device: Device) -> tuple[FloatArray, FloatArray]:
        """Bounds between which 90 % of measurements are expected; (N,) each, seconds."""
        prediction = self._predict(work, (device,), np.zeros(work.count, np.int64))
        scale = scales(prediction.spread, prediction.trust, prediction.is_measured)
        width = half_widths(self.tensors, scale, work.family)
        time_s = np.exp(prediction.log_time)
        return time_s * np.exp(-width), time_s * np.exp(width)

    def predict(self, graphs: MeasuredGraphs) -> FloatArray:
        """Times of measured graphs, ``rest_s`` included; (G,) seconds."""
        device_rows = graphs.device[graphs.graph]
        prediction = self._predict(graphs.work, graphs.devices, device_rows)
        time_s = graphs.weight * np.exp(prediction.log_time)
        return np.bincount(graphs.graph, time_s, graphs.count) + graphs.rest_s

    def graph_scales(self, graphs: MeasuredGraphs) -> tuple[FloatArray, IntArray]:
        """Expected size of each graph's error in logarithms, and its costliest row's family."""
        device_rows = graphs.device[graphs.graph]
        prediction = self._predict(graphs.work, graphs.devices, device_rows)
        time_s = graphs.weight * np.exp(prediction.log_time)
        scale = scales(prediction.spread, prediction.trust, prediction.is_measured)
        total_s = np.bincount(graphs.graph, time_s, graphs.count)
        mean = np.bincount(graphs.graph, time_s * scale, graphs.count) / total_s
        order = np.lexsort((time_s, graphs.graph))
        last = np.searchsorted(graphs.graph, np.arange(graphs.count), side="right") - 1
        return mean, graphs.work.family[order[last]]

    def _predict(
        self, work: OperatorWork, devices: Sequence[Device], device_rows: IntArray
    ) -> _Prediction:
        features = operator_features(work, devices, device_rows)
        ideal_s = ideal_time_s(work, devices, device_rows)
        edges, edge_kind = _NO_EDGES
        if self.uses_messages and "edges_seen" in self.tensors:
            known = is_seen(self.tensors["edges_seen"], work)
            edges, edge_kind = work.edges[:, known], work.edge_kind[known]
        log_time_MN = log_times(
            self.tensors,
            features,
            ideal_s,
            edges_2E=edges,
            edge_kind_E=edge_kind,
            is_pooled_N=work.family != Family.COLLECTIVE,
        )
        log_time = log_time_MN.mean(axis=0) if self.uses_ensemble else log_time_MN[0]
        trust = shrink = np.ones(work.count)
        apart = device_distance(self.tensors, features, work.family)
        if self.uses_trust:
            is_other = np.array([self._is_other_maker(device) for device in devices], np.bool_)
            shrink = device_trust(apart, is_other_maker_N=is_other[device_rows])
            trust = np.minimum(trust_of(self.tensors, features, work.family), shrink)
        is_known = np.array([self._is_known(device) for device in devices], np.bool_)
        typical_s = typical_times_s(self.tensors, ideal_s, work.family)
        most_s = LARGEST_OVER_TYPICAL * typical_s + math.exp(LOG_MAX_START_S)
        log_time = np.minimum(log_time, np.log(most_s))
        log_time = shrink * log_time + (1.0 - shrink) * np.log(typical_s)
        return _Prediction(
            log_time=np.maximum(log_time, np.log(ideal_s)),
            spread=log_time_MN.std(axis=0),
            trust=trust,
            is_measured=is_known[device_rows] & is_measured(apart),
        )

    def _is_known(self, device: Device) -> bool:
        return not self.device_names or device.name in self.device_names

    def _is_other_maker(self, device: Device) -> bool:
        return bool(self.makers) and not makers_of([device.name]) <= self.makers


def load_operators(path: Path) -> LearnedOperators:
    """The model in a file of weights, with its card beside it.

    Raises:
        BadRequest: a file is missing, damaged, or of another kind or version.
    """
    versions = {"features_version": FEATURES_VERSION, "model_version": MODEL_VERSION}
    tensors, card = load_weights(path, kind=WEIGHTS_KIND, versions=versions)
    _require_shapes(tensors, path)
    figures = card.get("figures")
    names = _devices_fitted(figures if isinstance(figures, dict) else {})
    return LearnedOperators(tensors=tensors, makers=makers_of(names), device_names=names)


def makers_fitted(figures: Mapping[str, object]) -> frozenset[str]:
    """Who makes the devices of a fit, by its card's figures; empty where they do not tell."""
    return makers_of(_devices_fitted(figures))


def _devices_fitted(figures: Mapping[str, object]) -> frozenset[str]:
    names = figures.get("devices")
    return frozenset(map(str, names)) if isinstance(names, list) else frozenset()


@cache
def pretrained() -> LearnedOperators:
    """The model that comes with the package."""
    folder = resources.files("meshwright.gnn_cost.pretrained")
    return load_operators(Path(str(folder)) / f"{WEIGHTS_KIND}.safetensors")


def _require_shapes(tensors: Mapping[str, NDArray[Any]], path: Path) -> None:
    """What is there must fit together, whoever wrote it."""
    try:
        members, sizes, hidden = tensors["one_weight"].shape
        kinds = tensors["first_weight"].shape[1]
        centers, counted = tensors["trust_centers"].shape
        layers = {
            "first": (kinds, hidden),
            "second": (hidden, hidden),
            "size_gate": (hidden, sizes),
            "out_shift": (hidden, 1),
        }
        for name in ("one_gate", "one_shift", "two_gate", "two_shift", "out_gate"):
            layers[name] = (hidden, hidden)
        expected: dict[str, tuple[int, ...]] = {
            "size_mean": (members, NUM_SIZES),
            "size_scale": (members, NUM_SIZES),
            "kind_mean": (members, len(KIND_NAMES)),
            "kind_scale": (members, len(KIND_NAMES)),
            "two_weight": (members, hidden, hidden),
            "out_weight": (members, hidden, 1),
            "skip_weight": (members, sizes, 1),
            "graph_weight": (members, hidden),
            "graph_bias": (members,),
            "trust_mean": (counted,),
            "trust_spread": (counted,),
            "trust_family": (centers,),
            "trust_reach": (centers,),
            "device_family": tensors["device_points"].shape[:1],
            "typical_floor_s": (len(Family),),
            "typical_slowdown": (len(Family),),
            "interval_quantile": (len(Family),),
        }
        for name, (rows, columns) in layers.items():
            expected[f"{name}_weight"] = (members, rows, columns)
            expected[f"{name}_bias"] = (members, columns)
        if "message_weight" in tensors:
            rounds = tensors["message_weight"].shape[1]
            directed = (members, rounds, NUM_DIRECTED_KINDS, hidden, hidden)
            expected["message_weight"] = directed
            expected["edges_seen"] = (len(tensors["edges_seen"]), 3)
        positive = ("one_weight", "two_weight", "out_weight", "skip_weight", "typical_slowdown")
        if any((tensors[name] < 0).any() for name in positive):
            raise BadRequest(f"{path}: weights of sizes are negative; fit the weights again")
        wrong = [name for name, shape in expected.items() if tensors[name].shape != shape]
        wrong += [name for name, one in tensors.items() if not np.isfinite(one).all()]
    except (KeyError, ValueError, TypeError) as error:
        raise BadRequest(f"{path}: a tensor is missing ({error}); fit the weights again") from error
    if wrong:
        raise BadRequest(f"{path}: {wrong[0]} has a wrong shape or value; fit the weights again")
