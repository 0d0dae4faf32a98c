"""Peak memory of every stage, by cause.

A rank of stage s holds at its worst moment the largest of three sums. While computing::

    parameters         n e or a ZeRO-3 chunk                          (cost.parameters)
  + optimizer          moments and copies
  + inputs             data of the rank's batch, buffers, prologue values
  + accumulators       running sums of gradients, with several micro-batches
  + activations        kept values x micro-batches in flight, counted along the schedule's order;
                       ZB-H1: also what the gradients of parameters put off wait with
  + gradients          made by the backward so far
  + gathered           ZeRO 3: parameters of two neighboring segments
  + transient          values alive inside the segment at work
  + communication      a bucket of gradients (two from ZeRO 2 on), values received or sent
  + allocator          a share of gradients to communication, as calibrated

after the last backward: parameters + optimizer + inputs + gradients + the last bucket; and
while the optimizer steps the same with its temporaries instead (the fp32 copy of the gradients, one
list of square roots for AdamW), of at most ``spmd.parameters.STEP_BYTES``.

The worst moment is found over the forward and the backward of every segment: in the backward of
segment j the kept values of segments up to j are still there and the gradients of those from j on.
On CUDA every parameter, gradient, moment and kept value is rounded up to 512 bytes, the block of
the caching allocator; transients are not.

Stages on the same device group (interleaved) add up; each is counted at its own worst moment. Token
slices hold together what a whole sequence holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import FloatArray, IntArray, sums_by
from meshwright.cost.parameters import ParameterState, StageParameters
from meshwright.cost.table import CostTable, Split
from meshwright.plans.plan import Recompute, ScheduleName
from meshwright.spmd.parameters import STEP_BYTES
from meshwright.spmd.schedule import peaks_in_flight

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
    "allocator",
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
    stage_of_segment: tuple[int, ...] = ()
    """Stage of each segment, where a stage is more than one run; empty: by ``starts``."""
    num_groups: int
    """Device groups; stage i lies on group ``i mod num_groups``."""
    num_slices: int = 1
    """Of the sequence; the activations of all add up to those of a micro-batch."""
    stage_inputs: tuple[tuple[int, ...], ...]
    """For each stage those whose values it waits for."""


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
    allocator_share: float = 0.0,
    is_in_place: bool = False,
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
        allocator_share: what it holds unused, over what comes and goes in a micro-batch.
        is_in_place: gradients are added to buffers that are always there and reduced in them.
    """
    num_stages, num_segments = len(request.starts), table.num_segments
    by_number = _stage_of(request, num_segments)
    # From here on segments stand stage by stage: every stage is a run of them.
    order = np.argsort(by_number, kind="stable")
    stage_of = by_number[order]
    starts = np.searchsorted(stage_of, np.arange(num_stages))
    saved = _saved_by_segment(table, request, by_number, is_rounded)[order]
    here = sums_by(placed.segment, state.gradient_bytes[placed.parameter], num_segments)[order]
    transient = table.transient_bytes(request.split, request.policies)[:, order]
    there, back = _gathered(gathered_bytes[0][order], gathered_bytes[1][order], stage_of)

    def of_groups(amount: FloatArray) -> FloatArray:
        per_stage = sums_by(placed.stage, amount[placed.parameter], num_stages)
        return _of_groups(per_stage, request.num_groups)

    gradients = of_groups(state.gradient_bytes)
    before = np.concatenate([[0.0], np.cumsum(saved)])
    kept = before[1:] - before[starts][stage_of]
    # What the segment at work has made is among its transients.
    made = _made(here, starts, stage_of) - here
    buckets, last = _buckets(request, state, placed, starts, order, stage_of)
    if is_in_place:
        made, buckets, last = 0 * made, 0 * buckets, 0 * last
    forward = kept + transient[0] + there
    backward = kept + made + transient[1] + back + buckets
    first, second = (_argmax_by_stage(held, starts, stage_of) for held in (forward, backward))
    in_backward = backward[second] >= forward[first]
    moment = np.where(in_backward, second, first)
    zeros = np.zeros(num_stages)
    waiting = _waiting_of_stage(table, request, by_number, is_rounded)
    others = _held_by_others(request, np.add.reduceat(saved, starts), waiting)
    computing = {
        "parameters": of_groups(state.stored_bytes),
        "optimizer": of_groups(state.optimizer_bytes),
        "inputs": zeros + table.shared_bytes(request.split),
        "accumulators": gradients * (is_in_place or _num_parts(request) > 1),
        "gradients": np.where(in_backward, made[moment], 0.0),
        "activations": others + kept[moment],
        "gathered_parameters": np.where(in_backward, back[moment], there[moment]),
        "transient": np.where(in_backward, transient[1][moment], transient[0][moment]),
        "communication": np.where(in_backward, buckets[moment], 0.0) + crossing_bytes,
        "optimizer_step": zeros,
    }
    computing["allocator"] = allocator_share * _transients(computing)
    after = {**_staying(computing), "accumulators" if is_in_place else "gradients": gradients}
    reducing = {**after, "communication": last}
    stepping = {**after, "optimizer_step": np.minimum(of_groups(state.step_bytes), STEP_BYTES)}
    return StageMemory(by_cause=_largest((computing, reducing, stepping)))


