"""A few measurements of a new machine correct its prices, and nobody else's.

A price on a device is multiplied by ``exp(o)``, ``o`` the sum of a few *offsets* of that device:
one for all operators and one for each family of them, one for all collectives, one for each kind
and one for what stays in a host or leaves it. Given predicted and measured times, offsets are the
mode of::

    log(measured / predicted) = sum over offsets of share * offset + noise

with a normal prior around 0 for each (ridge regression), so that one measurement moves them part
of the way and many all the way. ``share`` is how much of the predicted time an offset multiplies;
where it is less than all, prediction and shares are found again with the new offsets and the step
is repeated (Gauss-Newton). The noise is estimated with them, from a prior worth four measurements,
and measurements far off count little (Cauchy weights). No offset leaves its bounds, and no price
falls below the roofline of the data sheet. Other devices' prices are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.model import Device, GroupLevel
from meshwright.cost.pricing import CollectivePricer, OperatorPricer, Priced
from meshwright.cost.work import Family, OperatorWork
from meshwright.errors import BadRequest
from meshwright.gnn_cost.collectives.model import kind_of
from meshwright.gnn_cost.collectives.samples import CollectiveSamples
from meshwright.gnn_cost.features import ideal_time_s
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.spmd.program import CollectiveKind

__all__ = [
    "ALL_COLLECTIVES",
    "ALL_OPERATORS",
    "MAX_OFFSET",
    "CorrectedCollectives",
    "CorrectedOperators",
    "MeasuredPart",
    "Offsets",
    "Prediction",
    "collective_prediction",
    "fit_offsets",
    "held_out_error",
    "operator_prediction",
    "step_prediction",
    "together",
]

FloatArray = NDArray[np.float64]

ALL_OPERATORS = "operators"
ALL_COLLECTIVES = "collectives"
MAX_OFFSET = float(np.log(3.0))
"""No price is changed by more than a factor of three."""

_DEVIATION = {ALL_OPERATORS: 0.3, ALL_COLLECTIVES: 0.4}
"""How far a machine is off as a whole, one standard deviation: an unseen GPU about 15 % by its data
sheet alone, a user's system (clocks, cooling, software) more."""
_DEVIATION_OF_PART = 0.15
_NOISE = 0.08
_NOISE_WORTH = 4.0
_CAUCHY_SCALE = 3.0
"""In deviations of the noise."""
_ROUNDS = 12
_SMALLEST_MOVE = 1e-9
_FEWEST_HELD_OUT, _FOLDS = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Offsets:
    """Offsets of one device, by name; what is absent is 0."""

    values: Mapping[str, float]
    deviations: Mapping[str, float]
    """How well each is known, one standard deviation; that of its prior where nothing tells."""
    noise: float
    """Of log(measured / predicted) around the corrected price, one standard deviation."""
    num_samples: int

    def factor_of_family(self, family: NDArray[np.int64]) -> FloatArray:
        """What prices of operators are multiplied with; (N,)."""
        table = np.zeros(max(Family) + 1)
        for one in Family:
            table[one] = self.values.get(family_offset(one), 0.0)
        total = self.values.get(ALL_OPERATORS, 0.0) + table[family]
        return np.exp(np.clip(total, -MAX_OFFSET, MAX_OFFSET))

    def factor_of_collective(self, kind: str, *, leaves_host: bool) -> float:
        """What prices of a kind of collective are multiplied with."""
        names = (ALL_COLLECTIVES, kind_offset(kind), reach_offset(leaves_host=leaves_host))
        total = sum(self.values.get(name, 0.0) for name in names)
        return float(np.exp(np.clip(total, -MAX_OFFSET, MAX_OFFSET)))


def family_offset(family: Family) -> str:
    """Name of the offset of a family of operators."""
    return f"{ALL_OPERATORS}.{family.name.lower()}"


def kind_offset(kind: str) -> str:
    """Name of the offset of a kind of collective."""
    return f"{ALL_COLLECTIVES}.{kind}"


