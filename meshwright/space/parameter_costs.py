"""What parameters bring to the segments that read them: bytes, reductions, the optimizer's step.

Every parameter is counted with the first segment that reads it, as if no two of its readers lay on
different stages. Where they do (tied parameters), ``ties`` say what comes on top. All that depends
neither on micro-batches nor on recompute, so it is worked out once for a mesh and a ZeRO stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np

from meshwright.cost.calibration import Calibration
from meshwright.cost.collectives import CollectivePrices
from meshwright.cost.columns import FloatArray, IntArray, sums_by
from meshwright.cost.parameters import ParameterState, StageParameters
from meshwright.cost.reduction import DataTraffic, Payload, data_traffic, traffic_times_s
from meshwright.cost.table import CostTable, Split
from meshwright.plans.plan import OptimizerSpec, Recompute
from meshwright.spmd.program import CollectiveKind

__all__ = ["ParameterCosts", "PayloadKey", "Tie", "gathers", "parameter_costs"]

PayloadKey = tuple[bool, CollectiveKind, tuple[str, ...], int]
"""Whether in every micro-batch, kind, axes, and which of several such payloads: each has buckets of
its own."""

Tie = tuple[int, int, int]
"""Where the first two segments lie on different stages, the third bears more."""

Amounts = dict[str | PayloadKey, FloatArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCosts:
    """See the module docstring."""

    amounts: Amounts
    """Name of a column, or a payload, to (V,)."""
    ties: dict[Tie, Amounts]
    """To the same, (1,)."""
    state: ParameterState

    @property
    def payloads(self) -> tuple[PayloadKey, ...]:
        """All payloads there may be."""
        found = [*self.amounts, *(key for tie in self.ties.values() for key in tie)]
        return tuple(dict.fromkeys(key for key in found if not isinstance(key, str)))


_KNOWN: WeakKeyDictionary[CostTable, dict[tuple[object, ...], ParameterCosts]]
_KNOWN = WeakKeyDictionary()


def parameter_costs(
    table: CostTable,
    split: Split,
    *,
    zero_stage: int,
    offload: bool,
    optimizer: OptimizerSpec,
    calibration: Calibration,
    prices: CollectivePrices,
) -> ParameterCosts:
    """Costs of all parameters under one ZeRO stage, remembered for the table."""
    known = _KNOWN.setdefault(table, {})
    key = (split.axis_sizes, split.num_stages, zero_stage, offload, repr(optimizer), id(prices))
    if key not in known:
        builder = _Builder(table, split, (zero_stage, offload), optimizer, calibration, prices)
        known[key] = builder.build()
    return known[key]


def gathers(
    table: CostTable, split: Split, policies: tuple[Recompute, ...], state: ParameterState
) -> tuple[Payload, Payload]:
    """What ZeRO 3 gathers before each segment's forward, and before its backward."""
    nothing = np.zeros(0, dtype=np.int64)
    placed = StageParameters(parameter=nothing, stage=nothing, segment=nothing, is_tied=nothing)
    traffic = data_traffic(
        table, split, policies, state=state, placed=placed, num_stages=table.num_segments
    )
    return traffic.forward_gather, traffic.backward_gather


