"""Peak memory of every stage, by cause.

A rank of stage s holds at its worst moment the largest of three sums. While computing::

    parameters         n e or a ZeRO-3 chunk                          (cost.parameters)
  + optimizer          moments and copies
  + inputs             data of the rank's batch, buffers, prologue values
  + accumulators       running sums of gradients, with several micro-batches
  + activations        kept values x micro-batches in flight (1F1B: min(S - s, M), GPipe: M)
  + gradients          made by the backward so far
  + gathered           ZeRO 3: parameters of two neighboring segments
  + transient          values alive inside the segment at work
  + communication      a bucket of gradients (two from ZeRO 2 on), values received or sent

after the last backward: parameters + optimizer + inputs + gradients + the last bucket; and
while the optimizer steps the same with its temporaries instead (the fp32 copy of the gradients, one
list of square roots for AdamW).

The worst moment is found over the forward and the backward of every segment: in the backward of
segment j the kept values of segments up to j are still there and the gradients of those from j on.
On CUDA every parameter, gradient, moment and kept value is rounded up to 512 bytes, the block of
the caching allocator; transients are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import FloatArray, IntArray, sums_by
from meshwright.cost.parameters import ParameterState, StageParameters
from meshwright.cost.table import CostTable, Split
from meshwright.plans.plan import Recompute, ScheduleName
from meshwright.spmd.schedule import num_in_flight

__all__ = ["CAUSES", "MemoryRequest", "StageMemory", "stage_memory"]

CAUSES = (
    "parameters",
    "optimizer",
    "inputs",
    "accumulators",
    "gradients",
    "activations",
    "gathered_parameters",
    "transient",
    "communication",
    "optimizer_step",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """What the memory of a plan depends on."""

    split: Split
    policies: tuple[Recompute, ...]
    """One for each segment."""
    schedule: ScheduleName
    starts: tuple[int, ...]
    """First segment of each stage."""
    bucket_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of every stage at its worst moment."""

    by_cause: dict[str, FloatArray]
    """``CAUSES`` to (stages,)."""

    @property
    def peak_bytes(self) -> FloatArray:
        """Sum over the causes; (stages,)."""
        return np.asarray(np.sum(list(self.by_cause.values()), axis=0))


def stage_memory(
    table: CostTable,
    request: MemoryRequest,
    *,
    state: ParameterState,
    placed: StageParameters,
    gathered_bytes: tuple[FloatArray, FloatArray],
    crossing_bytes: FloatArray,
    is_rounded: bool,
) -> StageMemory:
    """Peak memory of every stage.

    Args:
        table: the cost table.
        request: the plan's choices.
        state: bytes of every parameter.
        placed: which parameters live where.
        gathered_bytes: (segments,) of ZeRO-3 parameters gathered for a segment's forward, and for
            its backward.
        crossing_bytes: (stages,) received and sent in one micro-batch.
        is_rounded: the allocator rounds up to 512 bytes.
    """
    starts = np.array(request.starts, dtype=np.int64)
    num_stages, num_segments = len(starts), table.num_segments
    stage_of = np.repeat(np.arange(num_stages), np.diff([*request.starts, num_segments]))
    saved = _saved_by_segment(table, request, stage_of, is_rounded)
    here = sums_by(placed.segment, state.gradient_bytes[placed.parameter], num_segments)
    transient = table.transient_bytes(request.split, request.policies)
    there, back = _gathered(*gathered_bytes, stage_of)

    def per_stage(amount: FloatArray) -> FloatArray:
        return sums_by(placed.stage, amount[placed.parameter], num_stages)

    parameters = per_stage(state.stored_bytes)
    gradients = per_stage(state.gradient_bytes)
    before = np.concatenate([[0.0], np.cumsum(saved)])
    kept = before[1:] - before[starts][stage_of]
    # What the segment at work has made is among its transients.
    made = _made(here, starts, stage_of) - here
    buckets, last = _buckets(request, state, placed, starts, stage_of)
    forward = kept + transient[0] + there
    backward = kept + made + transient[1] + back + buckets
    best_forward = _argmax_by_stage(forward, starts, stage_of)
    best_backward = _argmax_by_stage(backward, starts, stage_of)
    in_backward = backward[best_backward] >= forward[best_forward]
    moment = np.where(in_backward, best_backward, best_forward)
    zeros = np.zeros(num_stages)
    computing = {
        "parameters": parameters,
        "optimizer": per_stage(state.optimizer_bytes),
        "inputs": zeros + table.shared_bytes(request.split),
        "accumulators": gradients * (request.split.num_microbatches > 1),
        "gradients": np.where(in_backward, made[moment], 0.0),
        "activations": (_in_flight(request) - 1) * np.add.reduceat(saved, starts) + kept[moment],
        "gathered_parameters": np.where(in_backward, back[moment], there[moment]),
        "transient": np.where(in_backward, transient[1][moment], transient[0][moment]),
        "communication": np.where(in_backward, buckets[moment], 0.0) + crossing_bytes,
        "optimizer_step": zeros,
    }
    after = {
        **dict.fromkeys(CAUSES, zeros),
        "parameters": parameters,
        "optimizer": computing["optimizer"],
        "inputs": computing["inputs"],
        "gradients": gradients,
    }
    reducing = {**after, "communication": last}
    stepping = {**after, "optimizer_step": per_stage(state.step_bytes)}
    return StageMemory(by_cause=_largest((computing, reducing, stepping)))


