"""How far measured peaks exceed predicted ones: the margin with which "fits" can be said.

A margin is the conformal 99th percentile of ``measured / predicted - 1`` over configurations, at
least 0; runs predicted alike are one configuration and count by their worst. Of fewer than 99
configurations the percentile is the worst seen. Each source has a margin of its own, drawn towards
that of all sources by its number of configurations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.gnn_cost.memory import MemoryFigures, SourceMargin
from meshwright.tracking import DataSource

__all__ = ["MARGIN_LEVEL", "Margins", "MeasuredPeak", "figures_of", "margins_of"]

MARGIN_LEVEL = 0.99
_PRIOR_CONFIGURATIONS = 20.0
"""A source with as many has half the say in its margin. Assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPeak:
    """A run's peak memory."""

    source: str
    measured_bytes: float
    predicted_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """Over the prediction."""

    general: float
    by_source: Mapping[str, float]
    configurations: Mapping[str, int]
    """By source."""


def margins_of(peaks: Sequence[MeasuredPeak]) -> Margins:
    """Margins of ``peaks``; 0 where there are none."""
    worst: dict[tuple[str, int], float] = {}
    for peak in peaks:
        key = (peak.source, round(peak.predicted_bytes))
        excess = peak.measured_bytes / peak.predicted_bytes - 1.0
        worst[key] = max(excess, worst.get(key, -1.0))
    general = _quantile(list(worst.values()))
    counts: dict[str, int] = {}
    by_source: dict[str, float] = {}
    for source in sorted({source for source, _ in worst}):
        own = [excess for (name, _), excess in worst.items() if name == source]
        counts[source] = len(own)
        share = len(own) / (len(own) + _PRIOR_CONFIGURATIONS)
        by_source[source] = share * _quantile(own) + (1 - share) * general
    return Margins(general=general, by_source=by_source, configurations=counts)


def figures_of(
    peaks: Sequence[MeasuredPeak],
    *,
    within_left_out: float,
    data: DataSource,
    licenses: Mapping[str, str],
) -> MemoryFigures:
    """What a ``memory.json`` says of ``peaks``; there must be one.

    ``licenses`` are by source, of these or others.
    """
    margins = margins_of(peaks)
    sources = {}
    for name in sorted(margins.by_source):
        own = [one for one in peaks if one.source == name]
        excess = np.median([one.measured_bytes / one.predicted_bytes - 1.0 for one in own])
        sources[name] = SourceMargin(
            margin=round(margins.by_source[name], 4),
            median_excess=round(float(excess), 4),
            runs=len(own),
            configurations=margins.configurations[name],
        )
    return MemoryFigures(
        level=MARGIN_LEVEL,
        margin=round(margins.general, 4),
        within_left_out=round(within_left_out, 4),
        sources=sources,
        data=[data],
        licenses={name: licenses[name] for name in sources if name in licenses},
    )


def _quantile(excess: Sequence[float]) -> float:
    if not excess:
        return 0.0
    rank = min(math.ceil((len(excess) + 1) * MARGIN_LEVEL), len(excess))
    return max(float(np.sort(excess)[rank - 1]), 0.0)
