"""What data parallelism and ZeRO communicate: gradients, gathered and published parameters.

    ZeRO 0    all-reduce of the gradient once a step
    ZeRO 1    reduce-scatter over ``dp_shard``, all-reduce of the chunk over the other axes, once;
              all-gather of the updated parameters
    ZeRO 2    the reduce-scatter for every micro-batch; the rest as ZeRO 1
    ZeRO 3    as ZeRO 2, and instead of the last all-gather one for every segment before its
              forward and before its backward, in every micro-batch

A parameter on several stages sends its summed gradient to the others and reduces by itself, once.
Payloads go in buckets of ``bucket_bytes``, so latency is paid for each bucket.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.collectives import CollectivePrices
from meshwright.cost.columns import BACKWARD, FloatArray, IntArray, sums_by
from meshwright.cost.parameters import ParameterState, StageParameters
from meshwright.cost.table import DATA_AXES, CostTable, Split
from meshwright.plans.plan import Recompute
from meshwright.spmd.parameters import ZERO_AXIS
from meshwright.spmd.program import CollectiveKind

__all__ = ["DataTraffic", "Payload", "data_traffic", "traffic_times_s"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """Bytes of each stage that go along the same axes."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    num_bytes: FloatArray
    """(stages,), or (segments,) for a gather."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTraffic:
    """Everything data parallelism communicates."""

    once: tuple[Payload, ...]
    """Gradients, after the last backward of a micro-batch."""
    every_backward: tuple[Payload, ...]
    """Gradients of ZeRO 2 and 3, in every micro-batch."""
    publish: tuple[Payload, ...]
    """By segment."""
    forward_gather: Payload
    """By segment."""
    backward_gather: Payload
    """By segment."""
    tied_bytes: FloatArray
    """(stages,) sent to each other stage that holds the same parameter."""


def data_traffic(
    table: CostTable,
    split: Split,
    policies: tuple[Recompute, ...],
    *,
    state: ParameterState,
    placed: StageParameters,
    num_stages: int,
) -> DataTraffic:
    """Payloads of one step, and of one micro-batch where they recur."""
    columns = table.columns.parameters
    active = tuple(axis for axis in DATA_AXES if split.sizes[axis] > 1)
    groups, group_of = table.parameters.gradient_groups(active, is_scaled=table.columns.is_scaled)
    once, every = list[Payload](), list[Payload]()
    row, stage = placed.parameter, placed.stage
    zero = state.zero_stage[row]
    has_gradient = columns.has_gradient[row]

    def add(
        found: list[Payload],
        kind: CollectiveKind,
        axes: tuple[str, ...],
        rows: np.ndarray,
        amount: FloatArray,
    ) -> None:
        axes = tuple(axis for axis in axes if split.sizes.get(axis, 1) > 1)
        if axes and rows.any():
            sent = amount * state.reduction_scale
            total = sums_by(stage[rows], sent[row[rows]], num_stages)
            found.append(Payload(kind=kind, axes=axes, num_bytes=total))

    for group, axes in enumerate(groups):
        mine = has_gradient & (group_of[row] == group)
        whole = mine & (zero == 0)
        add(once, CollectiveKind.ALL_REDUCE, axes, whole, state.local_bytes)
        cut = mine & (zero > 0)
        others = tuple(axis for axis in axes if axis != ZERO_AXIS)
        add(once, CollectiveKind.ALL_REDUCE, others, cut, state.chunk_bytes)
        if ZERO_AXIS not in axes:
            continue
        late = cut & ((zero == 1) | (placed.is_tied == 1))
        add(once, CollectiveKind.REDUCE_SCATTER, (ZERO_AXIS,), late, state.padded_bytes)
        early = cut & (zero >= 2) & (placed.is_tied == 0)
        add(every, CollectiveKind.REDUCE_SCATTER, (ZERO_AXIS,), early, state.padded_bytes)
    published = (zero == 1) | (zero == 2)
    gathered, again = _gathers(table, policies, state)
    by_segment = sums_by(
        placed.segment[published],
        state.padded_bytes[row[published]],
        table.num_segments,
    )
    gather = CollectiveKind.ALL_GATHER
    tied = (placed.is_tied == 1) & has_gradient
    return DataTraffic(
        once=tuple(once),
        every_backward=tuple(every),
        publish=(Payload(kind=gather, axes=(ZERO_AXIS,), num_bytes=by_segment),),
        forward_gather=Payload(kind=gather, axes=(ZERO_AXIS,), num_bytes=gathered),
        backward_gather=Payload(kind=gather, axes=(ZERO_AXIS,), num_bytes=again),
        tied_bytes=sums_by(stage[tied], state.local_bytes[row[tied]], num_stages),
    )


def _gathers(
    table: CostTable, policies: tuple[Recompute, ...], state: ParameterState
) -> tuple[FloatArray, FloatArray]:
    """(segments,) bytes ZeRO 3 gathers before a forward, and before a backward.

    The backward gathers a segment's parameters where it reads any of them.
    """
    columns, nodes, values = table.columns.parameters, table.columns.nodes, table.columns.values
    count = table.num_segments
    if not (state.zero_stage == 3).any():
        return np.zeros(count), np.zeros(count)
    parameter, segment = columns.forward_use
    cut = (state.zero_stage[parameter] == 3) & (segment >= 0)
    gathered = sums_by(segment[cut], state.padded_bytes[parameter[cut]], count)
    again = np.zeros(len(nodes.segment), np.bool_)
    again[table.activations(policies).recomputed] = True
    late = (nodes.phase == BACKWARD) | again
    reads = values.is_parameter[values.edge_value] & late[values.edge_reader]
    row = columns.row_of_value[values.edge_value[reads]]
    where = nodes.segment[values.edge_reader[reads]][state.zero_stage[row] == 3]
    is_read = np.zeros(count, np.bool_)
    is_read[where[where >= 0]] = True
    return gathered, np.where(is_read, gathered, 0.0)


def traffic_times_s(
    payloads: tuple[Payload, ...],
    split: Split,
    prices: CollectivePrices,
    *,
    bucket_bytes: int | None,
    size: int,
) -> FloatArray:
    """(size,) sum of the times of ``payloads``, in buckets where ``bucket_bytes`` is given."""
    total = np.zeros(size)
    for payload in payloads:
        num = np.ones(size)
        if bucket_bytes is not None:
            num = np.maximum(np.ceil(payload.num_bytes / bucket_bytes), 1.0)
        total += num * prices.time_s(
            payload.kind,
            payload.num_bytes / num,
            axes=payload.axes,
            axis_sizes=split.sizes,
            num_stages=split.num_stages,
            first_device=split.first_device,
        )
    return total


def stages_of(starts: tuple[int, ...], num_segments: int) -> IntArray:
    """For each segment its stage."""
    return np.repeat(np.arange(len(starts)), np.diff([*starts, num_segments]))
