"""What every strategy of a skeleton costs every segment, as arrays that stages sum over.

V segments, S strategies, K shardings, P stages, C columns. All amounts are of one rank; times are
of one micro-batch unless they come once a step. A sum over the segments of a stage is exact but for

* a storage or parameter several segments use: counted with the first that does, and again on every
  later stage that has one (``Event``, ``kept_again``);
* a mixture of shardings: every segment is priced as if the whole graph used its sharding; what lies
  between unequal neighbors comes on top (``solvers.resharding``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from meshwright.cost.columns import FORWARD, FloatArray, IntArray, sums_by
from meshwright.cost.reduction import traffic_times_s
from meshwright.cost.roofline import Roofline
from meshwright.cost.table import CostTable, Split
from meshwright.plans.plan import ScheduleName
from meshwright.space.decision import Sharding, Skeleton, Strategy
from meshwright.space.parameter_costs import PayloadKey, gathers, parameter_costs
from meshwright.space.resharding import resharding_s, table_of_shardings
from meshwright.space.search import SearchContext

__all__ = [
    "COLUMNS",
    "TIMES",
    "Crossing",
    "Event",
    "SegmentCosts",
    "price_segments",
    "split_of_skeleton",
    "stage_rooflines",
    "table_of_sharding",
]

TIMES = (
    "forward_s",
    "backward_s",
    "forward_launch_s",
    "backward_launch_s",
    "forward_communication_s",
    "backward_communication_s",
)
"""Fields of ``SegmentTimes``: the first columns, once for each roofline."""

COLUMNS = (
    "forward_gather_s",
    "backward_gather_s",
    "publish_s",
    "step_traffic",
    "parameters",
    "optimizer",
    "gradients",
    "step",
    "host_link",
    "host_step",
    "local",
    "tied",
    "kept",
    "transient_forward",
    "transient_backward",
    "gathered_forward",
    "gathered_backward",
)
"""Columns after the times; bytes but for ``_s``. ``local``: parameters with a gradient, before
ZeRO; ``tied``: what tied parameters exchange. Then follow the payloads of gradient groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Amounts to add to ``segment`` where segments ``before`` and ``after`` lie on two stages."""

    before: int
    after: int
    segment: int
    amounts: FloatArray
    """(strategies, columns)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """Bytes from ``source`` to ``target`` where ``before`` and ``target`` lie on two stages.

    ``before`` is the last segment before ``target`` that has the values.
    """

    is_forward: bool
    source: int
    before: int
    target: int
    num_bytes: FloatArray
    """(shardings,)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentCosts:
    """See the module docstring."""

    strategies: tuple[Strategy, ...]
    shardings: tuple[Sharding, ...]
    sharding_of: IntArray
    """(strategies,)"""
    rooflines: tuple[Roofline, ...]
    amounts: FloatArray
    """(V, S, C): ``TIMES`` for each roofline, ``COLUMNS``, payloads."""
    payloads: tuple[PayloadKey, ...]
    events: tuple[Event, ...]
    kept_again: FloatArray
    """(V, S) bytes kept again where a stage starts at the segment."""
    cut_bytes: FloatArray
    """(2, V, K) bytes that pass forward, and backward, between a segment and the one before it that
    makes or first reads them."""
    crossings: tuple[Crossing, ...]
    """What goes farther."""
    free_s: FloatArray
    """(R, S) what every stage computes for itself in each micro-batch."""
    prologue_s: FloatArray
    """(R, S)"""
    shared_bytes: FloatArray
    """(S,)"""
    resharding: FloatArray | None = None
    """(2, V, K, K) seconds more in the forward of a segment, and in the backward of the one before
    it, where that one's sharding is the first and its own the second; ``None``: one sharding."""
    put_off: FloatArray | None = None
    """(V, S, R + 1) under ZB-H1: seconds of gradients of parameters on each roofline, and the bytes
    they wait with; ``None``: the schedule puts nothing off."""

    def column(self, name: str) -> int:
        """Place of one of ``COLUMNS``."""
        return len(TIMES) * len(self.rooflines) + COLUMNS.index(name)

    @property
    def first_payload(self) -> int:
        """Place of the first payload column."""
        return len(TIMES) * len(self.rooflines) + len(COLUMNS)

    def in_forms(self, places: IntArray) -> SegmentCosts:
        """The same where a segment's strategy costs what its form ``places`` (V, S) costs."""
        rows = np.arange(len(places))[:, None]
        return replace(
            self,
            amounts=self.amounts[rows, places],
            kept_again=self.kept_again[rows, places],
            put_off=None if self.put_off is None else self.put_off[rows, places],
        )


def split_of_skeleton(skeleton: Skeleton) -> Split:
    """The skeleton's mesh and micro-batches as the cost table takes them."""
    return Split(
        axis_sizes=skeleton.axis_sizes,
        num_microbatches=skeleton.num_microbatches,
        num_stages=skeleton.num_stages,
    )


