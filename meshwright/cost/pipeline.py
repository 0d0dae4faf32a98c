"""How long a pipeline takes: the schedules of ``spmd.schedule``, simulated event by event.

For equal stages of forward f and backward b without transfers the simulation gives what is
published, with M micro-batches on S device groups (the bubble is what is not work):

* GPipe and 1F1B: bubble ``(S - 1) (f + b)`` (arXiv 2104.04473, section 2.2);
* interleaved 1F1B with k stages on each group: ``(S - 1) (f + b) / k`` (section 2.2.2 there), f and
  b the work of a group on a micro-batch;
* ZB-H1 with ``b = b' + w``: ``(S - 1) (f + b' - w)`` from ``M >= S`` on (arXiv 2401.10241, table
  1), a third of 1F1B's where f, b' and w are equal.

Once the pipeline is full the schedule repeats itself after some micro-batches (as many as are in
flight on a loop of stages that waits for itself), so thousands of them are counted, not simulated:
as soon as a period is seen, whole periods are added. That is exact: an event is the largest of some
earlier ones plus constants, so what has once moved on by the same time everywhere does so again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.cost.columns import FORWARD
from meshwright.cost.simulate import (
    PipelineShape,
    end_times_of_many_s,
    end_times_s,
    event_list,
)
from meshwright.plans.plan import ScheduleName
from meshwright.spmd.schedule import StageInputs, chain

__all__ = [
    "SliceTransfers",
    "Transfers",
    "closed_form_s",
    "finish_times_s",
    "inputs_of_crossing",
    "simulate_many",
    "step_lower_bound_s",
]

_SIMULATED_SPANS = (4, 12, 36, 108)
"""Spans of micro-batches simulated before looking for the steady state, in turn."""

_RELATIVE_TOLERANCE = 1e-12

_PLANS_AT_A_TIME = 512
"""So that the ends of all events stay in the processor's cache."""

Transfers = Mapping[tuple[int, int], float]
"""(source stage, target stage) to the seconds one micro-batch's values take."""

SliceTransfers = Mapping[tuple[int, int], float | Sequence[float]]
"""``Transfers``, or with token slices the seconds of each slice."""

FloatArray = NDArray[np.float64]

_Run = Callable[[int, NDArray[np.int64]], tuple[FloatArray, FloatArray]]
"""Simulates some micro-batches of some plans: when each device group ends, (groups, plans), and
when each function of each micro-batch does, (micro-batches, functions, plans)."""


