"""What profiler traces tell, as JSON and as lines for a person."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from meshwright.profiling.traces.collectives import CollectiveCall
from meshwright.profiling.traces.rank_analysis import DeviceTimes, RankAnalysis
from meshwright.profiling.traces.rank_sets import RankSet
from meshwright.profiling.traces.timeline import Iteration, Shares
from meshwright.strict_json import one_line
from meshwright.units import format_bytes, format_seconds

__all__ = ["lines_of", "summary_of"]

_NUM_OPERATORS = 10
_NUM_SHOWN = 5
_MAX_ROWS = 12
_NAME_CHARACTERS = 100


def summary_of(ranks: Sequence[RankAnalysis], rank_set: RankSet | None) -> dict[str, Any]:
    """The figures as JSON: ``ranks``, and ``set`` where several were matched."""
    found: dict[str, Any] = {"ranks": [_rank(one) for one in ranks]}
    if rank_set is not None:
        found["set"] = _set(rank_set)
    return found


def _rank(one: RankAnalysis) -> dict[str, Any]:
    operators = one.operators
    return {
        "file": one.file_name,
        "num_bytes": one.num_bytes,
        "num_events": one.num_events,
        "rank": one.rank,
        "world_size": one.world_size,
        "iterations_by": one.iterations_by,
        "num_iterations": len(one.iterations) if one.marked else 0,
        "median_step_s": one.median_step_s if one.marked else None,
        "devices": [_device(device, one.iterations) for device in one.devices],
        "operators": {
            "on_device": operators.on_device,
            "device_s": operators.device_s,
            "unassigned_s": operators.unassigned_s,
            "num_unassigned": operators.num_unassigned,
            "num_groups": len(operators.groups),
            "dearest": [
                {
                    "name": one_line(group.name)[:_NAME_CHARACTERS],
                    "direction": group.direction,
                    "input_dims": group.dims.decode("utf-8", "replace")[:500],
                    "num_calls": len(group.times_s),
                    "total_s": group.total_s,
                }
                for group in operators.groups[:_NUM_OPERATORS]
            ],
        },
        "collectives": _collectives(one.calls),
        "peak_memory_bytes": {str(key): value for key, value in one.peak_memory_bytes.items()},
    }


def _device(one: DeviceTimes, iterations: Sequence[Iteration]) -> dict[str, Any]:
    return {
        "device": one.device,
        "name": one_line(one.name),
        "num_kernels": one.num_kernels,
        "num_streams": one.num_streams,
        "after_last_iteration_s": one.after_s,
        "iterations": [
            {
                "number": iteration.number,
                "span_s": share.span_s,
                "compute_s": share.compute_s,
                "communication_s": share.communication_s,
                "exposed_communication_s": share.exposed_s,
                "overlap_s": share.overlap_s,
                "idle_s": share.idle_s,
                "copy_only_s": share.copy_only_s,
            }
            for iteration, share in zip(iterations, one.shares, strict=True)
        ],
    }


def _collectives(calls: Sequence[CollectiveCall]) -> list[dict[str, Any]]:
    """By kind, size, type and group: how often, and how long on this rank."""
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for call in calls:
        key = (call.name, call.num_bytes, call.dtype, call.group_size, call.group)
        groups[key].append(call.time_s)
    return [
        {
            "name": one_line(key[0]),
            "bytes": key[1],
            "dtype": key[2],
            "group_size": key[3],
            "group": None if key[4] is None else one_line(key[4]),
            "num_calls": len(times_s),
            "median_s": statistics.median(times_s),
            "total_s": sum(times_s),
        }
        for key, times_s in groups.items()
    ]


def _set(one: RankSet) -> dict[str, Any]:
    return {
        "ranks": list(one.ranks),
        "world_size": one.world_size,
        "slowest_rank": one.slowest_rank,
        "held_up_s": {str(rank): seconds for rank, seconds in one.held_up_s.items()},
        "clock_errors_s": {str(rank): seconds for rank, seconds in one.clock_errors_s.items()},
        "unmatched": list(one.unmatched),
        "collectives": [
            {
                "name": call.name,
                "iteration": call.iteration,
                "index": call.index,
                "bytes": call.num_bytes,
                "dtype": call.dtype,
                "group_size": call.group_size,
                "num_ranks": len(call.ranks),
                "sizes_equal_on_all_ranks": call.sizes_are_equal,
                "sizes_agree": call.sizes_agree,
                "transfer_s": call.transfer_s,
                "longest_s": max(call.times_s),
                "start_skew_s": call.start_skew_s,
                "end_skew_s": call.end_skew_s,
                "last_rank": call.last_rank,
            }
            for call in one.collectives
        ],
    }


def lines_of(ranks: Sequence[RankAnalysis], rank_set: RankSet | None) -> tuple[str, ...]:
    """The figures for a person, some dozens of lines at most."""
    lines: list[str] = []
    for one in ranks[:_MAX_ROWS]:
        lines += _rank_lines(one, with_operators=len(ranks) == 1)
    if len(ranks) > _MAX_ROWS:
        lines.append(f"... and {len(ranks) - _MAX_ROWS} more ranks; see --json")
    if rank_set is not None:
        lines += _set_lines(rank_set)
    return tuple(lines)


def _rank_lines(one: RankAnalysis, *, with_operators: bool) -> list[str]:
    who = "rank not said" if one.rank is None else f"rank {one.rank}"
    if one.world_size is not None:
        who += f" of {one.world_size}"
    steps = f"{len(one.iterations)} iterations ({one.iterations_by})"
    if not one.marked:
        steps = "no iterations marked, the whole trace as one"
    lines = [f"{who}: {one.num_events} events, {steps}, median {format_seconds(one.median_step_s)}"]
    for device in one.devices:
        name = "host" if device.device < 0 else f"device {device.device}"
        if device.name:
            name += f" ({one_line(device.name)})"
        late = f"; {format_seconds(device.after_s)} after the last" if device.after_s > 0 else ""
        lines.append(f"  {name}: {_shares_text(device.shares)}{late}")
    if with_operators:
        lines += _operator_lines(one)
        lines += [f"  {text}" for text in _collective_lines(one)]
    return lines


def _shares_text(shares: Sequence[Shares]) -> str:
    """Of all iterations together."""
    span_s = sum(one.span_s for one in shares) or 1.0
    parts = {
        "compute": sum(one.compute_s for one in shares),
        "communication": sum(one.communication_s for one in shares),
        "overlap": sum(one.overlap_s for one in shares),
        "idle": sum(one.idle_s for one in shares),
    }
    return ", ".join(f"{name} {seconds / span_s:.1%}" for name, seconds in parts.items())


def _operator_lines(one: RankAnalysis) -> list[str]:
    operators = one.operators
    if not operators.groups or not operators.device_s:
        return []
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for group in operators.groups:
        total = totals[group.name, group.direction]
        total[0] += group.total_s
        total[1] += len(group.times_s)
    dearest = sorted(totals.items(), key=lambda item: -item[1][0])[:_NUM_SHOWN]
    return [
        f"  {one_line(name)[:_NAME_CHARACTERS]} ({direction}): {int(count)} calls, "
        f"{format_seconds(seconds)}, {seconds / operators.device_s:.1%}"
        for (name, direction), (seconds, count) in dearest
    ]


def _collective_lines(one: RankAnalysis) -> list[str]:
    rows = sorted(_collectives(one.calls), key=lambda row: -row["total_s"])
    lines = []
    for row in rows[:_NUM_SHOWN]:
        size = "size not said" if row["bytes"] is None else format_bytes(row["bytes"])
        group = "group not said" if row["group_size"] is None else f"{row['group_size']} ranks"
        lines.append(
            f"{row['name']} {size} {row['dtype'] or 'type not said'}, {group}: "
            f"{row['num_calls']} calls, median {format_seconds(row['median_s'])}"
        )
    return lines


def _set_lines(one: RankSet) -> list[str]:
    lines = [f"{len(one.collectives)} collectives matched over {len(one.ranks)} ranks"]
    disagree = sum(call.sizes_agree is False for call in one.collectives)
    if disagree:
        lines.append(f"  sizes DISAGREE between ranks for {disagree} of them")
    for call in one.collectives[:_MAX_ROWS]:
        size = "size not said" if call.num_bytes is None else format_bytes(call.num_bytes)
        lines.append(
            f"  {call.name} {size} {call.dtype or 'type not said'}: transfer "
            f"{format_seconds(call.transfer_s)}, start skew {format_seconds(call.start_skew_s)}, "
            f"ends within {format_seconds(call.end_skew_s)}, last was rank {call.last_rank}"
        )
    if len(one.collectives) > _MAX_ROWS:
        lines.append(f"  ... and {len(one.collectives) - _MAX_ROWS} more; see --json")
    if one.slowest_rank is not None and one.collectives:
        waited = format_seconds(one.held_up_s[one.slowest_rank])
        last = sum(call.last_rank == one.slowest_rank for call in one.collectives)
        lines.append(
            f"  the others waited longest for rank {one.slowest_rank}: {waited} in all, last in "
            f"{last} of {len(one.collectives)}"
        )
    lines += [f"  not matched {text}" for text in one.unmatched[:_NUM_SHOWN]]
    return lines
