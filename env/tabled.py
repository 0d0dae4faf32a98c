"""What segments take by the model's own cost tables, for a glance at many rows.

A table of the whole graph serves every way of cutting the batch, so there is one for each degree of
tensor parallelism and way of sharding, and one pricing of its segments for each part of the batch.
Contexts and experts count as further cuts of the batch here: what they talk comes on top.

V segments, P stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np

from meshwright.cost.columns import sums_by
from meshwright.cost.model import StepCostModel
from meshwright.cost.table import CostTable, Split
from meshwright.env.instance import FloatArray
from meshwright.errors import PlanRefused
from meshwright.plans.plan import Recompute
from meshwright.space.decision import Sharding, Skeleton
from meshwright.space.parameter_costs import parameter_costs
from meshwright.space.partition import least_bottleneck
from meshwright.space.search import SearchContext
from meshwright.space.segment_costs import split_of_skeleton, stage_rooflines, table_of_sharding
from meshwright.space.skeletons import shardings_for

__all__ = ["PARAMETERS", "SEGMENTS", "Experts", "Staged", "Tabled", "experts", "tabled"]

SEGMENTS = (
    "forward",
    "backward",
    "again",
    "talking",
    "kept",
    "least_kept",
    "transient",
    "most_transient",
)
"""Of one micro-batch on one rank: seconds with launches and collectives, ``again`` what full
recompute adds and ``talking`` the collectives' part of it all; bytes kept and beyond, with nothing
and with everything computed again."""

PARAMETERS = ("parameters", "gradients", "optimizer", "step_traffic", "expert_parameters")
"""Bytes of one rank without ZeRO."""

_USEFUL = ("plain", "tensor", "tensor+sequence")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Staged:
    """Sums over stages, (P,) each."""

    segments: dict[str, FloatArray]
    parameters: dict[str, FloatArray]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experts:
    """Of experts on ranks of their own."""

    share: FloatArray
    """(V,) of a segment's parameters: what the ranks divide."""
    talking_s: float
    """Exchanges of a step of one micro-batch, without other parallelism."""