def reach_offset(*, leaves_host: bool) -> str:
    """Name of the offset of collectives that stay in a host, or leave it."""
    return f"{ALL_COLLECTIVES}.{'between_hosts' if leaves_host else 'in_host'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """N predicted times, and what multiplies them."""

    time_s: FloatArray
    """(N,)"""
    names: tuple[str, ...]
    """Of K offsets."""
    shares: FloatArray
    """(N, K) of the time of each that the offset multiplies, 0 to 1."""


def fit_offsets(
    predict: Callable[[Mapping[str, float]], Prediction], measured_s: FloatArray
) -> Offsets:
    """Offsets that explain ``measured_s``.

    Args:
        predict: from offsets to what is predicted with them; always the same N and K.
        measured_s: (N,)

    Raises:
        BadRequest: nothing was measured, or a time is not above zero.
    """
    if not len(measured_s) or not (np.isfinite(measured_s) & (measured_s > 0)).all():
        raise BadRequest(
            "calibration: needs at least one measured time, each above zero; measure with "
            "`meshwright profile` or `meshwright run`"
        )
    found = predict({})
    prior = np.array([_DEVIATION.get(name, _DEVIATION_OF_PART) for name in found.names])
    theta = np.zeros(len(found.names))
    left = np.log(measured_s / found.time_s)
    noise = _NOISE
    for _ in range(_ROUNDS):
        weight = 1 / (1 + (left / (_CAUCHY_SCALE * noise)) ** 2)
        scaled = found.shares * (weight / noise**2)[:, None]
        precision = scaled.T @ found.shares + np.diag(prior**-2)
        wanted = np.linalg.solve(precision, scaled.T @ (left + found.shares @ theta))
        moved = np.clip(wanted, -MAX_OFFSET, MAX_OFFSET)
        step = float(np.abs(moved - theta).max(initial=0.0))
        theta = moved
        found = predict(dict(zip(found.names, theta.tolist(), strict=True)))
        left = np.log(measured_s / found.time_s)
        squares = float((weight * left**2).sum())
        noise = float(np.sqrt((_NOISE_WORTH * _NOISE**2 + squares) / (_NOISE_WORTH + weight.sum())))
        if step < _SMALLEST_MOVE:
            break
    deviation = np.sqrt(np.diag(np.linalg.inv(precision)))
    return Offsets(
        values=dict(zip(found.names, theta.tolist(), strict=True)),
        deviations=dict(zip(found.names, deviation.tolist(), strict=True)),
        noise=noise,
        num_samples=len(measured_s),
    )


def held_out_error(
    predict: Callable[[Mapping[str, float]], Prediction], measured_s: FloatArray
) -> float | None:
    """Mean of |predicted / measured - 1| of rows by offsets of the other rows.

    An eighth of the rows is left out in turn (of fewer than 8, one); None for fewer than 4.

    Args:
        predict: as ``fit_offsets`` takes it.
        measured_s: (N,)
    """
    if len(measured_s) < _FEWEST_HELD_OUT:
        return None
    # Tables repeat themselves every few rows, so turns are drawn.
    fold = np.random.default_rng(0).permutation(len(measured_s)) % _FOLDS
    error = np.zeros(len(measured_s))
    for number in range(fold.max() + 1):
        here = fold == number

        def of_others(values: Mapping[str, float], seen: NDArray[np.bool_] = ~here) -> Prediction:
            found = predict(values)
            return replace(found, time_s=found.time_s[seen], shares=found.shares[seen])

        offsets = fit_offsets(of_others, measured_s[~here])
        error[here] = np.abs(predict(offsets.values).time_s / measured_s - 1)[here]
    return float(error.mean())


def operator_prediction(
    pricer: OperatorPricer, graphs: MeasuredGraphs
) -> Callable[[Mapping[str, float]], Prediction]:
    """For ``fit_offsets``: times of measured graphs of one device, corrected.

    Args:
        pricer: without any correction.
        graphs: of one device.
    """
    (device,) = graphs.devices
    plain_s = pricer.operators(graphs.work, device).time_s
    floor_s = np.minimum(_roofline_s(graphs.work, device), plain_s)
    families = [Family(one) for one in np.unique(graphs.work.family)]
    names = (ALL_OPERATORS, *map(family_offset, families))

    def sums(values: FloatArray) -> FloatArray:
        return np.asarray(np.bincount(graphs.graph, values, minlength=graphs.count), np.float64)

    def predict(values: Mapping[str, float]) -> Prediction:
        offsets = Offsets(values=values, deviations={}, noise=0.0, num_samples=0)
        each_s = graphs.weight * np.maximum(
            plain_s * offsets.factor_of_family(graphs.work.family), floor_s
        )
        total_s = sums(each_s) + graphs.rest_s
        of_family = [sums(each_s * (graphs.work.family == one)) for one in families]
        shares = np.stack([sums(each_s), *of_family], axis=1) / total_s[:, None]
        return Prediction(time_s=total_s, names=names, shares=shares)

    return predict


def collective_prediction(
    pricer: CollectivePricer, samples: CollectiveSamples
) -> Callable[[Mapping[str, float]], Prediction]:
    """For ``fit_offsets``: times of measured collectives of one device, corrected."""
    plain_s = np.zeros(samples.count)
    shares: list[tuple[str, str]] = []
    for place, group in enumerate(samples.groups):
        mine = samples.group == place
        plain_s[mine] = pricer.collectives(
            kind_of(group.kind),
            samples.num_bytes[mine],
            levels=group.levels,
            num_ranks=group.num_ranks,
            device=group.device,
        ).time_s
        reach = reach_offset(leaves_host=_leaves_host(group.levels))
        shares.append((kind_offset(str(kind_of(group.kind))), reach))
    used = sorted({name for pair in shares for name in pair})
    names = (ALL_COLLECTIVES, *used)
    of_group = np.array([[1.0, *(float(name in pair) for name in used)] for pair in shares])
    matrix = of_group[samples.group]

    def predict(values: Mapping[str, float]) -> Prediction:
        total = matrix @ np.array([values.get(name, 0.0) for name in names])
        factor = np.exp(np.clip(total, -MAX_OFFSET, MAX_OFFSET))
        return Prediction(time_s=plain_s * factor, names=names, shares=matrix)

    return predict


def _roofline_s(work: OperatorWork, device: Device) -> FloatArray:
    return ideal_time_s(work, (device,), np.zeros(work.count, np.int64))


def _leaves_host(levels: Sequence[GroupLevel]) -> bool:
    return any(level.level_index > 0 for level in levels)


@dataclass(frozen=True, slots=True)
class CorrectedOperators:
    """An ``OperatorPricer`` with offsets for some devices."""

    pricer: OperatorPricer
    offsets: Mapping[str, Offsets]
    """By name of the device."""

    def operators(self, work: OperatorWork, device: Device) -> Priced:
        """See ``OperatorPricer``."""
        priced = self.pricer.operators(work, device)
        offsets = self.offsets.get(device.name)
        if offsets is None:
            return priced
        floor_s = np.minimum(_roofline_s(work, device), priced.time_s)
        corrected_s = priced.time_s * offsets.factor_of_family(work.family)
        return replace(priced, time_s=np.maximum(corrected_s, floor_s))


@dataclass(frozen=True, slots=True)
class CorrectedCollectives:
    """A ``CollectivePricer`` with offsets for some devices."""

    pricer: CollectivePricer
    offsets: Mapping[str, Offsets]
    """By name of the device."""

    def collectives(
        self,
        kind: CollectiveKind,
        num_bytes: FloatArray,
        *,
        levels: Sequence[GroupLevel],
        num_ranks: int,
        device: Device,
    ) -> Priced:
        """See ``CollectivePricer``."""
        priced = self.pricer.collectives(
            kind, num_bytes, levels=levels, num_ranks=num_ranks, device=device
        )
        offsets = self.offsets.get(device.name)
        if offsets is None:
            return priced
        factor = offsets.factor_of_collective(str(kind), leaves_host=_leaves_host(levels))
        return replace(priced, time_s=priced.time_s * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPart:
    """Some measurements of one device, and how they are predicted."""

    predict: Callable[[Mapping[str, float]], Prediction]
    measured_s: FloatArray


def together(parts: Sequence[MeasuredPart]) -> MeasuredPart:
    """All measurements of ``parts``; an offset that a part does not know multiplies none of it."""

    def predict(values: Mapping[str, float]) -> Prediction:
        found = [part.predict(values) for part in parts]
        names = tuple(dict.fromkeys(name for one in found for name in one.names))
        shares = [np.zeros((len(one.time_s), len(names))) for one in found]
        for matrix, one in zip(shares, found, strict=True):
            matrix[:, [names.index(name) for name in one.names]] = one.shares
        return Prediction(
            time_s=np.concatenate([one.time_s for one in found]),
            names=names,
            shares=np.concatenate(shares),
        )

    measured_s = np.concatenate([part.measured_s for part in parts])
    return MeasuredPart(predict=predict, measured_s=measured_s)


def step_prediction(
    *, operators_s: FloatArray, collectives_s: FloatArray, rest_s: FloatArray
) -> Callable[[Mapping[str, float]], Prediction]:
    """For ``fit_offsets``: times of steps that are sums of three parts, (N,) each.

    The offsets of all operators and of all collectives multiply the first two.
    """

    def predict(values: Mapping[str, float]) -> Prediction:
        names = (ALL_OPERATORS, ALL_COLLECTIVES)
        parts_s = np.stack([operators_s, collectives_s], axis=1)
        parts_s = parts_s * np.exp([values.get(name, 0.0) for name in names])
        time_s = parts_s.sum(axis=1) + rest_s
        return Prediction(time_s=time_s, names=names, shares=parts_s / time_s[:, None])

    return predict