def finish_times_s(
    schedule: ScheduleName,
    *,
    forward_s: Sequence[float] | Sequence[Sequence[float]],
    backward_s: Sequence[float] | Sequence[Sequence[float]],
    num_microbatches: int,
    forward_transfer_s: SliceTransfers,
    backward_transfer_s: SliceTransfers,
    weight_s: Sequence[float] | Sequence[Sequence[float]] | None = None,
    late_transfer_s: SliceTransfers | None = None,
    stage_inputs: StageInputs | None = None,
    num_groups: int | None = None,
) -> tuple[float, ...]:
    """When each device group has done its last work of a step, seconds from the start.

    Args:
        schedule: the schedule.
        forward_s: of one micro-batch on each stage; with token slices of each slice of it.
        backward_s: likewise, with the gradients of parameters.
        num_microbatches: micro-batches of a step.
        forward_transfer_s: who waits for whom in the forward.
        backward_transfer_s: who waits for whom in the backward.
        weight_s: part of ``backward_s`` that makes gradients of parameters, which ZB-H1 puts off.
        late_transfer_s: forward values that the backward of another stage waits for.
        stage_inputs: who waits for whom besides; left out, every stage for its neighbors.
        num_groups: device groups, stage i on group ``i mod num_groups``; left out, one for each
            stage.

    Raises:
        PlanRefused: the schedule does not exist for these numbers.
    """
    forward = np.array(forward_s, dtype=np.float64)
    backward = np.array(backward_s, dtype=np.float64)
    num_stages, num_slices = len(forward), 1 if forward.ndim == 1 else forward.shape[1]
    groups = num_stages if num_groups is None else num_groups
    if num_stages == 1:
        return (num_microbatches * float(forward.sum() + backward.sum()),)
    shape = PipelineShape.of(
        schedule,
        stage_inputs=chain(num_stages) if stage_inputs is None else stage_inputs,
        num_groups=groups,
        forward_edges=tuple(forward_transfer_s),
        backward_edges=tuple(backward_transfer_s),
        late_edges=tuple(late_transfer_s or {}),
        num_slices=num_slices,
    )
    transfers = [
        np.broadcast_to(np.asarray(found.get(edge, 0.0)), num_slices)
        for edges, found in (
            (shape.forward_edges, forward_transfer_s),
            (shape.backward_edges, backward_transfer_s),
            (shape.late_edges, late_transfer_s or {}),
        )
        for edge in edges
    ]
    transfer_rows = np.concatenate(transfers).tolist() if transfers else []
    duration_rows = _durations(schedule, forward, backward, weight_s).ravel().tolist()

    def run(count: int, _: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        events = event_list(shape, count)
        ends = np.array(end_times_s(events, duration_rows, transfer_rows))[:, None]
        return ends[list(events.last)], ends[events.by_microbatch]

    return tuple(_finish_times(shape, num_microbatches, 1, run)[:, 0].tolist())


def simulate_many(
    schedule: ScheduleName,
    *,
    forward_s: ArrayLike,
    backward_s: ArrayLike,
    num_microbatches: int,
    forward_transfer_s: ArrayLike | None = None,
    backward_transfer_s: ArrayLike | None = None,
    weight_s: ArrayLike | None = None,
    tail_s: ArrayLike | None = None,
    num_groups: int | None = None,
    stage_inputs: StageInputs | None = None,
) -> FloatArray:
    """Step times of many plans with the same graph of stages; (plans,) seconds.

    Equal to the largest of ``finish_times_s`` plus ``tail_s``, plan by plan.

    Args:
        schedule: the schedule of all.
        forward_s: (plans, stages) of one micro-batch.
        backward_s: (plans, stages) likewise, with the gradients of parameters.
        num_microbatches: micro-batches of all.
        forward_transfer_s: (plans, edges) along each edge of the graph, in order of (source,
            target): on a chain from each stage to the next; left out, nothing.
        backward_transfer_s: (plans, edges) back along each edge, in the same order.
        weight_s: (plans, stages) part of ``backward_s`` that ZB-H1 puts off.
        tail_s: (plans, groups) what a device group does after its last backward.
        num_groups: as for ``finish_times_s``.
        stage_inputs: the graph of stages; left out, a chain.

    Raises:
        PlanRefused: the schedule does not exist for these numbers.
    """
    forward = np.asarray(forward_s, dtype=np.float64)
    num_plans, num_stages = forward.shape
    groups = num_stages if num_groups is None else num_groups
    durations = _durations(
        schedule,
        forward.T,
        np.asarray(backward_s, dtype=np.float64).T,
        None if weight_s is None else np.asarray(weight_s, dtype=np.float64).T,
    ).reshape(-1, num_plans)
    if num_stages == 1:
        finish = num_microbatches * durations.sum(axis=0)[None]
    else:
        inputs = chain(num_stages) if stage_inputs is None else stage_inputs
        shape = PipelineShape.of(schedule, stage_inputs=inputs, num_groups=groups)
        edges = shape.forward_edges
        back = [edges.index((low, high)) for high, low in shape.backward_edges]
        transfers = np.zeros((2 * len(edges), num_plans))
        if forward_transfer_s is not None:
            transfers[: len(edges)] = np.asarray(forward_transfer_s).T
        if backward_transfer_s is not None:
            transfers[len(edges) :] = np.asarray(backward_transfer_s).T[back]

        def run_of(part: NDArray[np.int64]) -> _Run:
            def run(count: int, which: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
                events = event_list(shape, count)
                mine = part[which]
                ends = end_times_of_many_s(events, durations[:, mine], transfers[:, mine])
                return ends[list(events.last)], ends[events.by_microbatch]

            return run

        finish = np.concatenate(
            [
                _finish_times(shape, num_microbatches, len(part), run_of(part))
                for part in np.split(
                    np.arange(num_plans), range(_PLANS_AT_A_TIME, num_plans, _PLANS_AT_A_TIME)
                )
            ],
            axis=1,
        )
    return np.asarray((finish.T if tail_s is None else finish.T + np.asarray(tail_s)).max(axis=1))


def _durations(
    schedule: ScheduleName,
    forward_s: FloatArray,
    backward_s: FloatArray,
    weight_s: ArrayLike | None,
) -> FloatArray:
    """(kinds, stages, ...): forward, backward, gradients of parameters where they are put off."""
    put_off = np.zeros_like(backward_s)
    if schedule is ScheduleName.ZB_H1 and weight_s is not None:
        put_off = np.minimum(np.asarray(weight_s, dtype=np.float64), backward_s)
    return np.stack([forward_s, backward_s - put_off, put_off])


def _finish_times(
    shape: PipelineShape, num_microbatches: int, num_plans: int, run: _Run
) -> FloatArray:
    """(groups, plans) when each device group ends; simulates few micro-batches where it can."""
    every = np.arange(num_plans)
    if shape.schedule is ScheduleName.GPIPE:
        if num_microbatches <= 2 or not shape.is_chain or shape.num_slices > 1:
            return run(num_microbatches, every)[0]
        # On a chain the slowest of the stages so far (forward) or to come (backward) delays each
        # micro-batch after the first.
        first, second = run(1, every)[0], run(2, every)[0]
        return np.asarray(first + (num_microbatches - 1) * (second - first))
    finish = np.empty((shape.num_groups, num_plans))
    for spans in _SIMULATED_SPANS:
        few = spans * shape.span
        if not len(every) or num_microbatches < 2 * few:
            break
        ends, by_microbatch = run(few, every)
        length, seconds = _periods(by_microbatch[-3 * shape.span : -shape.span], shape)
        for found in np.unique(length[length > 0]).tolist():
            which = np.flatnonzero(length == found)
            rest, more = divmod(num_microbatches - few, found)
            some = run(few + more, every[which])[0] if more else ends[:, which]
            finish[:, every[which]] = some + rest * seconds[which]
        every = every[length == 0]
    if len(every):
        finish[:, every] = run(num_microbatches, every)[0]
    return finish


def _periods(window: FloatArray, shape: PipelineShape) -> tuple[NDArray[np.int64], FloatArray]:
    """After how many micro-batches the steady state of each plan repeats, and how long these take.

    ``window`` is (micro-batches, functions, plans) of two spans before the pipeline drains, so that
    what repeats in it repeats for a span at least; 0 where nothing does yet.
    """
    num_plans = window.shape[2]
    tolerance_s = _RELATIVE_TOLERANCE * window.max(axis=(0, 1))
    length, seconds = np.zeros(num_plans, np.int64), np.zeros(num_plans)
    step = shape.num_groups if shape.is_interleaved else 1
    for candidate in range(step, shape.span + 1, step):
        which = np.flatnonzero(length == 0)
        if not len(which):
            break
        difference = window[candidate:, :, which] - window[:-candidate, :, which]
        low, high = difference.min(axis=(0, 1)), difference.max(axis=(0, 1))
        repeats = high - low <= tolerance_s[which]
        length[which[repeats]] = candidate
        seconds[which[repeats]] = (low + high)[repeats] / 2
    return length, seconds


def closed_form_s(
    forward_s: ArrayLike,
    backward_s: ArrayLike,
    num_microbatches: int,
    *,
    weight_s: ArrayLike | None = None,
    num_groups: int | None = None,
) -> float:
    """All micro-batches on the busiest device group, and the bubble of filling and draining.

    The bubble is the time of one micro-batch on the other groups, over the number of stages of a
    group, less what ZB-H1 puts off into it (``weight_s`` of ``backward_s``, twice: it neither
    delays nor idles). With token slices, (stages, slices), it is that of the longest slice. Exact
    for equal stages and for one micro-batch; for unequal stages an estimate (Alpa, arXiv
    2201.12023, equation 2), mostly a little high.
    """
    both = np.asarray(forward_s, np.float64) + np.asarray(backward_s, np.float64)
    fill = both if weight_s is None else np.maximum(both - 2 * np.asarray(weight_s), 0.0)
    if both.ndim == 2:
        both, fill = both.sum(axis=1), fill.max(axis=1)
    groups = len(both) if num_groups is None else num_groups
    work = both.reshape(-1, groups).sum(axis=0)
    busiest = int(work.argmax())
    filling = fill.reshape(-1, groups).sum(axis=0)
    waits_s = (filling.sum() - filling[busiest]) * groups / len(both)
    return float(num_microbatches * work[busiest] + waits_s)


def inputs_of_crossing(
    crossing: Iterable[tuple[int, int, int]], num_stages: int
) -> tuple[tuple[int, ...], ...]:
    """``StageInputs`` of what crosses: (phase, source stage, target stage)."""
    inputs: list[set[int]] = [set() for _ in range(num_stages)]
    for phase, source, target in crossing:
        low, high = (source, target) if phase == FORWARD else (target, source)
        # A forward value that goes down is for a backward, which comes after every forward.
        if low < high or phase != FORWARD:
            inputs[high].add(low)
    return tuple(tuple(sorted(found)) for found in inputs)


def step_lower_bound_s(
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    num_microbatches: int,
    *,
    stage_inputs: StageInputs | None = None,
    num_groups: int | None = None,
    is_split: bool = False,
) -> float:
    """No schedule ends earlier.

    A device group waits for the first micro-batch to walk through the stages before its first one,
    works on all micro-batches, and then the last one walks back; and one micro-batch alone passes
    every stage twice. On a graph of stages the longest way counts. Where the backward is split
    (``is_split``) gradients of parameters may overlap the walk back, and only the way there counts.

    Args:
        forward_s: of one micro-batch on each stage.
        backward_s: likewise.
        num_microbatches: micro-batches of a step.
        stage_inputs: who waits for whom; left out, every stage for the one before.
        num_groups: device groups, stage i on group ``i mod num_groups``; left out, one for each.
        is_split: gradients of parameters may be put off.
    """
    groups = len(forward_s) if num_groups is None else num_groups
    own_s = [f + b for f, b in zip(forward_s, backward_s, strict=True)]
    inputs = chain(len(own_s)) if stage_inputs is None else stage_inputs
    walk_s: list[float] = []
    bound_s = 0.0
    for stage, passing_s in enumerate(forward_s if is_split else own_s):
        before_s = max((walk_s[source] for source in inputs[stage]), default=0.0)
        work_s = sum(own_s[stage::groups]) if stage < groups else own_s[stage]
        bound_s = max(bound_s, before_s + num_microbatches * work_s)
        walk_s.append(before_s + passing_s)
    return max(bound_s, *walk_s)
