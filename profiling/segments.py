"""Times the captured operators of each segment of a model, forward and backward.

The whole graph runs once, operator by operator. When the last operator of a segment has run, all
that the segment reads is still held, so its operators run again, as often as the Timer likes. Equal
segments are timed once. Operators that depend on no parameter belong to no segment (any computes
them for itself); they are timed together as segment -1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.capture.execute import call_op
from meshwright.graph.opgraph import Op, OpGraph, Phase
from meshwright.graph.segments import Segmentation
from meshwright.profiling.peak import measure_peak_memory
from meshwright.profiling.timer import Measured, Timer

__all__ = ["SHARED", "Piece", "PieceTiming", "pieces_of", "time_pieces"]

SHARED = -1
"""Segment of the operators that belong to none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The operators of one segment in one phase."""

    segment: int
    """Index of the segment; ``SHARED`` for the operators of none."""
    segment_class: int
    multiplicity: int
    """How many equal segments there are."""
    phase: Phase
    ops: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceTiming:
    """What one run of a piece takes."""

    piece: Piece
    measured: Measured
    peak_bytes: int
    """Most bytes its operators held at once beyond what they were given."""


def pieces_of(graph: OpGraph, segmentation: Segmentation) -> tuple[Piece, ...]:
    """A piece for each class of segments and phase that has operators, and the shared ones.

    Over all pieces, the number of operators times ``multiplicity`` is that of the graph.
    """
    counts = Counter(segment.segment_class for segment in segmentation.segments)
    found = []
    for segment in segmentation.representatives():
        for phase, ops in (
            (Phase.FORWARD, segment.forward_ops),
            (Phase.BACKWARD, segment.backward_ops),
        ):
            found.append(
                Piece(
                    segment=segment.index,
                    segment_class=segment.segment_class,
                    multiplicity=counts[segment.segment_class],
                    phase=phase,
                    ops=ops,
                )
            )
    for phase in Phase:
        found.append(
            Piece(
                segment=SHARED,
                segment_class=SHARED,
                multiplicity=1,
                phase=phase,
                ops=tuple(
                    op.index
                    for op in graph.ops
                    if segmentation.segment_of_op[op.index] < 0 and op.phase == phase
                ),
            )
        )
    return tuple(piece for piece in found if piece.ops)


def time_pieces(
    graph: OpGraph,
    pieces: Sequence[Piece],
    inputs: Mapping[int, Tensor],
    timer: Timer,
    *,
    on_piece: Callable[[PieceTiming], None],
) -> None:
    """Run ``graph`` on ``inputs`` once and time each piece on its way; ``on_piece`` gets each.

    All inputs lie on one device. Besides what a step holds, the inputs of a piece are held until it
    has been timed.
    """
    held = dict(inputs)
    device = next((tensor.device for tensor in inputs.values()), torch.device("cpu"))
    ending = {piece.ops[-1]: piece for piece in pieces}
    last_reader = _last_readers(graph, pieces)
    with torch.no_grad():
        for op in graph.ops:
            _run((op,), held, device)
            piece = ending.get(op.index)
            if piece is not None:
                on_piece(_time_piece(graph, piece, held, timer, device))
            for value in {*op.inputs, *op.results, *(_read_by(graph, piece) if piece else ())}:
                if last_reader.get(value, -1) <= op.index:
                    held.pop(value, None)


def _read_by(graph: OpGraph, piece: Piece) -> set[int]:
    """Values the operators of ``piece`` read."""
    return {value for index in piece.ops for value in graph.ops[index].inputs}


def _last_readers(graph: OpGraph, pieces: Sequence[Piece]) -> dict[int, int]:
    """For each value the last operator after which it is needed, the timing of pieces included."""
    found = {value: op.index for op in graph.ops for value in op.inputs}
    for piece in pieces:
        for value in _read_by(graph, piece):
            found[value] = max(found[value], piece.ops[-1])
    return found


def _run(ops: Sequence[Op], held: dict[int, Tensor], device: torch.device) -> None:
    for op in ops:
        for value, tensor in zip(op.outputs, call_op(op, held, device), strict=True):
            if value is not None:
                held[value] = tensor


def _time_piece(
    graph: OpGraph, piece: Piece, held: Mapping[int, Tensor], timer: Timer, device: torch.device
) -> PieceTiming:
    ops = [graph.ops[index] for index in piece.ops]
    made = {value for op in ops for value in op.results}
    given = {value: held[value] for value in _read_by(graph, piece) - made}
    drop_after = _drops(graph, ops, made)

    def run() -> None:
        values: dict[int, Tensor] = dict(given)
        for op, dropped in zip(ops, drop_after, strict=True):
            _run((op,), values, device)
            for value in dropped:
                values.pop(value, None)

    return PieceTiming(
        piece=piece,
        measured=timer.measure(run),
        peak_bytes=measure_peak_memory(run, device=device.type).peak_bytes,
    )


def _drops(graph: OpGraph, ops: Sequence[Op], made: set[int]) -> list[tuple[int, ...]]:
    """For each operator the values made here that nobody reads after it, inside or outside."""
    inside = {op.index for op in ops}
    outside = {value for op in graph.ops if op.index not in inside for value in op.inputs}
    outside.update(item.value for item in graph.outputs)
    last: dict[int, int] = {}
    for place, op in enumerate(ops):
        for value in (*op.results, *op.inputs):
            if value in made and value not in outside:
                last[value] = place
    found: list[list[int]] = [[] for _ in ops]
    for value, place in last.items():
        found[place].append(value)
    return [tuple(values) for values in found]
