"""Collectives over the ranks of one job: the same one found on each, sizes compared, waits told.

All ranks of a group call the same collectives in the same order; that, within one iteration, is
how they are matched (or by the profiler's own sequence numbers where every call has one). Where the
ranks' lists differ in kind, type or length, nothing is matched and it is said.

A collective's kernel spins from the rank's arrival until the last rank has come and the data has
passed. So the shortest kernel, that of the rank which came last, bounds the transfer itself from
above, and needs no common clock. Where all ranks wait for data of all, their kernels end together:
how far a rank's ends lie from the middle, in the median, is taken for the error of its clock.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.profiling.traces.collectives import CollectiveCall

__all__ = ["MatchedCollective", "RankCalls", "RankSet", "match_ranks"]

_SYNCHRONIZING = ("all_reduce", "all_gather", "all_to_all", "barrier", "reduce_scatter")
_EQUAL_SIZES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCalls:
    """One rank's collectives, and its clock's zero."""

    rank: int
    zero_ns: int
    """What the rank's clock said at 0 of its calls, from a moment common to all ranks."""
    calls: tuple[CollectiveCall, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedCollective:
    """One collective as all its ranks saw it."""

    name: str
    iteration: int | None
    index: int
    """Which one of its group in the iteration."""
    group: str | None
    group_size: int | None
    """As the trace says, else the number of ranks that took part where that is all of the job."""
    dtype: str | None
    num_bytes: int | None
    """The largest of the ranks'."""
    sizes_agree: bool | None
    """None where a rank does not say, and for collectives whose ranks may give unequal parts."""
    sizes_are_equal: bool
    ranks: tuple[int, ...]
    times_s: tuple[float, ...]
    """By rank, waiting included."""
    start_skew_s: float
    end_skew_s: float
    """From the first rank to the last, clocks corrected."""
    last_rank: int
    """The one the others waited for."""
    waited_s: float
    """For it, the other ranks' mean."""

    @property
    def transfer_s(self) -> float:
        """The time of the rank that waited least; see the module."""
        return min(self.times_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSet:
    """The ranks of one job side by side."""

    ranks: tuple[int, ...]
    world_size: int | None
    collectives: tuple[MatchedCollective, ...]
    clock_errors_s: dict[int, float]
    """By rank, estimated; empty where nothing tells."""
    unmatched: tuple[str, ...]
    """One sentence about each list that could not be matched."""
    held_up_s: dict[int, float]
    """By rank: how long the others waited for it, their mean, over all collectives."""

    @property
    def slowest_rank(self) -> int | None:
        """The rank the others waited for longest."""
        return max(self.held_up_s, key=lambda rank: self.held_up_s[rank], default=None)


def match_ranks(ranks: Sequence[RankCalls], *, world_size: int | None) -> RankSet:
    """The collectives of two or more ranks, each found on all ranks of its group that are given."""
    lists: dict[tuple[int | None, str | None], dict[int, list[CollectiveCall]]] = defaultdict(dict)
    zeros_ns = {one.rank: one.zero_ns for one in ranks}
    for one in ranks:
        for call in one.calls:
            lists[call.iteration, call.group].setdefault(one.rank, []).append(call)
    rows: list[tuple[tuple[int | None, str | None], int, dict[int, CollectiveCall]]] = []
    unmatched: list[str] = []
    for key, by_rank in lists.items():
        problem = _difference(by_rank, num_ranks=len(ranks))
        if problem:
            where = "outside iterations" if key[0] is None else f"in iteration {key[0]}"
            unmatched.append(f"{where}, group {key[1] or 'unnamed'}: {problem}")
            continue
        length = len(next(iter(by_rank.values())))
        rows += [
            (key, place, {rank: calls[place] for rank, calls in sorted(by_rank.items())})
            for place in range(length)
        ]
    errors_ns = _clock_errors_ns([row for _, _, row in rows], zeros_ns)
    clocks_ns = {rank: zero - errors_ns.get(rank, 0) for rank, zero in zeros_ns.items()}
    matched = [
        _matched(key, place, row, clocks_ns, world_size=world_size) for key, place, row in rows
    ]
    held_up_s = dict.fromkeys(sorted(zeros_ns), 0.0) if matched else {}
    for one_matched in matched:
        held_up_s[one_matched.last_rank] += one_matched.waited_s
    return RankSet(
        ranks=tuple(sorted(zeros_ns)),
        world_size=world_size,
        collectives=tuple(matched),
        clock_errors_s={rank: error * 1e-9 for rank, error in sorted(errors_ns.items())},
        unmatched=tuple(unmatched),
        held_up_s=held_up_s,
    )


def _difference(by_rank: dict[int, list[CollectiveCall]], *, num_ranks: int) -> str:
    """What keeps the lists from being one; empty if nothing does."""
    if len(by_rank) < 2:
        return f"only rank {next(iter(by_rank))} of {num_ranks} has it"
    for calls in by_rank.values():
        if all(call.sequence is not None for call in calls):
            calls.sort(key=lambda call: call.sequence or 0)
    (first, calls), *others = sorted(by_rank.items())
    for rank, other in others:
        if len(other) != len(calls):
            return f"rank {first} has {len(calls)} collectives, rank {rank} {len(other)}"
        for place, (one, two) in enumerate(zip(calls, other, strict=True)):
            if (one.name, one.dtype, one.sequence) != (two.name, two.dtype, two.sequence):
                return (
                    f"collective {place} is {one.name} of {one.dtype or 'unknown type'} on rank "
                    f"{first}, {two.name} of {two.dtype or 'unknown type'} on rank {rank}"
                )
    return ""


def _clock_errors_ns(
    rows: Sequence[dict[int, CollectiveCall]], zeros_ns: dict[int, int]
) -> dict[int, int]:
    ends: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if next(iter(row.values())).name not in _SYNCHRONIZING or len(row) < 2:
            continue
        when = {rank: zeros_ns[rank] + call.end_ns for rank, call in row.items()}
        middle = statistics.median(when.values())
        for rank, end in when.items():
            ends[rank].append(end - middle)
    return {rank: round(statistics.median(found)) for rank, found in ends.items()}


def _matched(
    key: tuple[int | None, str | None],
    index: int,
    row: dict[int, CollectiveCall],
    zeros_ns: dict[int, int],
    *,
    world_size: int | None,
) -> MatchedCollective:
    first = next(iter(row.values()))
    starts = {rank: zeros_ns[rank] + call.start_ns for rank, call in row.items()}
    ends = [zeros_ns[rank] + call.end_ns for rank, call in row.items()]
    last_rank = max(starts, key=lambda rank: starts[rank])
    others = [starts[last_rank] - start for rank, start in starts.items() if rank != last_rank]
    sizes = [call.num_bytes for call in row.values()]
    known = [size for size in sizes if size is not None]
    equal = len(known) == len(sizes) and len(set(known)) == 1
    judged = len(known) == len(sizes) and first.name in _EQUAL_SIZES
    group_size = next((call.group_size for call in row.values() if call.group_size), None)
    if group_size is None and world_size == len(row):
        group_size = world_size
    return MatchedCollective(
        name=first.name,
        iteration=key[0],
        index=index,
        group=key[1],
        group_size=group_size,
        dtype=first.dtype,
        num_bytes=max(known, default=None),
        sizes_agree=equal if judged else None,
        sizes_are_equal=equal,
        ranks=tuple(row),
        times_s=tuple(call.time_s for call in row.values()),
        start_skew_s=(max(starts.values()) - min(starts.values())) * 1e-9,
        end_skew_s=(max(ends) - min(ends)) * 1e-9,
        last_rank=last_rank,
        waited_s=statistics.fmean(others) * 1e-9 if others else 0.0,
    )
