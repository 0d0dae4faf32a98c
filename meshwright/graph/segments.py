"""Segments: where the program is cut into pieces, and which pieces are equal.

The forward program is cut where few activations cross. A run of operators with more than
``_MAX_HEAVY`` heavy operators (products, convolutions, attention, embeddings) is cut at every
position where the number of crossing tensors is least, again and again; light pieces join the
heavy piece after them. Values that depend on no parameter (masks, positions) do not count as
crossing, since every piece can compute them for itself. Backward operators belong to the segment
of their forward operator. Equal segments (same operators, shapes and wiring) form a class.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.graph.homes import home_path
from meshwright.graph.kinds import OpKinds, op_kinds
from meshwright.graph.opgraph import InputRole, Op, OpGraph, Phase
from meshwright.graph.rules.base import OpRule

__all__ = ["Segment", "Segmentation", "find_segments"]

_MAX_HEAVY = 8
_HEAVY_NAMES = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "mv", "convolution", "embedding"}
    | {"_scaled_dot_product_flash_attention_for_cpu"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of forward operators and the backward operators that belong to them."""

    index: int
    segment_class: int
    name: str
    """Module path that nearly all of its work is under (``home_path``), for the reader."""
    forward_ops: tuple[int, ...]
    backward_ops: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """The segments of a graph, in execution order."""

    segments: tuple[Segment, ...]
    segment_of_op: tuple[int, ...]
    """For each operator its segment; -1 for operators that depend on no parameter, which any
    segment computes for itself."""

    @property
    def num_classes(self) -> int:
        """Distinct segments."""
        return 1 + max((segment.segment_class for segment in self.segments), default=-1)

    def representatives(self) -> tuple[Segment, ...]:
        """The first segment of each class, by class number."""
        first: dict[int, Segment] = {}
        for segment in self.segments:
            first.setdefault(segment.segment_class, segment)
        return tuple(first[number] for number in sorted(first))

    def multiplicity(self) -> tuple[int, ...]:
        """How many segments each class has."""
        counts = Counter(segment.segment_class for segment in self.segments)
        return tuple(counts[number] for number in sorted(counts))


def find_segments(
    graph: OpGraph, rules: tuple[OpRule, ...], kinds: OpKinds | None = None
) -> Segmentation:
    """Cut ``graph`` into segments and fold equal ones; ``kinds`` saves finding them again."""
    kinds = kinds or op_kinds(graph)
    free = _parameter_free_values(graph, rules, kinds)
    main = [
        op.index
        for op in graph.ops
        if op.phase == Phase.FORWARD and not free.issuperset(kinds.results[op.index])
    ]
    if not main:
        return Segmentation(segments=(), segment_of_op=(-1,) * len(graph.ops))
    crossing = _crossing_counts(graph, rules, kinds, main, free)
    heavy = [_is_heavy(graph.ops[index]) for index in main]
    cuts = _join_light(sorted(_cut(0, len(main), crossing, heavy)), heavy, _readers(kinds, main))
    segment_of_op = [-1] * len(graph.ops)
    bounds = [0, *cuts, len(main)]
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        for position in range(start, stop):
            segment_of_op[main[position]] = number
    _assign_backward(graph, kinds, segment_of_op, free)
    return _folded(graph, kinds, segment_of_op, len(bounds) - 1)


def _parameter_free_values(graph: OpGraph, rules: tuple[OpRule, ...], kinds: OpKinds) -> set[int]:
    """Values computed from data, buffers and constants alone, without randomness."""
    free = {item.value for item in graph.inputs if item.role != InputRole.PARAMETER}
    updated = {output.value for output in graph.outputs if output.role == "buffer_update"}
    for op in graph.ops:
        draws = rules[op.index].random
        if op.phase == Phase.FORWARD and not draws and free.issuperset(kinds.inputs[op.index]):
            free.update(value for value in kinds.results[op.index] if value not in updated)
    return free


def _crossing_counts(
    graph: OpGraph, rules: tuple[OpRule, ...], kinds: OpKinds, main: list[int], free: set[int]
) -> list[int]:
    """For each position p the number of tensors made before ``main[p]`` and read at or after it.

    A view counts as the tensor it looks at.
    """
    parameters = {item.value for item in graph.parameters}
    root: dict[int, int] = {}
    born: dict[int, int] = {}
    last_use: dict[int, int] = {}
    for position, index in enumerate(main):
        inputs = kinds.inputs[index]
        for value in inputs:
            if value in root:
                last_use[root[value]] = position
        from_parameters = all(value in parameters or value in free for value in inputs)
        for value in kinds.results[index]:
            if rules[index].is_view and inputs and inputs[0] in root:
                root[value] = root[inputs[0]]
            elif rules[index].is_view and from_parameters:
                parameters.add(value)
            else:
                root[value] = value
                born[value] = position
    for output in graph.outputs:
        if output.value in root and output.role in {"loss", "output"}:
            last_use[root[output.value]] = len(main)
    change = [0] * (len(main) + 2)
    for value, start in born.items():
        stop = last_use.get(value, start)
        change[start + 1] += 1
        change[stop + 1] -= 1
    counts, running = [], 0
    for position in range(len(main) + 1):
        running += change[position]
        counts.append(running)
    return counts