def _in_flight(request: MemoryRequest) -> FloatArray:
    """(stages,) most micro-batches whose forward has run and whose backward has not."""
    num_stages = len(request.starts)
    return np.array(
        [
            num_in_flight(
                request.schedule,
                stage=stage,
                num_stages=num_stages,
                num_microbatches=request.split.num_microbatches,
            )
            for stage in range(num_stages)
        ],
        dtype=np.float64,
    )


def _buckets(
    request: MemoryRequest,
    state: ParameterState,
    placed: StageParameters,
    starts: IntArray,
    stage_of: IntArray,
) -> tuple[FloatArray, FloatArray]:
    """Buffers that gradients are packed in: (segments,) during a backward, (stages,) at its end.

    The packed bucket replaces its gradients and is reduced to new memory. From ZeRO 2 on the whole
    gradients that wait for it are not counted elsewhere, since chunks are.
    """
    num_segments = len(stage_of)
    if request.split.data_parallel == 1:
        return np.zeros(num_segments), np.zeros(len(starts))
    local = np.where(state.gradient_bytes > 0, state.local_bytes, 0.0)
    whole = sums_by(placed.segment, local[placed.parameter], num_segments)
    copies = 2.0 if (state.zero_stage >= 2).any() else 1.0
    # A bucket is packed when it is full, the last one when nothing else is alive.
    is_full = _made(whole, starts, stage_of) >= request.bucket_bytes
    during = np.where(is_full, copies * request.bucket_bytes, 0.0)
    last = np.minimum(request.bucket_bytes, np.add.reduceat(whole, starts))
    return during, copies * last


def _largest(phases: Sequence[dict[str, FloatArray]]) -> dict[str, FloatArray]:
    """For every stage the causes of the phase with the largest sum."""
    totals = np.array([np.sum(list(phase.values()), axis=0) for phase in phases])
    which = np.argmax(totals, axis=0)
    return {cause: np.choose(which, [phase[cause] for phase in phases]) for cause in CAUSES}


def _saved_by_segment(
    table: CostTable, request: MemoryRequest, stage_of: IntArray, is_rounded: bool
) -> FloatArray:
    """(segments,) bytes kept for one micro-batch, each storage once on every stage that needs it.

    It is counted with the first segment of the stage that needs it, since it lives until that
    segment's backward.
    """
    value, segment = table.saved_on_stages(request.policies, stage_of)
    columns = table.columns.values
    sizes = columns.num_bytes[value] * table.weights(request.split)[columns.scale[value]]
    if is_rounded:
        sizes = np.ceil(sizes / 512) * 512
    return sums_by(segment, sizes, table.num_segments)


def _gathered(
    forward: FloatArray, backward: FloatArray, stage_of: IntArray
) -> tuple[FloatArray, FloatArray]:
    """A segment's gathered parameters and those of the one that runs next on the stage."""
    joined = (stage_of[1:] == stage_of[:-1]).astype(np.float64)
    after = np.append(forward[1:] * joined, 0.0)
    before = np.insert(backward[:-1] * joined, 0, 0.0)
    return forward + after, backward + before


def _made(amount: FloatArray, starts: IntArray, stage_of: IntArray) -> FloatArray:
    """(segments,) sum from a segment to the end of its stage: what its backward has made."""
    before = np.concatenate([[0.0], np.cumsum(amount)])
    ends = np.append(starts[1:], len(amount))
    return np.asarray(before[ends][stage_of] - before[:-1])


def _argmax_by_stage(amount: FloatArray, starts: IntArray, stage_of: IntArray) -> IntArray:
    """First segment of each stage at which ``amount`` is largest."""
    is_largest = amount == np.maximum.reduceat(amount, starts)[stage_of]
    where = np.flatnonzero(is_largest)
    _, first = np.unique(stage_of[where], return_index=True)
    return np.asarray(where[first])
