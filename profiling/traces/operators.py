"""What each operator of the host cost on the device.

A kernel carries the correlation number of the runtime call that launched it; that call was made on
some thread at some time, where one operator was innermost. The kernel's time is that operator's.
(The External id of a kernel is used only where the call is not in the trace: older profilers wrote
the correlation number there.) Without a device an operator costs its own time on the host, that of
the operators in it left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.profiling.traces.columns import Integers, RankTrace
from meshwright.profiling.traces.nesting import Nesting
from meshwright.profiling.traces.timeline import is_communication
from meshwright.records.kinds import DIRECTIONS

__all__ = ["OperatorGroup", "OperatorTimes", "launching_operators", "operator_times"]

_BACKWARD = "autograd::engine::evaluate_function"
_OPTIMIZER = "Optimizer.step#"


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorGroup:
    """Calls of one operator with the same shapes and types in the same direction."""

    name: str
    dims: bytes
    """JSON of the dimensions of its inputs; empty where the trace does not say."""
    types: bytes
    direction: str
    times_s: tuple[float, ...]
    """Of each call, in order."""
    num_kernels: int

    @property
    def total_s(self) -> float:
        """Of all calls."""
        return sum(self.times_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorTimes:
    """The operators of one rank by what they cost, the dearest first."""

    groups: tuple[OperatorGroup, ...]
    on_device: bool
    """False where the times are the host's."""
    device_s: float
    """Of all work that is not communication, each stream counted for itself."""
    unassigned_s: float
    """The part of it that no operator is known to have launched."""
    num_unassigned: int


def launching_operators(trace: RankTrace, nesting: Nesting) -> Integers:
    """For each piece of device work the number of the operator that launched it, -1 if unknown."""
    work, launches = trace.work, trace.launches
    found = np.full(len(work), -1, dtype=np.int64)
    launch = first_places(launches.correlation, work.correlation)
    known = (launch >= 0) & (work.correlation >= 0)
    at = launch[known]
    found[known] = nesting.enclosing(launches.thread[at].astype(np.int64), launches.start_ns[at])
    other = ~known & (work.external_id >= 0) & (work.external_id != work.correlation)
    if other.any():
        found[other] = first_places(trace.operators.external_id, work.external_id[other])
    return found


def first_places(values: Integers, wanted: Integers) -> Integers:
    """For each of ``wanted`` its first place in ``values``, -1 where it is not there."""
    if not len(values):
        return np.full(len(wanted), -1, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    place = np.minimum(np.searchsorted(ordered, wanted, side="left"), len(ordered) - 1)
    return np.where(ordered[place] == wanted, order[place], -1)


def operator_times(trace: RankTrace, nesting: Nesting, launched_by: Integers) -> OperatorTimes:
    """Device time by operator, its shapes and direction; see the module for how."""
    operators, work = trace.operators, trace.work
    if len(work):
        own = ~np.isin(work.name, [n for n, s in enumerate(trace.names) if is_communication(s)])
        length_ns = work.end_ns - work.start_ns
        assigned = own & (launched_by >= 0)
        owner = launched_by[assigned]
        cost_ns = np.bincount(owner, weights=length_ns[assigned], minlength=len(operators))
        kernels = np.bincount(owner, minlength=len(operators))
        lost = own & (launched_by < 0)
        totals = float(length_ns[own].sum()) * 1e-9, float(length_ns[lost].sum()) * 1e-9
        num_lost = int(lost.sum())
    else:
        cost_ns = nesting.self_ns().astype(np.float64)
        kernels = np.ones(len(operators), dtype=np.int64)
        totals, num_lost = (float(cost_ns.sum()) * 1e-9, 0.0), 0
    return OperatorTimes(
        groups=_groups(trace, nesting, cost_ns, kernels),
        on_device=bool(len(work)),
        device_s=totals[0],
        unassigned_s=totals[1],
        num_unassigned=num_lost,
    )


def _groups(
    trace: RankTrace, nesting: Nesting, cost_ns: np.ndarray, kernels: Integers
) -> tuple[OperatorGroup, ...]:
    operators = trace.operators
    used = np.flatnonzero(kernels > 0)
    used = used[np.argsort(operators.start_ns[used], kind="stable")]
    if not len(used):
        return ()
    direction = _directions(trace, nesting)[used]
    name, shape = (part[used].astype(np.int64) for part in (operators.name, operators.shape))
    keys = (name * len(trace.shapes) + shape) * len(DIRECTIONS) + direction
    distinct, group = np.unique(keys, return_inverse=True)
    by_group = np.argsort(group, kind="stable")
    ends = np.cumsum(np.bincount(group, minlength=len(distinct)))
    found = []
    for key, members in zip(distinct.tolist(), np.split(used[by_group], ends[:-1]), strict=True):
        named, towards = divmod(key, len(DIRECTIONS))
        name_number, shape_number = divmod(named, len(trace.shapes))
        dims, types = trace.shapes[shape_number]
        found.append(
            OperatorGroup(
                name=trace.names[name_number],
                dims=dims,
                types=types,
                direction=DIRECTIONS[towards],
                times_s=tuple((cost_ns[members] * 1e-9).tolist()),
                num_kernels=int(kernels[members].sum()),
            )
        )
    return tuple(sorted(found, key=lambda one: (-one.total_s, one.name, one.dims)))


def _directions(trace: RankTrace, nesting: Nesting) -> Integers:
    """By operator: 1 under a node of the autograd engine, 2 in a step of an optimizer, else 0."""
    operators, notes = trace.operators, trace.annotations
    backward = [n for n, name in enumerate(trace.names) if name.startswith(_BACKWARD)]
    found = np.isin(operators.name[nesting.outermost()], backward).astype(np.int64)
    steps = [n for n, name in enumerate(trace.names) if name.startswith(_OPTIMIZER)]
    chosen = np.isin(notes.name, steps)
    for thread in np.unique(notes.thread[chosen]):
        here = chosen & (notes.thread == thread)
        order = np.argsort(notes.start_ns[here])
        starts = notes.start_ns[here][order]
        ends = np.maximum.accumulate(notes.end_ns[here][order])
        place = np.searchsorted(starts, operators.start_ns, side="right") - 1
        inside = (place >= 0) & (operators.start_ns <= ends[place])
        found[inside & (operators.thread == thread)] = 2
    return found
