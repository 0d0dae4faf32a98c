"""Constants of the learned collective cost, their bounds and priors, and what they give a group.

All constants live on a logarithmic or logistic scale, so that no fit leaves their bounds. A
*system* (device and link) has effects of its own on latency, filling, efficiency and sharing; they
vanish for a system that was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshwright.gnn_cost.collectives.model import (
    KINDS,
    REFERENCE_BYTES_PER_S,
    Groups,
    LinkClass,
    Terms,
)

__all__ = ["EFFECTS", "KIND_EFFECTS", "PRIORS", "CollectiveConstants", "effects_of", "terms_of"]

FloatArray = NDArray[np.float64]


def _logit(x: float) -> float:
    return math.log(x / (1 - x))


PRIORS: Mapping[str, tuple[float, float]] = {
    **{f"start.{kind}": (math.log(7e-6), 0.7) for kind in KINDS},
    **{f"hop.{kind}": (math.log(1e-6), 0.7) for kind in KINDS},
    **{f"fill.{kind}": (math.log(2e-5), 1.0) for kind in KINDS},
    **{f"fill_growth.{kind}": (0.0, 1.0) for kind in KINDS},
    **{f"half.{kind}": (math.log(8e6), 1.5) for kind in KINDS},
    **{f"efficiency.{kind}": (_logit(0.75), 0.7) for kind in KINDS},
    **{f"copy.{kind}": (_logit(0.4), 0.7) for kind in KINDS},
    "half_rate": (0.3, 0.3),
    "fill_rate": (1.0, 0.2),
    "multi_die": (0.0, 0.5),
    "clock_power": (1.0, 0.4),
    "pcie_latency": (math.log(5.7 / 3.4), 0.3),
    "switch_start": (math.log(2.5e-5), 0.3),
    "switch_efficiency": (_logit(0.55), 0.5),
    "pcie_efficiency": (0.0, 0.7),
    "pcie_sharing": (1.0, 0.5),
    "pcie_fill": (0.0, 1.0),
    "pcie_half": (0.0, 1.5),
    "network_hop": (0.0, 0.2),
    "network_fill": (0.0, 0.4),
    "network_efficiency": (_logit(0.8), 0.2),
}
"""Mean and standard deviation of every constant, on the scale it is fitted on. Those of networks
are narrow: the networks that were measured are slow ones whose data sheets are not known."""

EFFECTS: Mapping[str, float] = {
    "latency": 0.15, "fill": 0.3, "efficiency": 0.4, "switch": 0.4, "sharing": 0.7,
}  # fmt: skip
"""Standard deviation of a system's effects, for all kinds together."""
KIND_EFFECTS: Mapping[str, float] = {"latency": 0.15, "efficiency": 0.25, "fill": 0.25}
"""The same for one kind on one system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveConstants:
    """What a fit gives."""

    values: Mapping[str, float]
    """By the names of ``PRIORS``, on their scale."""
    effects: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By system: effects by name, ``latency``, ``latency.all_reduce``..."""
    launch_s: Mapping[str, float] = field(default_factory=dict)
    """By ``source|kind``: what that source's way of measuring adds."""


def terms_of(
    values: Mapping[str, float], groups: Groups, effects: Mapping[str, FloatArray]
) -> Terms:
    """Constants of the formulas for ``groups``.

    Args:
        values: by the names of ``PRIORS``, on their scale.
        groups: N groups.
        effects: of their systems, (N,) each: ``latency``, ``fill``, ``efficiency``, ``switch``;
            those on efficiency hold on the lowest level only.
    """

    def of_kind(name: str) -> FloatArray:
        return np.array([values[f"{name}.{kind}"] for kind in KINDS])[groups.kind]

    is_pcie = groups.family == LinkClass.PCIE
    slower = values["multi_die"] * groups.is_multi_die + effects["latency"]
    slower = slower + np.where(is_pcie.any(axis=0), values["pcie_latency"], 0.0)
    cycles = groups.cycle_ratio ** values["clock_power"] * np.exp(slower)
    is_network = groups.family == LinkClass.NETWORK
    network_hop = np.exp(values["network_hop"]) * groups.latency_s
    hop_s = np.where(is_network, network_hop, np.exp(of_kind("hop")) * cycles)
    slope = of_kind("efficiency") + np.where(is_pcie, values["pcie_efficiency"], 0.0)
    slope = np.where(is_network, values["network_efficiency"], slope)
    lowest = np.arange(len(groups.size))[:, None] == 0
    efficiency = _logistic(slope + np.where(lowest, effects["efficiency"], 0.0))
    power = np.maximum(values["pcie_sharing"] + effects["sharing"], 0.0)
    sharing = np.maximum(groups.size / 2, 1.0) ** power
    efficiency = np.where(is_pcie, efficiency / sharing, efficiency)
    efficiency = np.where(groups.size > 1, efficiency, 1.0)
    slowest = np.argmin(groups.sheet_bytes_per_s, axis=0)
    family = np.take_along_axis(groups.family, slowest[None], axis=0)[0]
    rate = np.min(groups.sheet_bytes_per_s, axis=0) / REFERENCE_BYTES_PER_S[family]
    growth = np.clip(of_kind("fill_growth"), 0.0, 2.0)
    fill = of_kind("fill") + effects["fill"] + growth * np.log(groups.num_ranks / 2)
    fill = fill - values["fill_rate"] * np.log(rate)
    on_pcie = family == LinkClass.PCIE
    shared = np.log(np.take_along_axis(sharing, slowest[None], axis=0)[0])
    fill = fill + np.where(on_pcie, values["pcie_fill"] + shared, 0.0)
    fill = fill + np.where(family == LinkClass.NETWORK, values["network_fill"], 0.0)
    half = of_kind("half") + values["half_rate"] * np.log(rate)
    half = half + np.where(on_pcie, values["pcie_half"], 0.0)
    return Terms(
        start_s=np.exp(of_kind("start")) * cycles,
        hop_s=hop_s,
        fill_s=np.exp(fill),
        half_bytes=np.exp(half),
        efficiency=efficiency,
        copy=_logistic(of_kind("copy")),
        switch_start_s=np.exp(values["switch_start"]) * cycles,
        switch_efficiency=_logistic(values["switch_efficiency"] + effects["switch"]),
    )


def _logistic(x: FloatArray) -> FloatArray:
    return np.asarray(1 / (1 + np.exp(-x)))


def effects_of(
    constants: CollectiveConstants, systems: Sequence[str], kinds: Sequence[str]
) -> dict[str, FloatArray]:
    """(N,) effects by name, for N pairs of a system and one of ``KINDS``; 0 for unknown systems."""
    found = [constants.effects.get(system, {}) for system in systems]
    return {
        name: np.array(
            [
                effects.get(name, 0.0) + effects.get(f"{name}.{kind}", 0.0)
                for effects, kind in zip(found, kinds, strict=True)
            ]
        )
        for name in EFFECTS
    }