def table_of_sharding(context: SearchContext, skeleton: Skeleton, sharding: Sharding) -> CostTable:
    """The table of one sharding everywhere.

    Raises:
        PlanRefused: the graph cannot be sharded so.
    """
    return table_of_shardings(context, skeleton, (sharding,) * len(context.model.segment_classes))


def stage_rooflines(context: SearchContext, skeleton: Skeleton) -> tuple[Roofline, ...]:
    """The slowest device of each stage, as the pricer takes it."""
    pricer = context.model.pricer
    count = skeleton.num_devices_per_stage
    devices = [
        pricer.device_of_stage(stage * count, count)[0] for stage in range(skeleton.num_stages)
    ]
    return tuple(pricer.rooflines[device.name] for device in devices)


def price_segments(
    context: SearchContext, skeleton: Skeleton, strategies: tuple[Strategy, ...]
) -> SegmentCosts:
    """Price all strategies for all segments.

    Raises:
        PlanRefused: the graph cannot be sharded as one of them wants.
    """
    shardings = tuple(dict.fromkeys(strategy.sharding for strategy in strategies))
    tables = [table_of_sharding(context, skeleton, sharding) for sharding in shardings]
    split = split_of_skeleton(skeleton)
    rooflines = tuple(dict.fromkeys(stage_rooflines(context, skeleton)))
    sharding_of = [shardings.index(strategy.sharding) for strategy in strategies]
    priced = [
        _Priced(context, split, tables[k], strategy, rooflines)
        for k, strategy in zip(sharding_of, strategies, strict=True)
    ]
    keys = tuple(dict.fromkeys(key for one in priced for key in one.parameters.payloads))
    passing = [_passing(table, split) for table in tables]
    return SegmentCosts(
        strategies=strategies,
        shardings=shardings,
        sharding_of=np.array(sharding_of, dtype=np.int64),
        rooflines=rooflines,
        amounts=np.stack([one.amounts(keys) for one in priced], axis=1),
        payloads=keys,
        events=_events(priced, keys),
        kept_again=np.stack([one.kept[1] for one in priced], axis=1),
        cut_bytes=np.stack([cut for cut, _ in passing], axis=2),
        crossings=_crossings([skips for _, skips in passing]),
        free_s=np.array([[times.free_s for times in one.times] for one in priced]).T,
        prologue_s=np.array([[times.prologue_s for times in one.times] for one in priced]).T,
        shared_bytes=np.array([tables[k].shared_bytes(split) for k in sharding_of]),
        resharding=(
            resharding_s(context, skeleton, shardings, split=split, roofline=rooflines[0])
            if len(shardings) > 1
            else None
        ),
        put_off=(
            np.stack([one.put_off(context, rooflines) for one in priced], axis=1)
            if skeleton.schedule is ScheduleName.ZB_H1 and skeleton.num_stages > 1
            else None
        ),
    )