def _is_heavy(op: Op) -> bool:
    return op.target.split(".")[1] in _HEAVY_NAMES


def _cut(start: int, stop: int, crossing: list[int], heavy: list[bool]) -> set[int]:
    """Cut positions strictly inside ``start..stop``."""
    cuts: set[int] = set()
    pending = [(start, stop)]
    while pending:
        first, last = pending.pop()
        if sum(heavy[first:last]) <= _MAX_HEAVY or last - first < 2:
            continue
        least = min(crossing[first + 1 : last])
        here = [p for p in range(first + 1, last) if crossing[p] == least]
        cuts.update(here)
        bounds = [first, *here, last]
        pending += list(itertools.pairwise(bounds))
    return cuts


def _readers(kinds: OpKinds, main: list[int]) -> list[list[int]]:
    """For each position of ``main`` the positions that read what it makes."""
    maker = {
        value: position for position, index in enumerate(main) for value in kinds.results[index]
    }
    found: list[list[int]] = [[] for _ in main]
    for position, index in enumerate(main):
        for value in kinds.inputs[index]:
            if value in maker:
                found[maker[value]].append(position)
    return found


def _join_light(cuts: list[int], heavy: list[bool], readers: list[list[int]]) -> list[int]:
    """Drop cuts so that every piece has a heavy operator.

    A light piece joins the piece after it where something there needs it, and the piece before it
    where nothing does (the end of a branch) or nothing comes after.
    """
    kept: list[int] = []
    light: list[tuple[int, int]] = []
    is_first = True
    for start, stop in itertools.pairwise([0, *cuts, len(heavy)]):
        if not any(heavy[start:stop]):
            light.append((start, stop))
            continue
        needed, first = set(range(start, stop)), start
        for begin, end in reversed(light):
            if any(reader in needed for p in range(begin, end) for reader in readers[p]):
                needed.update(range(begin, end))
                first = begin
        if not is_first:
            kept.append(first)
        light, is_first = [], False
    return kept


def _assign_backward(
    graph: OpGraph, kinds: OpKinds, segment_of_op: list[int], free: set[int]
) -> None:
    """Backward operators go where their forward operator is.

    Sums of gradients go where the last of their operands is made.
    """
    maker: dict[int, int] = {}
    last = max(segment_of_op)
    for op in graph.ops:
        if op.phase == Phase.FORWARD:
            for value in kinds.results[op.index]:
                maker[value] = segment_of_op[op.index]
            continue
        forward = -1 if op.forward_op is None else segment_of_op[op.forward_op]
        if forward < 0:
            gradients = [maker[v] for v in kinds.inputs[op.index] if v in maker and v not in free]
            forward = min((number for number in gradients if number >= 0), default=last)
        segment_of_op[op.index] = forward
        for value in kinds.results[op.index]:
            maker[value] = forward


def _folded(
    graph: OpGraph, kinds: OpKinds, segment_of_op: list[int], num_segments: int
) -> Segmentation:
    forward: list[list[int]] = [[] for _ in range(num_segments)]
    backward: list[list[int]] = [[] for _ in range(num_segments)]
    for op in graph.ops:
        if segment_of_op[op.index] >= 0:
            side = forward if op.phase == Phase.FORWARD else backward
            side[segment_of_op[op.index]].append(op.index)
    classes: dict[tuple[object, ...], int] = {}
    segments: list[Segment] = []
    for number in range(num_segments):
        wiring = _wiring(kinds, (*forward[number], *backward[number]))
        segments.append(
            Segment(
                index=number,
                segment_class=classes.setdefault(wiring, len(classes)),
                name=home_path(graph.ops[index] for index in forward[number]),
                forward_ops=tuple(forward[number]),
                backward_ops=tuple(backward[number]),
            )
        )
    return Segmentation(segments=tuple(segments), segment_of_op=tuple(segment_of_op))


def _wiring(kinds: OpKinds, ops: Sequence[int]) -> tuple[object, ...]:
    """Equal for equal pieces: operators, arguments, wiring and shapes, no names."""
    number: dict[int, int] = {}
    return tuple(
        [
            (
                kinds.kind[index],
                tuple([number.setdefault(v, len(number)) for v in kinds.inputs[index]]),
                tuple([number.setdefault(v, len(number)) for v in kinds.results[index]]),
            )
            for index in ops
        ]
    )
