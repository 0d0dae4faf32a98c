"""The stages of a plan space: devices, capacity, micro-batches in flight, ways between them.

Shapes: n plans, P stages, C columns.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np

from meshwright.cost.columns import FloatArray, IntArray
from meshwright.cost.step import StepPricer
from meshwright.space.decision import Skeleton
from meshwright.space.search import SearchContext
from meshwright.space.segment_costs import TIMES, SegmentCosts, stage_rooflines
from meshwright.spmd.schedule import chain, num_in_flight, peaks_in_flight

__all__ = ["SpaceStages"]


class SpaceStages:
    """What the stages of a skeleton have, whatever runs on them; arrays of shape (P,)."""

    def __init__(self, context: SearchContext, skeleton: Skeleton, costs: SegmentCosts) -> None:
        """Look everything up."""
        pricer, count = context.model.pricer, skeleton.num_stages
        each = skeleton.num_devices_per_stage
        found = stage_rooflines(context, skeleton)
        self.roofline = np.array([costs.rooflines.index(roofline) for roofline in found])
        self.hides = np.array([roofline.queue_runs_ahead for roofline in found])
        self.bytes_per_s = np.array([roofline.bytes_per_s for roofline in found])
        self.to_host_bytes_per_s = np.array([roofline.to_host_bytes_per_s for roofline in found])
        self.capacity_bytes = np.array(
            [float(pricer.device_of_stage(stage * each, each)[1]) for stage in range(count)]
        )
        self.in_flight = np.array(
            [
                num_in_flight(
                    skeleton.schedule,
                    stage=stage,
                    num_stages=count,
                    num_microbatches=skeleton.num_microbatches,
                )
                for stage in range(count)
            ],
            dtype=np.float64,
        )
        self._moments = _moments(skeleton) if costs.put_off is not None else []
        self.gathers = any(strategy.zero_stage == 3 for strategy in costs.strategies)
        self.keeps_chunks = np.array(
            [s.zero_stage >= 2 and skeleton.sizes["dp_shard"] > 1 for s in costs.strategies]
        )
        self._num_rooflines = len(costs.rooflines)
        self._latency_s, self._s_per_byte = _lines(pricer, count, each)

    def held(self, kept: FloatArray, waiting: FloatArray) -> FloatArray:
        """(n, P) most bytes kept at once, from those of one micro-batch."""
        if not self._moments:
            return np.asarray(self.in_flight * kept)
        found = np.zeros(kept.shape)
        for stage, moments in enumerate(self._moments):
            for forward, put_off in moments:
                now = forward * kept[:, stage] + put_off * waiting[:, stage]
                found[:, stage] = np.maximum(found[:, stage], now)
        return found

    def pick(self, sums: FloatArray) -> FloatArray:
        """(times, n, P) from (n, P, C): each stage's own roofline."""
        width = len(TIMES)
        if self._num_rooflines == 1:
            return np.moveaxis(sums[:, :, :width], 2, 0)
        own = self.roofline[:, None] * width + np.arange(width)
        return np.moveaxis(np.take_along_axis(sums, own[None], axis=2), 2, 0)

    def send_s(
        self, num_bytes: FloatArray, source: IntArray, target: IntArray | None = None
    ) -> FloatArray:
        """Seconds of one message each; to the next stage by default."""
        target = source + 1 if target is None else target
        line = self._latency_s[source, target] + num_bytes * self._s_per_byte[source, target]
        return np.where(num_bytes > 0, line, 0.0)

    def tied_s(self, tied_bytes: FloatArray) -> FloatArray:
        """(n, P) exchange of tied gradients between the first and the last holder."""
        holds = tied_bytes > 0
        if tied_bytes.shape[1] == 1 or not holds.any():
            return np.zeros(tied_bytes.shape)
        first = holds.argmax(axis=1)
        last = holds.shape[1] - 1 - holds[:, ::-1].argmax(axis=1)
        seconds = np.where(
            holds.sum(axis=1) > 1, self.send_s(tied_bytes.max(axis=1), first, last), 0.0
        )
        return np.asarray(holds * seconds[:, None])


def _moments(skeleton: Skeleton) -> list[list[tuple[int, int]]]:
    """Of each stage, how many micro-batches it holds at a time, and for how many W waits."""
    peaks = peaks_in_flight(
        skeleton.schedule,
        num_groups=skeleton.num_stages,
        num_microbatches=skeleton.num_microbatches,
        stage_inputs=chain(skeleton.num_stages),
    )
    # On a chain each group has one stage.
    return [
        [(m.forward[0], m.put_off[0]) for m in moments if m.forward[0] > 0] for moments in peaks
    ]


_Lines = tuple[FloatArray, FloatArray]
_LINES: WeakKeyDictionary[StepPricer, dict[tuple[int, int], _Lines]]
_LINES = WeakKeyDictionary()


def _lines(pricer: StepPricer, num_stages: int, num_devices: int) -> _Lines:
    """(P, P) latency and seconds per byte of a message between equal stages."""
    known = _LINES.setdefault(pricer, {})
    key = (num_stages, num_devices)
    if key not in known:
        first = [stage * num_devices for stage in range(num_stages)]
        # A message's time is affine in its bytes: two of them tell the line.
        few, many = (
            np.array([[pricer.prices.send_time_s(size, a, b) for b in first] for a in first])
            for size in (1.0, 1e9)
        )
        slope = (many - few) / (1e9 - 1.0)
        known[key] = (few - slope, slope)
    return known[key]
