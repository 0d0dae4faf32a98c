"""Which operator encloses what, by thread and time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.profiling.traces.columns import Integers, Spans

__all__ = ["Nesting", "nesting_of"]

_CHUNK = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Nesting:
    """The spans of one host, each with the one that encloses it most closely on its thread."""

    order: Integers
    """Numbers of the spans by thread, then start; an outer one before those it encloses."""
    thread: Integers
    start_ns: Integers
    end_ns: Integers
    """Of the spans in that order."""
    parent: Integers
    """By place in that order; -1 for the outermost."""

    def enclosing(self, thread: Integers, time_ns: Integers) -> Integers:
        """Number of the innermost span on ``thread`` at ``time_ns``, -1 where there is none."""
        found = np.full(len(time_ns), -1, dtype=np.int64)
        if not len(self.order):
            return found
        for number in np.unique(thread):
            low = int(np.searchsorted(self.thread, number, side="left"))
            high = int(np.searchsorted(self.thread, number, side="right"))
            asked = np.flatnonzero(thread == number)
            place = np.searchsorted(self.start_ns[low:high], time_ns[asked], side="right") + low - 1
            place[place < low] = -1
            # Spans that ended before are left for the ones around them, level by level.
            while True:
                over = (place >= 0) & (self.end_ns[place] < time_ns[asked])
                if not over.any():
                    break
                place[over] = self.parent[place[over]]
            found[asked] = np.where(place >= 0, self.order[place], -1)
        return found

    def outermost(self) -> Integers:
        """By number of a span: the number of the outermost one around it, itself if none is."""
        top = np.where(self.parent < 0, np.arange(len(self.parent)), self.parent)
        while True:
            higher = top[top]
            if np.array_equal(higher, top):
                break
            top = higher
        found = np.empty(len(top), dtype=np.int64)
        found[self.order] = self.order[top]
        return found

    def parents(self) -> Integers:
        """By number of a span: the number of the one directly around it, -1 if none is."""
        found = np.full(len(self.order), -1, dtype=np.int64)
        inner = self.parent >= 0
        found[self.order[inner]] = self.order[self.parent[inner]]
        return found

    def self_ns(self) -> Integers:
        """By number of a span: its time without that of the spans directly in it."""
        length = self.end_ns - self.start_ns
        inner = np.flatnonzero(self.parent >= 0)
        around = self.parent[inner]
        clipped = np.minimum(self.end_ns[inner], self.end_ns[around]) - self.start_ns[inner]
        covered = np.bincount(around, weights=np.maximum(clipped, 0), minlength=len(length))
        found = np.empty(len(length), dtype=np.int64)
        found[self.order] = np.maximum(length - covered.astype(np.int64), 0)
        return found


def nesting_of(spans: Spans) -> Nesting:
    """How ``spans`` enclose one another on each thread.

    A span belongs to the last one begun that has not ended when it begins. Ends are not compared:
    rounding to microseconds lets inner spans outlast outer ones by one.
    """
    order = np.lexsort((-spans.end_ns, spans.start_ns, spans.thread)).astype(np.int64)
    thread = spans.thread[order].astype(np.int64)
    start_ns, end_ns = spans.start_ns[order], spans.end_ns[order]
    parent = np.full(len(order), -1, dtype=np.int64)
    open_: list[tuple[int, int]] = []
    last_thread = -1
    for begin in range(0, len(order), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        parents: list[int] = []
        rows = zip(
            thread[part].tolist(), start_ns[part].tolist(), end_ns[part].tolist(), strict=True
        )
        for place, (number, start, end) in enumerate(rows, start=begin):
            if number != last_thread:
                open_, last_thread = [], number
            while open_ and open_[-1][0] <= start:
                open_.pop()
            parents.append(open_[-1][1] if open_ else -1)
            open_.append((end, place))
        parent[part] = parents
    return Nesting(order=order, thread=thread, start_ns=start_ns, end_ns=end_ns, parent=parent)
