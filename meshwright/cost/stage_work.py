"""The work of every stage in one step, by cause: what a schedule is then simulated with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.calibration import Calibration
from meshwright.cost.collectives import CollectivePrices
from meshwright.cost.columns import FloatArray, IntArray, sums_by
from meshwright.cost.offload import offload_time_s
from meshwright.cost.parameters import ParameterState, StageParameters
from meshwright.cost.reduction import DataTraffic, Payload, traffic_times_s
from meshwright.cost.roofline import Roofline
from meshwright.cost.table import CostTable, Split
from meshwright.plans.plan import Recompute

__all__ = [
    "StageOrder",
    "StageWork",
    "beside_gathers",
    "exposed_s",
    "merged_columns",
    "overlap_terms",
    "stage_work",
    "work_parts",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOrder:
    """Segments sorted by stage, so that every stage is a run of them."""

    stage_of: IntArray
    """(segments,) stage of each segment."""
    segments: IntArray
    """(segments,) segment numbers by stage, ascending within each."""
    starts: IntArray
    """(stages,) place in ``segments`` of each stage's first."""

    @classmethod
    def of(cls, stage_of: IntArray) -> StageOrder:
        """From the stage of each segment; every stage has a segment."""
        counts = np.bincount(stage_of)
        assert (counts > 0).all(), "a stage without segments"
        return cls(
            stage_of=stage_of,
            segments=np.argsort(stage_of, kind="stable"),
            starts=np.concatenate([[0], np.cumsum(counts)[:-1]]),
        )

    def sums(self, amounts: FloatArray) -> FloatArray:
        """(stages,) sums of (segments,) amounts."""
        return np.add.reduceat(amounts[self.segments], self.starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """Seconds of every stage by cause; arrays of shape (stages,)."""

    forward: dict[str, FloatArray]
    """One micro-batch."""
    backward: dict[str, FloatArray]
    """One micro-batch."""
    tail: dict[str, FloatArray]
    """Once, after the last backward; the prologue too."""
    parts: dict[str, FloatArray] = field(default_factory=dict)
    """What is asked for of one micro-batch besides. ``weight``: the part of the backward that can
    be put off. For token slices: sums of ``CostTable.slice_times``, and ``hides``, 1 where launches
    hide behind the device's work."""

    def own_s(self, num_microbatches: int) -> FloatArray:
        """(stages,) what a stage works in one step."""
        each = (*self.forward.values(), *self.backward.values())
        tail: FloatArray = np.sum(list(self.tail.values()), axis=0)
        return np.asarray(num_microbatches * np.sum(each, axis=0) + tail)


def merged_columns(
    parts: Sequence[dict[str, FloatArray]], group_of_stage: IntArray
) -> dict[str, FloatArray]:
    """For every stage the column of its group."""
    if len(parts) == 1:
        return parts[0]
    every = np.arange(len(group_of_stage))
    return {
        cause: np.array([part[cause] for part in parts])[group_of_stage, every]
        for cause in parts[0]
    }


def stage_work(
    table: CostTable,
    split: Split,
    policies: tuple[Recompute, ...],
    *,
    order: StageOrder,
    rooflines: Sequence[Roofline],
    prices: CollectivePrices,
    bucket_bytes: int,
    traffic: DataTraffic,
    state: ParameterState,
    placed: StageParameters,
    tied_s: FloatArray,
    calibration: Calibration,
) -> StageWork:
    """Work of every stage, as if each had ``table`` and ``split``.

    Args:
        table: the cost table.
        split: the mesh.
        policies: recompute of each segment.
        order: which segments each stage has.
        rooflines: one for each stage.
        prices: of collectives.
        bucket_bytes: gradients are reduced in buckets of this size.
        traffic: of data parallelism.
        state: bytes of every parameter.
        placed: which parameters live where.
        tied_s: (stages,) seconds of exchanging tied gradients.
        calibration: how far communication hides.
    """
    times = {
        r: table.segment_times(split, policies, roofline=r, prices=prices) for r in set(rooflines)
    }

    def stages(field: str) -> FloatArray:
        amounts = {roofline: getattr(found, field) for roofline, found in times.items()}
        return _by_stage(amounts, order, rooflines)

    hides = np.array([roofline.queue_runs_ahead for roofline in rooflines])
    forward_s, backward_s = stages("forward_s"), stages("backward_s")

    def gather(payload: Payload) -> FloatArray:
        size = len(policies)
        return order.sums(traffic_times_s((payload,), split, prices, bucket_bytes=None, size=size))

    def gathered(payload: Payload, compute_s: FloatArray) -> FloatArray:
        added_s = calibration.gather_s_per_byte * order.sums(payload.num_bytes)
        return exposed_s(gather(payload) + added_s, compute_s, hides, beside_gathers(calibration))

    per_stage = partial(traffic_times_s, bucket_bytes=bucket_bytes, size=len(order.starts))
    exposed = partial(exposed_s, hides=hides, calibration=calibration)
    alone = 1 - calibration.tensor_overlap * hides
    forward = {
        "compute": forward_s + np.array([times[roofline].free_s for roofline in rooflines]),
        "launch": stages("forward_launch_s"),
        "tp_communication": alone * stages("forward_communication_s"),
        "zero_gather": gathered(traffic.forward_gather, compute_s=forward_s),
    }
    backward = {
        "compute": backward_s,
        "launch": stages("backward_launch_s"),
        "tp_communication": alone * stages("backward_communication_s"),
        "zero_gather": gathered(traffic.backward_gather, compute_s=backward_s),
        "dp_communication": exposed(per_stage(traffic.every_backward, split, prices), backward_s),
    }
    tail = {
        "compute": np.array([times[roofline].prologue_s for roofline in rooflines]),
        "dp_communication": exposed(per_stage(traffic.once, split, prices), backward_s)
        + _published_s(gather(traffic.publish[0]), forward_s, hides, calibration)
        + tied_s,
        "optimizer": _optimizer_s(state, placed, rooflines),
        "clipping": _memory_time_s(state.clipping_bytes, placed, rooflines),
    }
    return StageWork(forward=forward, backward=backward, tail=tail)


def work_parts(
    table: CostTable,
    split: Split,
    policies: tuple[Recompute, ...],
    *,
    order: StageOrder,
    rooflines: Sequence[Roofline],
    prices: CollectivePrices,
    work: StageWork,
    with_weight: bool,
    with_slices: bool,
) -> dict[str, FloatArray]:
    """``StageWork.parts``; arguments as for ``stage_work``.

    Args:
        table: the cost table.
        split: the mesh.
        policies: recompute of each segment.
        order: which segments each stage has.
        rooflines: one for each stage.
        prices: of collectives.
        work: the whole.
        with_weight: say which part of the backward can be put off.
        with_slices: say what token slices take.
    """
    by_segment: dict[Roofline, dict[str, FloatArray]] = {r: {} for r in set(rooflines)}
    for roofline, found in by_segment.items():
        if with_weight:
            found["weight"] = table.weight_gradient_s(
                split, policies, roofline=roofline, prices=prices
            )
        if with_slices:
            found |= table.slice_times(split, policies, roofline=roofline, prices=prices)
    parts = {
        name: _by_stage({r: found[name] for r, found in by_segment.items()}, order, rooflines)
        for name in by_segment[rooflines[0]]
    }
    if with_weight:
        parts["weight"] += work.backward["dp_communication"]
    parts["hides"] = np.array([float(roofline.queue_runs_ahead) for roofline in rooflines])
    return parts


def _optimizer_s(
    state: ParameterState, placed: StageParameters, rooflines: Sequence[Roofline]
) -> FloatArray:
    """(stages,) seconds of the optimizer's step, on the device and on the host."""

    def per_stage(amount: FloatArray) -> FloatArray:
        return sums_by(placed.stage, amount[placed.parameter], len(rooflines))

    offload_s = offload_time_s(
        per_stage(state.host_link_bytes),
        per_stage(state.host_step_bytes),
        link_bytes_per_s=np.array([r.to_host_bytes_per_s for r in rooflines]),
    )
    return _memory_time_s(state.step_traffic_bytes, placed, rooflines) + offload_s


def _memory_time_s(
    num_bytes: FloatArray, placed: StageParameters, rooflines: Sequence[Roofline]
) -> FloatArray:
    """(stages,) seconds of reading and writing ``num_bytes``, (parameters,), once."""
    total = sums_by(placed.stage, num_bytes[placed.parameter], len(rooflines))
    return np.asarray(total / np.array([roofline.bytes_per_s for roofline in rooflines]))


def _by_stage(
    amounts: Mapping[Roofline, FloatArray], order: StageOrder, rooflines: Sequence[Roofline]
) -> FloatArray:
    """(stages,) sums of (segments,) amounts, which each type of device has its own of."""
    sums = {roofline: order.sums(np.asarray(amount)) for roofline, amount in amounts.items()}
    return np.array([sums[roofline][stage] for stage, roofline in enumerate(rooflines)])


def exposed_s(
    communication_s: FloatArray,
    compute_s: FloatArray,
    hides: NDArray[np.bool_],
    calibration: Calibration,
) -> FloatArray:
    """What communication adds to compute it may run beside, each slowed by the other.

    On a CPU nothing hides: the cores that compute also move the bytes.
    """
    longer, gain = overlap_terms(calibration)
    beside_s = np.minimum(longer * communication_s, calibration.overlap_fraction * compute_s)
    return np.asarray(communication_s - gain * np.where(hides, beside_s, 0.0))


def _published_s(
    communication_s: FloatArray,
    forward_s: FloatArray,
    hides: NDArray[np.bool_],
    calibration: Calibration,
) -> FloatArray:
    """What the gather of updated parameters adds to the step."""
    beside = replace(calibration, overlap_fraction=calibration.publish_overlap)
    return exposed_s(communication_s, forward_s, hides, beside)


def beside_gathers(calibration: Calibration) -> Calibration:
    """``calibration`` as it holds for gathers of ZeRO-3."""
    share = calibration.gather_overlap * calibration.overlap_fraction
    return replace(calibration, overlap_fraction=share)


def overlap_terms(calibration: Calibration) -> tuple[float, float]:
    """How much longer communication takes beside compute; what a second side by side saves.

    In that second ``1 / longer`` seconds of communication are done, and compute falls back by its
    own slow-down.
    """
    longer = 1 + calibration.communication_slowdown
    return longer, max(1 / longer - calibration.compute_slowdown, 0.0)
