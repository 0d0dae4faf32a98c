"""How far the time of a plan is learned, cause by cause.

A share is that of the seconds a cause takes before anything overlaps, each weighted by the trust in
its price. What a fit or a measurement of ``Calibration`` decides counts as learned. Causes that no
learned price or figure is for are left out, so that 0 says: learned from, but far from all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from meshwright.cost.calibration import Calibration, Origin
from meshwright.cost.choice import CORRECTION_CAUSE, Choice
from meshwright.cost.columns import FloatArray
from meshwright.cost.reduction import Payload
from meshwright.cost.step import StepPricer
from meshwright.cost.table import CostTable

__all__ = ["learned_share", "learned_shares"]

_FIGURES = {
    "launch": ("launch_scale",),
    "optimizer": ("optimizer_traffic",),
    "clipping": ("clipping_passes",),
    "host": ("host_s_per_microbatch", "host_s_per_step"),
    "data_loading": ("data_loading_share",),
    "stragglers": ("straggler_share",),
    "allocator": ("allocator_share",),
}
_WAITS_FOR = ("compute", "launch", "tp_communication", "zero_gather", "dp_communication")
"""What a bubble is as uncertain as."""

_Sum = tuple[float, float]
"""Seconds, and of these the learned ones."""


def learned_share(shares: Mapping[str, float], breakdown_s: Mapping[str, float]) -> float:
    """Of a whole step, 0 to 1."""
    total_s = sum(s for cause, s in breakdown_s.items() if cause != CORRECTION_CAUSE)
    learned_s = sum(shares.get(cause, 0.0) * seconds for cause, seconds in breakdown_s.items())
    return min(learned_s / total_s, 1.0) if total_s else 0.0


def learned_shares(
    pricer: StepPricer,
    tables: Sequence[CostTable],
    choice: Choice,
    breakdown_s: Mapping[str, float],
) -> dict[str, float]:
    """Causes to the learned share of their seconds (or bytes), 0 to 1; see the module docstring.

    Args:
        pricer: of the cost model.
        tables: one for each stage.
        choice: what is decided.
        breakdown_s: of the step.
    """
    found = _of_figures(pricer.calibration)
    if any(roofline.learned is not None for roofline in pricer.rooflines.values()):
        found["compute"] = _share([_compute(pricer, tables, choice)])
    if pricer.prices.is_learned:
        found |= _of_communication(pricer, tables, choice)
    if any(cause in found for cause in _WAITS_FOR):
        found["bubble"] = learned_share(
            found, {cause: breakdown_s.get(cause, 0.0) for cause in _WAITS_FOR}
        )
    return found


def _of_figures(calibration: Calibration) -> dict[str, float]:
    return {
        cause: 1.0
        for cause, names in _FIGURES.items()
        if any(calibration.origin_of(name) is not Origin.ASSUMPTION for name in names)
    }


def _share(sums: Iterable[_Sum]) -> float:
    total_s, learned_s = (sum(part) for part in zip((0.0, 0.0), *sums, strict=True))
    return min(learned_s / total_s, 1.0) if total_s else 0.0


def _compute(pricer: StepPricer, tables: Sequence[CostTable], choice: Choice) -> _Sum:
    stage_of = choice.stage_of(tables[0].num_segments)
    total_s = learned_s = 0.0
    for stage, (first, count) in enumerate(choice.places):
        device, _ = pricer.device_of_stage(first, count)
        times = tables[stage].segment_times(
            choice.split_of(stage),
            choice.policies,
            roofline=pricer.rooflines[device.name],
            prices=pricer.prices,
        )
        mine = stage_of == stage
        total_s += float((times.forward_s + times.backward_s)[mine].sum())
        learned_s += float(np.asarray(times.learned_s)[mine].sum())
    return total_s, learned_s


def _of_communication(
    pricer: StepPricer, tables: Sequence[CostTable], choice: Choice
) -> dict[str, float]:
    sums: dict[str, list[_Sum]] = {}
    stage_of = choice.stage_of(tables[0].num_segments)
    whole = np.zeros(tables[0].num_segments, dtype=np.int64)
    for number, table in enumerate(dict.fromkeys(tables)):
        stage = tables.index(table) if number else 0
        split = choice.split_of(stage)
        (counts,) = table.convert_counts(split, choice.policies, whole)
        inside = [
            Payload(kind=kind, axes=axes, num_bytes=np.full(1, each.num_bytes / each.count))
            for (kind, axes), each in counts.items()
        ]
        weights = [float(each.count) for each in counts.values()]
        traffic = pricer.traffic(table, choice, split)
        gathers = (traffic.forward_gather, traffic.backward_gather)
        reduced = (*traffic.once, *traffic.every_backward, *traffic.publish)
        for cause, payloads, times in (
            ("tp_communication", inside, weights),
            ("zero_gather", gathers, [1.0] * len(gathers)),
            ("dp_communication", reduced, [1.0] * len(reduced)),
        ):
            for payload, count in zip(payloads, times, strict=True):
                sums.setdefault(cause, []).append(_payload(pricer, payload, choice, stage, count))
    devices = choice.first_devices
    passing = tables[0].crossing_bytes(choice.split_of(0), stage_of) if len(devices) > 1 else {}
    for (_, source, target), num_bytes in passing.items():
        ends = devices[source], devices[target]
        seconds = pricer.prices.send_time_s(num_bytes, *ends)
        learned_s = seconds * pricer.prices.send_trust(num_bytes, *ends)
        sums.setdefault("pipeline_transfer", []).append((seconds, learned_s))
    return {cause: _share(parts) for cause, parts in sums.items() if any(s for s, _ in parts)}


def _payload(
    pricer: StepPricer, payload: Payload, choice: Choice, stage: int, count: float
) -> _Sum:
    split = choice.split_of(stage)
    axes, sizes = payload.axes, split.sizes
    seconds: FloatArray = pricer.prices.time_s(
        payload.kind,
        payload.num_bytes,
        axes=axes,
        axis_sizes=sizes,
        num_stages=split.num_stages,
        first_device=choice.first_devices[stage],
    )
    trust = pricer.prices.trust(
        payload.kind,
        payload.num_bytes,
        axes=axes,
        axis_sizes=sizes,
        num_stages=split.num_stages,
        first_device=choice.first_devices[stage],
    )
    return count * float(seconds.sum()), count * float((seconds * trust).sum())
