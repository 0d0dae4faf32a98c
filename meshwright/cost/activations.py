"""Which activations a recompute policy keeps, runs again, and has alive at its worst moment.

For each segment the policy says what backward operators find already there:

* ``none``: every forward value they read is kept;
* ``selective``: results of products, convolutions, attention, look-ups and collectives are kept,
  what lies between is computed again when the backward pass reaches the segment;
* ``full``: only what enters the segment is kept.

Only what the backward pass of the segment needs is computed again. A value that another segment's
backward needs is kept in any case. Views share their base's storage and cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.columns import BACKWARD, FORWARD, Columns, FloatArray, IntArray
from meshwright.plans.plan import Recompute

__all__ = ["Activations", "RecomputeAnalysis"]

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """What one choice of policies keeps and recomputes."""

    recomputed: IntArray
    """Node rows that run again in the backward pass of their segment."""
    saved: tuple[IntArray, IntArray]
    """Distinct (storage, segment) pairs: a segment's backward needs a kept storage."""
    live_bytes: FloatArray
    """(moments, 4): bytes alive at each moment beyond what is kept, by scale."""
    live_segment: IntArray
    """Segment at work at each moment."""
    live_phase: IntArray

    def transient_bytes(self, weights: FloatArray, num_segments: int) -> FloatArray:
        """(2, segments): most bytes alive during each segment's forward and backward."""
        total = self.live_bytes @ weights
        peak = np.zeros((2, num_segments + 1))
        np.maximum.at(peak, (self.live_phase - FORWARD, self.live_segment), total)
        return peak[:, :num_segments]


