"""From one layout of a value to another: the sequence of collectives, and its local code.

A step works on one leaf, so the tensor is looked at as ``(before, leaf, after)``; where ``before``
is not 1 the leaf is moved to the front for the collective and back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from meshwright.graph.factors import Place
from meshwright.spmd.layout import MICRO, Layout, order_axes

__all__ = ["Step", "StepKind", "communicates_over_micro", "payload_bytes", "plan_steps"]


class StepKind(StrEnum):
    """What one step does."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"
    SLICE = "slice"
    """Keep this rank's block; no communication."""
    MASK = "mask"
    """Keep the value on the first rank and zeros elsewhere; no communication."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step from one layout to the next."""

    kind: StepKind
    axes: tuple[str, ...]
    reduction: str = ""
    place: Place | None = None
    """The leaf gathered, scattered, sliced, or (all-to-all) gathered."""
    other_place: Place | None = None
    """All-to-all: the leaf scattered."""
    before: Layout
    after: Layout


class _Path:
    """The layout reached so far and the steps that led there."""

    def __init__(self, start: Layout) -> None:
        self.state = start
        self.steps: list[Step] = []

    def step(
        self,
        kind: StepKind,
        axes: tuple[str, ...],
        *,
        shards: Mapping[Place, tuple[str, ...]] | None = None,
        partial: Mapping[str, str] | None = None,
        reduction: str = "",
        place: Place | None = None,
        other_place: Place | None = None,
    ) -> None:
        after = Layout.of(
            {**dict(self.state.shards), **(shards or {})},
            dict(self.state.partial) if partial is None else partial,
        )
        self.steps.append(
            Step(
                kind=kind,
                axes=axes,
                reduction=reduction,
                place=place,
                other_place=other_place,
                before=self.state,
                after=after,
            )
        )
        self.state = after

    def partial_without(self, axes: tuple[str, ...]) -> dict[str, str]:
        return {axis: how for axis, how in self.state.partial if axis not in axes}


@functools.lru_cache(maxsize=65536)
def plan_steps(source: Layout, target: Layout) -> tuple[Step, ...]:
    """Steps that turn ``source`` into ``target``, reductions first."""
    path = _Path(source)
    _reduce(path, target)
    _exchange(path, target)
    for place in sorted({place for place, _ in path.state.shards}):
        have = path.state.axes_at(place)
        for axis in reversed(have[_common_prefix(have, target.axes_at(place)) :]):
            rest = path.state.axes_at(place)[:-1]
            path.step(StepKind.ALL_GATHER, (axis,), shards={place: rest}, place=place)
    for place, want in target.shards:
        for axis in want[len(path.state.axes_at(place)) :]:
            grown = (*path.state.axes_at(place), axis)
            path.step(StepKind.SLICE, (axis,), shards={place: grown}, place=place)
    kept = dict(target.partial)
    new = order_axes(axis for axis in kept if axis not in dict(path.state.partial))
    if new:
        path.step(StepKind.MASK, new, partial=kept)
    assert path.state == target, f"{source} -> {target} ended at {path.state}"
    return tuple(path.steps)


def _reduce(path: _Path, target: Layout) -> None:
    """Partial sums that ``target`` does not keep: scattered where it shards, else all-reduced."""
    kept = dict(target.partial)
    leaving = {axis: how for axis, how in path.state.partial if axis not in kept}
    for axis, how in list(leaving.items()):
        place = target.place_of(axis)
        if place is None or how != "sum":
            continue
        grown = (*path.state.axes_at(place), axis)
        if target.axes_at(place)[: len(grown)] == grown:
            path.step(
                StepKind.REDUCE_SCATTER,
                (axis,),
                shards={place: grown},
                partial=path.partial_without((axis,)),
                reduction=how,
                place=place,
            )
            del leaving[axis]
    for how in ("sum", "max"):
        axes = order_axes(axis for axis, reduction in leaving.items() if reduction == how)
        if axes:
            path.step(StepKind.ALL_REDUCE, axes, partial=path.partial_without(axes), reduction=how)


def _exchange(path: _Path, target: Layout) -> None:
    """Axes that move from one leaf to another go by all-to-all, innermost there and then.

    Those that move together from the end of one leaf to the end of another go in one. Others that
    leave or reach one leaf go one after another, as long as some can; the rest is left to gathers.
    """
    while move := next(
        filter(None, (_move(path.state, target, p) for p, _ in path.state.shards)), None
    ):
        here, there, axes = move
        path.step(
            StepKind.ALL_TO_ALL,
            axes,
            shards={
                here: path.state.axes_at(here)[: -len(axes)],
                there: (*path.state.axes_at(there), *axes),
            },
            place=here,
            other_place=there,
        )


def _move(
    state: Layout, target: Layout, here: Place
) -> tuple[Place, Place, tuple[str, ...]] | None:
    """The most axes that can leave the leaf ``here`` for another in one all-to-all, and for which.

    What stays behind must stay for good or move too.
    """
    have = state.axes_at(here)
    for first in range(len(have)):
        rest, axes = have[:first], have[first:]
        there = target.place_of(axes[0])
        if there is None or there == here:
            continue
        grown = (*state.axes_at(there), *axes)
        left = rest[_common_prefix(rest, target.axes_at(here)) :]
        if grown == target.axes_at(there)[: len(grown)] and all(
            target.place_of(axis) not in (None, here) for axis in left
        ):
            return here, there, axes
    return None


def _common_prefix(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


def communicates_over_micro(steps: tuple[Step, ...]) -> bool:
    """Whether a step would need values of several micro-batches at once."""
    return any(MICRO in step.axes for step in steps)


def payload_bytes(step: Step, local_bytes_before: int, axis_sizes: Mapping[str, int]) -> int:
    """Full payload of a step, as ``Collective.num_bytes`` defines it."""
    ways = math.prod(axis_sizes[axis] for axis in step.axes)
    return local_bytes_before * ways if step.kind == StepKind.ALL_GATHER else local_bytes_before