def _num_parts(request: MemoryRequest) -> int:
    """Backward passes of a step."""
    return request.split.num_microbatches * request.num_slices


def _staying(causes: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """What is still there after the last backward; nothing of the rest."""
    names = ("parameters", "optimizer", "inputs")
    return {cause: causes[cause] if cause in names else 0 * causes[cause] for cause in CAUSES}


def _transients(causes: dict[str, FloatArray]) -> FloatArray:
    names = ("gradients", "activations", "gathered_parameters", "transient", "communication")
    return np.asarray(np.sum([causes[name] for name in names], axis=0))


def _stage_of(request: MemoryRequest, num_segments: int) -> IntArray:
    """(segments,) stage of each."""
    if request.stage_of_segment:
        return np.array(request.stage_of_segment, dtype=np.int64)
    counts = np.diff([*request.starts, num_segments])
    return np.repeat(np.arange(len(request.starts)), counts)


def _of_groups(amount: FloatArray, num_groups: int) -> FloatArray:
    """(stages,) sums over all stages on the device group of each."""
    return np.asarray(np.resize(amount.reshape(-1, num_groups).sum(axis=0), len(amount)))


def _held_by_others(
    request: MemoryRequest, saved_of_stage: FloatArray, waiting_of_stage: FloatArray
) -> FloatArray:
    """(stages,) most bytes of other micro-batches on its device group while a stage works on one.

    Args:
        request: the plan's choices.
        saved_of_stage: (stages,) kept for the backward of one micro-batch.
        waiting_of_stage: (stages,) what gradients of parameters put off wait with.
    """
    found = np.zeros(len(saved_of_stage))
    peaks = peaks_in_flight(
        request.schedule,
        num_groups=request.num_groups,
        num_microbatches=request.split.num_microbatches,
        stage_inputs=request.stage_inputs,
    )
    for group, moments in enumerate(peaks):
        mine = slice(group, None, request.num_groups)
        for moment in moments:
            held = np.dot(moment.forward, saved_of_stage[mine])
            held += np.dot(moment.put_off, waiting_of_stage[mine])
            at_work = np.array(moment.forward) > 0
            found[mine] = np.maximum(found[mine], np.where(at_work, held, 0.0))
    return found - saved_of_stage


def _waiting_of_stage(
    table: CostTable, request: MemoryRequest, stage_of: IntArray, is_rounded: bool
) -> FloatArray:
    """(stages,) bytes that the gradients of parameters put off wait with, for one micro-batch."""
    num_stages = len(request.starts)
    if request.schedule is not ScheduleName.ZB_H1 or num_stages == 1:
        return np.zeros(num_stages)
    value, segment = table.put_off.waiting
    codes = np.unique(value * num_stages + stage_of[segment])
    sizes = _sizes(table, request, codes // num_stages, is_rounded)
    return sums_by(codes % num_stages, sizes, num_stages)


def _buckets(
    request: MemoryRequest,
    state: ParameterState,
    placed: StageParameters,
    starts: IntArray,
    order: IntArray,
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
    whole = sums_by(placed.segment, local[placed.parameter], num_segments)[order]
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
    return sums_by(segment, _sizes(table, request, value, is_rounded), table.num_segments)


def _sizes(
    table: CostTable, request: MemoryRequest, value: IntArray, is_rounded: bool
) -> FloatArray:
    """Bytes of storages."""
    columns = table.columns.values
    sizes = columns.num_bytes[value] * table.weights(request.split)[columns.scale[value]]
    return np.ceil(sizes / 512) * 512 if is_rounded else np.asarray(sizes)


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