class RecomputeAnalysis:
    """Answers for every choice of policies on one graph."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        nodes, values = columns.nodes, columns.values
        producer = values.producer
        made = producer[values.edge_value]
        # Parameters, data and what the prologue makes are there anyway.
        keep = (made >= 0) & (nodes.phase[np.maximum(made, 0)] >= FORWARD)
        self._edge_value = values.edge_value[keep]
        self._edge_reader = values.edge_reader[keep]
        self._edge_maker = made[keep]
        self._needed_full, self._needed_selective = self._needs()

    def _needs(self) -> tuple[BoolArray, BoolArray]:
        """For each forward node whether full or selective recompute runs it again."""
        nodes = self._columns.nodes
        same = (
            (nodes.segment[self._edge_maker] == nodes.segment[self._edge_reader])
            & (nodes.phase[self._edge_maker] == FORWARD)
            & (nodes.segment[self._edge_maker] >= 0)
        )
        makers = self._edge_maker[same].tolist()
        readers = self._edge_reader[same].tolist()
        inputs: dict[int, list[int]] = {}
        full = [False] * len(nodes.segment)
        for maker, reader in zip(makers, readers, strict=True):
            if nodes.phase[reader] == BACKWARD:
                full[maker] = True
            else:
                inputs.setdefault(reader, []).append(maker)
        selective = list(full)
        kept = nodes.is_kept.tolist()
        views = nodes.is_view.tolist()
        for reader in sorted(inputs, reverse=True):
            if views[reader]:
                continue
            if full[reader]:
                for maker in inputs[reader]:
                    full[maker] = True
            if selective[reader] and not kept[reader]:
                for maker in inputs[reader]:
                    selective[maker] = True
        wanted_full = np.array(full, dtype=np.bool_)
        wanted_selective = np.array(selective, dtype=np.bool_) & ~nodes.is_kept
        return wanted_full, wanted_selective

    def of(self, policies: Sequence[Recompute]) -> Activations:
        """What these policies, one for each segment, keep and recompute."""
        nodes = self._columns.nodes
        # Segment -1 takes the last entry: it has no policy and is kept.
        codes = np.array([_CODE[policy] for policy in policies] + [0], dtype=np.int64)
        code = codes[nodes.segment]
        again = ((code == 2) & self._needed_full) | ((code == 1) & self._needed_selective)
        again |= nodes.is_from_parameter & self._needed_full
        reads_late = (nodes.phase[self._edge_reader] == BACKWARD) | again[self._edge_reader]
        made_late = again[self._edge_maker] & (
            nodes.segment[self._edge_maker] == nodes.segment[self._edge_reader]
        )
        is_saved = reads_late & (nodes.phase[self._edge_maker] == FORWARD) & ~made_late
        is_saved &= ~nodes.is_from_parameter[self._edge_maker]
        # Segments are shifted by one, so that -1 has a number.
        span = self._columns.num_segments + 1
        late_segment = nodes.segment[self._edge_reader[is_saved]] + 1
        codes = np.unique(self._edge_value[is_saved] * span + late_segment)
        pairs = (codes // span, codes % span - 1)
        live, segment, phase = self._live(again, np.unique(pairs[0]))
        return Activations(
            recomputed=np.flatnonzero(again),
            saved=pairs,
            live_bytes=live,
            live_segment=segment,
            live_phase=phase,
        )

    def _first_late_use(self, again: BoolArray) -> FloatArray:
        """For each node the first backward node that needs it: it runs again just before."""
        nodes = self._columns.nodes
        first = np.full(len(nodes.segment), float(len(nodes.segment)))
        late = (nodes.phase[self._edge_reader] == BACKWARD) & again[self._edge_maker]
        np.minimum.at(first, self._edge_maker[late], self._edge_reader[late].astype(np.float64))
        chained = again[self._edge_reader] & again[self._edge_maker]
        makers, readers = self._edge_maker[chained], self._edge_reader[chained]
        order = np.argsort(-readers, kind="stable")
        found = first.tolist()
        for maker, reader in zip(makers[order].tolist(), readers[order].tolist(), strict=True):
            found[maker] = min(found[maker], found[reader])
        return np.array(found)

    def _gradients_made(self, late: IntArray, place: IntArray) -> FloatArray:
        """(moments, 4) bytes of gradients that the segment at work has made so far."""
        nodes, values = self._columns.nodes, self._columns.values
        bases = np.flatnonzero(values.is_base & values.is_gradient & (values.producer >= 0))
        born = place[values.producer[bases]]
        bases, born = bases[born >= 0], born[born >= 0]
        made = np.zeros((len(late) + 1, 4))
        np.add.at(made, (born + 1, values.scale[bases]), values.num_bytes[bases])
        before = np.cumsum(made, axis=0)
        segment = nodes.segment[late]
        start = np.full(self._columns.num_segments + 1, len(late))
        np.minimum.at(start, segment, np.arange(len(late)))
        return np.asarray(before[1:] - before[start[segment]])

    def _live(self, again: BoolArray, saved: IntArray) -> tuple[FloatArray, IntArray, IntArray]:
        """Bytes alive at each moment of the forward and then of the backward function."""
        nodes, values = self._columns.nodes, self._columns.values
        count = len(nodes.segment)
        forward = np.flatnonzero(nodes.phase == FORWARD)
        backward = np.flatnonzero(nodes.phase == BACKWARD)
        rerun = np.flatnonzero(again)
        late = np.concatenate([rerun, backward])
        key = np.concatenate([self._first_late_use(again)[rerun] - 0.5, backward])
        late = late[np.lexsort((late, key))]
        moments = len(forward) + len(late)
        place = np.full(count, -1)
        place[forward] = np.arange(len(forward))
        late_place = np.full(count, -1)
        late_place[late] = len(forward) + np.arange(len(late))

        change = np.zeros((moments + 1, 4))
        is_saved = np.zeros(len(values.num_bytes), np.bool_)
        is_saved[saved] = True
        bases = np.flatnonzero(values.is_base & (values.producer >= 0))
        for places, in_phase in ((place, nodes.phase == FORWARD), (late_place, late_place >= 0)):
            born = places[values.producer[bases]]
            mine = bases[(born >= 0) & ~values.is_gradient[bases]]
            if places is place:
                mine = mine[~is_saved[mine]]
            born_at = places[values.producer]
            last = born_at.copy()
            inside = in_phase[self._edge_reader] & (places[self._edge_reader] >= 0)
            np.maximum.at(last, self._edge_value[inside], places[self._edge_reader[inside]])
            np.add.at(change, (born_at[mine], values.scale[mine]), values.num_bytes[mine])
            np.add.at(change, (last[mine] + 1, values.scale[mine]), -values.num_bytes[mine])
        live = np.cumsum(change[:-1], axis=0)
        order = np.concatenate([forward, late])
        live[len(forward) :] += self._gradients_made(late, late_place - len(forward))
        phase = np.concatenate([np.full(len(forward), FORWARD), np.full(len(late), BACKWARD)])
        return live, nodes.segment[order], phase


_CODE = {Recompute.NONE: 0, Recompute.SELECTIVE: 1, Recompute.FULL: 2}