class _Priced:
    """One strategy everywhere."""

    def __init__(
        self,
        context: SearchContext,
        split: Split,
        table: CostTable,
        strategy: Strategy,
        rooflines: tuple[Roofline, ...],
    ) -> None:
        pricer = context.model.pricer
        self.table, self.split = table, split
        self.count = table.num_segments
        self.policies = (strategy.recompute,) * self.count
        self.parameters = parameter_costs(
            table,
            split,
            zero_stage=strategy.zero_stage,
            offload=strategy.offload,
            optimizer=pricer.optimizer,
            calibration=pricer.calibration,
            prices=pricer.prices,
        )
        self.times = [
            table.segment_times(split, self.policies, roofline=roofline, prices=pricer.prices)
            for roofline in rooflines
        ]
        self.gathered: dict[str, FloatArray] = {}
        if strategy.zero_stage == 3:
            found = gathers(table, split, self.policies, self.parameters.state)
            for name, payload in zip(("forward", "backward"), found, strict=True):
                self.gathered[f"gathered_{name}"] = payload.num_bytes
                gather_s = traffic_times_s(
                    (payload,), split, pricer.prices, bucket_bytes=None, size=self.count
                )
                added_s = pricer.calibration.gather_s_per_byte * payload.num_bytes
                self.gathered[f"{name}_gather_s"] = gather_s + added_s
        self.kept = self._kept(pricer.is_rounded)

    def _kept(self, is_rounded: bool) -> tuple[FloatArray, FloatArray]:
        """(V,) bytes kept for one micro-batch, and again where a stage starts."""
        value, segment = self.table.activations(self.policies).saved
        value, segment = value[segment >= 0], segment[segment >= 0]
        columns = self.table.columns.values
        sizes = columns.num_bytes[value] * self.table.weights(self.split)[columns.scale[value]]
        if is_rounded:
            sizes = np.ceil(sizes / 512) * 512
        is_first = np.append(True, value[1:] != value[:-1])[: len(value)]
        later = np.flatnonzero(~is_first)
        change = sums_by(segment[later - 1] + 1, sizes[later], self.count + 1)
        change -= sums_by(segment[later] + 1, sizes[later], self.count + 1)
        first = sums_by(segment[is_first], sizes[is_first], self.count)
        return first, np.cumsum(change)[: self.count]

    def put_off(self, context: SearchContext, rooflines: tuple[Roofline, ...]) -> FloatArray:
        """(V, R + 1): see ``SegmentCosts``.

        What two segments wait with counts for both, also where they share a stage.
        """
        pricer, columns = context.model.pricer, self.table.columns.values
        seconds = [
            self.table.weight_gradient_s(
                self.split, self.policies, roofline=roofline, prices=pricer.prices
            )
            for roofline in rooflines
        ]
        value, segment = self.table.put_off.waiting
        sizes = columns.num_bytes[value] * self.table.weights(self.split)[columns.scale[value]]
        if pricer.is_rounded:
            sizes = np.ceil(sizes / 512) * 512
        return np.stack([*seconds, sums_by(segment, sizes, self.count)], axis=1)

    def amounts(self, keys: tuple[PayloadKey, ...]) -> FloatArray:
        """(V, C), every parameter with the first segment that reads it."""
        transient = self.table.transient_bytes(self.split, self.policies)
        found = self.placed(self.parameters.amounts, keys, self.count)
        values = {
            **self.gathered,
            "kept": self.kept[0],
            "transient_forward": transient[0],
            "transient_backward": transient[1],
        }
        offset = len(TIMES) * len(self.times)
        for name, amount in values.items():
            found[:, offset + COLUMNS.index(name)] = amount
        for number, times in enumerate(self.times):
            for place, name in enumerate(TIMES):
                found[:, number * len(TIMES) + place] = getattr(times, name)
        return found

    def placed(
        self,
        amounts: Mapping[str | PayloadKey, FloatArray],
        keys: tuple[PayloadKey, ...],
        count: int,
    ) -> FloatArray:
        """(count, C) with every amount in its column."""
        offset = len(TIMES) * len(self.times)
        found = np.zeros((count, offset + len(COLUMNS) + len(keys)))
        for key, amount in amounts.items():
            if isinstance(key, str):
                found[:, offset + COLUMNS.index(key)] = amount
            else:
                found[:, offset + len(COLUMNS) + keys.index(key)] = amount
        return found


def _events(priced: list[_Priced], keys: tuple[PayloadKey, ...]) -> tuple[Event, ...]:
    places = sorted({place for one in priced for place in one.parameters.ties})
    return tuple(
        Event(
            before=place[0],
            after=place[1],
            segment=place[2],
            amounts=np.concatenate(
                [one.placed(one.parameters.ties.get(place, {}), keys, 1) for one in priced]
            ),
        )
        for place in places
    )


Skips = dict[tuple[bool, int, int, int], float]
"""(forward, source, before, target) to bytes."""


def _crossings(skips: list[Skips]) -> tuple[Crossing, ...]:
    return tuple(
        Crossing(
            is_forward=where[0],
            source=where[1],
            before=where[2],
            target=where[3],
            num_bytes=np.array([found.get(where, 0.0) for found in skips]),
        )
        for where in sorted({where for found in skips for where in found})
    )


def _passing(table: CostTable, split: Split) -> tuple[FloatArray, Skips]:
    """What passes between neighbors, (2, V), and what skips segments."""
    values, nodes = table.columns.values, table.columns.nodes
    maker = values.own_producer[values.crossing_value]
    source, target = nodes.segment[maker], nodes.segment[values.edge_reader]
    crosses = (maker >= 0) & (source >= 0) & (target >= 0) & (source != target)
    span = table.num_segments
    rows = np.unique(values.crossing_value[crosses] * span + target[crosses])
    value, target = rows // span, rows % span
    source = nodes.segment[values.own_producer[value]]
    is_forward = nodes.phase[values.own_producer[value]] == FORWARD
    size = values.own_bytes[value] * table.weights(split)[values.own_scale[value]]
    cut = np.zeros((2, span))
    skips: Skips = {}
    for goes_up in (True, False):
        mine = np.flatnonzero((target > source) == goes_up)
        mine = mine if goes_up else mine[::-1]
        is_first = np.append(True, value[mine][1:] != value[mine][:-1])[: len(mine)]
        before = np.where(is_first, source[mine], np.roll(target[mine], 1))
        near = is_first & (np.abs(target[mine] - before) == 1)
        where = np.maximum(target[mine], before)
        for phase, wanted in ((0, is_forward[mine]), (1, ~is_forward[mine])):
            cut[phase] += sums_by(where[near & wanted], size[mine][near & wanted], span)
        for row, last in zip(mine[~near].tolist(), before[~near].tolist(), strict=True):
            key = (bool(is_forward[row]), int(source[row]), last, int(target[row]))
            skips[key] = skips.get(key, 0.0) + float(size[row])
    return cut, skips
