"""From measured collectives to a ``CollectiveModel``: constants, trust and intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import BadRequest
from meshwright.gnn_cost.collectives.fit import fit_constants, predicted_time_s
from meshwright.gnn_cost.collectives.model import LinkClass
from meshwright.gnn_cost.collectives.pricer import CollectiveModel, Range
from meshwright.gnn_cost.collectives.samples import CollectiveSamples, thinned
from meshwright.gnn_cost.collectives.splits import analytic_time_s, family_labels, splits
from meshwright.gnn_cost.held_out import Split

__all__ = ["INTERVAL_QUANTILE", "fit_collectives", "half_width"]

FloatArray = NDArray[np.float64]

INTERVAL_QUANTILE = 0.9
_LEAST_TRUST_ROWS = 20
_NO_OTHER_WIDTH = 1.0
"""Half width where no system of a family could be left out: a factor of 2.7."""


def fit_collectives(
    samples: CollectiveSamples,
    *,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    on_split: Callable[[Split, CollectiveSamples, FloatArray], None] | None = None,
) -> CollectiveModel:
    """Constants from all of ``samples``; trust and intervals from what is left out in turn.

    Args:
        samples: as they were read; they are thinned here.
        seed: of what is drawn; equal seeds give equal models.
        progress: told the fraction that is done and what is done.
        on_split: told of each split left out in turn, what was judged and its predicted times.

    Raises:
        BadRequest: too few measurements.
    """
    if samples.count < _LEAST_TRUST_ROWS:
        raise BadRequest(
            f"{samples.count} measured collectives are too few to fit; give {_LEAST_TRUST_ROWS} or "
            f"more, such as a sweep of `meshwright profile collectives`"
        )
    samples = thinned(samples)
    planned = [split for split in splits(samples) if split.kind in ("size", "system")]
    families = family_labels(samples)
    seen: list[FloatArray] = []
    unseen: dict[str, list[tuple[FloatArray, FloatArray]]] = {}
    for done, split in enumerate(planned):
        if progress is not None:
            progress(done / (len(planned) + 1), f"leaving out {split.name}")
        constants = fit_constants(samples.where(split.train), seed=seed)
        test = samples.where(split.test)
        predicted_s = predicted_time_s(constants, test)
        if on_split is not None:
            on_split(split, test, predicted_s)
        error = np.log(predicted_s / test.time_s)
        if split.kind == "size":
            seen.append(error)
            continue
        analytic = np.log(analytic_time_s(test) / test.time_s)
        for family in np.unique(families[split.test]):
            mine = families[split.test] == family
            unseen.setdefault(str(family), []).append((error[mine], analytic[mine]))
    constants = fit_constants(samples, seed=seed)
    lasting = {
        system: dict(effects)
        for system, effects in constants.effects.items()
        if not system.startswith(("infiniband", "ethernet"))
    }
    return CollectiveModel(
        values=dict(constants.values),
        effects=lasting,
        launch_s=dict(constants.launch_s),
        ranges=_ranges(samples),
        unseen_trust={family: _trust(errors) for family, errors in unseen.items()},
        seen_half_width=half_width(seen) if seen else _NO_OTHER_WIDTH,
        unseen_half_width={
            family: half_width([mine for mine, _ in errors]) for family, errors in unseen.items()
        },
    )


def half_width(errors: list[FloatArray]) -> float:
    """The |error| that ``INTERVAL_QUANTILE`` of them do not exceed, every array weighing equally.

    Conformal for a system like those left out: of ``k`` arrays the ``k + 1``-th part of the weight
    is laid on infinity, up to what still leaves a finite width.
    """
    weight = np.concatenate([np.full(len(error), 1 / len(error)) for error in errors])
    size = np.abs(np.concatenate(errors))
    order = np.argsort(size)
    reached = np.cumsum(weight[order]) / weight.sum()
    wanted = min(INTERVAL_QUANTILE * (1 + 1 / len(size)), 1.0)
    place = min(int(np.searchsorted(reached, wanted - 1e-12)), len(size) - 1)
    return float(size[order][place])


def _trust(errors: list[tuple[FloatArray, FloatArray]]) -> float:
    """Share of squared error that is the analytic formulas'; robust, systems weighing equally."""
    learned = np.mean([np.median(np.abs(mine)) ** 2 for mine, _ in errors])
    analytic = np.mean([np.median(np.abs(other)) ** 2 for _, other in errors])
    return float(analytic / (analytic + learned)) if analytic + learned > 0 else 0.0


def _ranges(samples: CollectiveSamples) -> dict[str, Range]:
    groups = samples.features()
    kinds = samples.labels("kind")
    found = {}
    for family in (LinkClass.NVLINK, LinkClass.PCIE, LinkClass.NETWORK):
        mine = (groups.family == family) & (groups.size > 1)
        if mine.any():
            found[family.name.lower()] = Range(
                least_bytes_per_s=float(groups.sheet_bytes_per_s[mine].min()),
                most_bytes_per_s=float(groups.sheet_bytes_per_s[mine].max()),
                most_ranks=int(groups.size[mine].max()),
                kinds=tuple(np.unique(kinds[mine.any(axis=0)]).tolist()),
            )
    return found