class _Builder:
    def __init__(
        self,
        table: CostTable,
        split: Split,
        way: tuple[int, bool],
        optimizer: OptimizerSpec,
        calibration: Calibration,
        prices: CollectivePrices,
    ) -> None:
        self.table, self.split, self.prices = table, split, prices
        self.count = table.num_segments
        self.policies = (Recompute.NONE,) * self.count
        self.state = table.parameters.state(
            (way[0],) * self.count,
            dp_shard=split.sizes["dp_shard"],
            optimizer=optimizer,
            offloaded=(True,) * self.count if way[1] else (),
            calibration=calibration,
        )
        parameter, segment = table.parameters.columns.use
        is_first = np.append(True, parameter[1:] != parameter[:-1])[: len(parameter)]
        again = np.flatnonzero(~is_first)
        self.firsts = (parameter[is_first], segment[is_first])
        self.again = (parameter[again], segment[again - 1], segment[again])

    def build(self) -> ParameterCosts:
        placed = self._placed(*self.firsts, is_tied=False)
        traffic = self._traffic(placed)
        return ParameterCosts(
            amounts=self._amounts(placed, traffic), ties=self._ties(traffic), state=self.state
        )

    def _placed(self, parameter: IntArray, segment: IntArray, *, is_tied: bool) -> StageParameters:
        """As if every segment were a stage."""
        tied = np.full(len(parameter), int(is_tied), dtype=np.int64)
        return StageParameters(parameter=parameter, stage=segment, segment=segment, is_tied=tied)

    def _traffic(self, placed: StageParameters) -> DataTraffic:
        return data_traffic(
            self.table,
            self.split,
            self.policies,
            state=self.state,
            placed=placed,
            num_stages=self.count,
        )

    def _gather_s(self, payload: Payload) -> FloatArray:
        return traffic_times_s(
            (payload,), self.split, self.prices, bucket_bytes=None, size=self.count
        )

    def _amounts(self, placed: StageParameters, traffic: DataTraffic) -> Amounts:
        state, row = self.state, placed.parameter
        has_gradient = state.gradient_bytes > 0
        values = {
            "step_traffic": state.step_traffic_bytes + state.clipping_bytes,
            "parameters": state.stored_bytes,
            "optimizer": state.optimizer_bytes,
            "gradients": state.gradient_bytes,
            "step": state.step_bytes,
            "host_link": state.host_link_bytes,
            "host_step": state.host_step_bytes,
            "local": np.where(has_gradient, state.local_bytes, 0.0),
        }
        found: Amounts = {
            name: sums_by(placed.segment, amount[row], self.count)
            for name, amount in values.items()
        }
        found["publish_s"] = self._gather_s(traffic.publish[0])
        found["tied"] = traffic.tied_bytes
        for key, payload in _payloads(traffic):
            found[key] = payload.num_bytes
        return found

    def _ties(self, alone: DataTraffic) -> dict[Tie, Amounts]:
        """What comes on top where the segments that read a parameter lie on different stages."""
        parameter, before, segment = self.again
        found: dict[Tie, Amounts] = {}
        if not len(parameter):
            return found
        for pair in sorted(set(zip(before.tolist(), segment.tolist(), strict=True))):
            rows = (before == pair[0]) & (segment == pair[1])
            placed = self._placed(parameter[rows], segment[rows], is_tied=True)
            traffic = self._traffic(placed)
            amounts = self._amounts(placed, traffic)
            # Gathered with the segment's own parameters, in one collective.
            own = alone.publish[0]
            both = replace(own, num_bytes=own.num_bytes + traffic.publish[0].num_bytes)
            amounts["publish_s"] = self._gather_s(both) - self._gather_s(own)
            found[*pair, pair[1]] = {k: a[pair[1] : pair[1] + 1] for k, a in amounts.items()}
        tied, last = np.unique(parameter[::-1], return_index=True)
        last = segment[::-1][last]
        first = self.firsts[1][np.searchsorted(self.firsts[0], tied)]
        for pair in sorted(set(zip(first.tolist(), last.tolist(), strict=True))):
            rows = (first == pair[0]) & (last == pair[1])
            found[*pair, pair[0]] = self._difference(tied[rows], first[rows], pair[0])
        return found

    def _difference(self, parameter: IntArray, segment: IntArray, where: int) -> Amounts:
        """What a first reader bears more when its parameters turn out to be tied."""
        ways = [
            self._amounts(placed, self._traffic(placed))
            for placed in (
                self._placed(parameter, segment, is_tied=is_tied) for is_tied in (False, True)
            )
        ]
        zero = np.zeros(self.count)
        return {
            key: (ways[1].get(key, zero) - ways[0].get(key, zero))[where : where + 1]
            for key in dict.fromkeys((*ways[0], *ways[1]))
        }


def _payloads(traffic: DataTraffic) -> Iterator[tuple[PayloadKey, Payload]]:
    seen: Counter[tuple[bool, CollectiveKind, tuple[str, ...]]] = Counter()
    for is_often, payloads in ((False, traffic.once), (True, traffic.every_backward)):
        for payload in payloads:
            key = (is_often, payload.kind, payload.axes)
            yield (*key, seen[key]), payload
            seen[key] += 1