class Tabled:
    """All segments sharded in one way."""

    def __init__(self, context: SearchContext, skeleton: Skeleton, sharding: Sharding) -> None:
        """The table is made now.

        Raises:
            PlanRefused: the graph cannot be sharded so.
        """
        self._pricer = context.model.pricer
        self._table: CostTable = table_of_sharding(context, skeleton, sharding)
        self._skeleton = skeleton
        self.ways = context.cluster.num_devices // skeleton.num_devices_per_stage
        everything = Skeleton.of({**skeleton.sizes, "dp_replicate": max(1, self.ways)})
        self.roofline = stage_rooflines(context, everything)[0]
        self._segments: dict[float, dict[str, FloatArray]] = {}
        self._staged: dict[tuple[float, int], Staged] = {}

    @cached_property
    def parameters(self) -> dict[str, FloatArray]:
        """(V,) by ``PARAMETERS`` but for the last."""
        found = parameter_costs(
            self._table,
            split_of_skeleton(self._skeleton),
            zero_stage=0,
            offload=False,
            optimizer=self._pricer.optimizer,
            calibration=self._pricer.calibration,
            prices=self._pricer.prices,
        ).amounts
        return {name: found[name] for name in PARAMETERS[:-1]}

    def segments(self, parts: float) -> dict[str, FloatArray]:
        """(V,) by ``SEGMENTS`` of a part of the batch out of so many."""
        if parts not in self._segments:
            self._segments[parts] = self._priced(parts)
        return self._segments[parts]

    def _priced(self, parts: float) -> dict[str, FloatArray]:
        # As many ranks as there are, so that collectives share links as they would.
        sizes = {**self._skeleton.sizes, "dp_replicate": 1, "dp_shard": self.ways}
        split = Split(
            axis_sizes=tuple(sizes.items()),
            num_microbatches=1,
            num_stages=1,
            batch_scale=self.ways / parts,
        )
        count = self._table.num_segments
        ways = [(how,) * count for how in (Recompute.NONE, Recompute.FULL)]
        none, full = (
            self._table.segment_times(
                split, way, roofline=self.roofline, prices=self._pricer.prices
            )
            for way in ways
        )
        forward_s = none.forward_s + none.forward_launch_s + none.forward_communication_s
        kept, least = (self._kept(split, way) for way in ways)
        held = [self._table.transient_bytes(split, way).max(axis=0) for way in ways]
        return {
            "forward": forward_s,
            "backward": none.total_s - forward_s,
            "again": full.total_s - none.total_s,
            "talking": none.forward_communication_s + none.backward_communication_s,
            "kept": kept,
            "least_kept": least,
            "transient": held[0],
            "most_transient": held[1],
        }

    def whole_talking_s(self) -> float:
        """Collectives inside segments, the whole batch in one micro-batch on the table's ranks."""
        count = self._table.num_segments
        times = self._table.segment_times(
            split_of_skeleton(self._skeleton),
            (Recompute.NONE,) * count,
            roofline=self.roofline,
            prices=self._pricer.prices,
        )
        return float((times.forward_communication_s + times.backward_communication_s).sum())

    def _kept(self, split: Split, policies: tuple[Recompute, ...]) -> FloatArray:
        value, segment = self._table.activations(policies).saved
        value, segment = value[segment >= 0], segment[segment >= 0]
        is_first = np.append(True, value[1:] != value[:-1])[: len(value)]
        values = self._table.columns.values
        sizes = values.num_bytes[value] * self._table.weights(split)[values.scale[value]]
        return sums_by(segment[is_first], sizes[is_first], self._table.num_segments)

    def staged(self, parts: float, num_stages: int, expert: FloatArray) -> Staged:
        """The same on stages of equal time.

        Args:
            parts: of the batch.
            num_stages: P.
            expert: (V,) share of parameters that experts have.
        """
        key = (parts, num_stages)
        if key not in self._staged:
            found = self.segments(parts)
            time_s = found["forward"] + found["backward"]
            starts = least_bottleneck(time_s.tolist(), num_stages)
            assert starts is not None, "no more stages than segments"
            where = np.array(starts)
            every = {
                **self.parameters,
                "expert_parameters": expert * self.parameters["parameters"],
            }
            self._staged[key] = Staged(
                segments={
                    name: (np.maximum if "transient" in name else np.add).reduceat(amount, where)
                    for name, amount in found.items()
                },
                parameters={name: np.add.reduceat(x, where) for name, x in every.items()},
            )
        return self._staged[key]


_TABLED: WeakKeyDictionary[StepCostModel, dict[int, tuple[Tabled, ...]]]
_TABLED = WeakKeyDictionary()
_EXPERTS: WeakKeyDictionary[StepCostModel, dict[int, Experts]]
_EXPERTS = WeakKeyDictionary()


def _skeleton(context: SearchContext, axis: str, size: int) -> Skeleton:
    return Skeleton.of({axis: size}, communication=context.pins.communication)


def tabled(context: SearchContext, tp: int) -> tuple[Tabled, ...]:
    """Every useful way of sharding with so much tensor parallelism; none where it is refused."""
    known = _TABLED.setdefault(context.model, {})
    if tp not in known:
        found = []
        skeleton = _skeleton(context, "tp", tp)
        for sharding in shardings_for(context, skeleton):
            if sharding.name in _USEFUL:
                try:
                    found.append(Tabled(context, skeleton, sharding))
                except PlanRefused:
                    continue
        known[tp] = tuple(found)
    return known[tp]


def experts(context: SearchContext, ep: int) -> Experts:
    """What ``ep`` ranks of experts divide and talk; nothing where they cannot be cut."""
    known = _EXPERTS.setdefault(context.model, {})
    if ep not in known:
        count = len(context.model.segment_classes)
        known[ep] = Experts(share=np.zeros(count), talking_s=0.0)
        if ep > 1 and tabled(context, 1):
            skeleton = _skeleton(context, "ep", ep)
            try:
                cut = Tabled(context, skeleton, shardings_for(context, skeleton)[0])
            except PlanRefused:
                return known[ep]
            whole = tabled(context, 1)[0].parameters["parameters"]
            share = 1 - cut.parameters["parameters"] / np.maximum(whole, 1.0)
            known[ep] = Experts(
                share=np.clip(share / (1 - 1 / ep), 0.0, 1.0), talking_s=cut.whole_talking_s()
            )
    return known[ep]
