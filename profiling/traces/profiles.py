"""Profiler and execution traces to Records: single ranks, and the ranks of a job together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from meshwright.errors import BadRequest
from meshwright.profiling.traces.chakra import read_chakra_json, read_chakra_protobuf
from meshwright.profiling.traces.columns import RankTrace, read_rank_trace
from meshwright.profiling.traces.execution_graph import ExecutionGraph, graph_import
from meshwright.profiling.traces.execution_trace import read_execution_trace
from meshwright.profiling.traces.formats import (
    ImportOptions,
    TraceFormat,
    TraceImport,
    members_of,
)
from meshwright.profiling.traces.graph_links import link_graph
from meshwright.profiling.traces.rank_analysis import RankAnalysis, analyze
from meshwright.profiling.traces.rank_sets import RankSet, match_ranks
from meshwright.profiling.traces.sources import Member, open_source
from meshwright.profiling.traces.summary import lines_of, summary_of
from meshwright.profiling.traces.trace_records import records_of_ranks
from meshwright.strict_json import one_line

__all__ = ["PROFILE_FORMATS", "import_profiles", "missing_of"]

_MAX_RANKS = 4096

_GRAPH_READERS: dict[TraceFormat, Callable[[Member], ExecutionGraph]] = {
    TraceFormat.EXECUTION_TRACE: read_execution_trace,
    TraceFormat.CHAKRA_JSON: read_chakra_json,
    TraceFormat.CHAKRA_PROTOBUF: read_chakra_protobuf,
}
_LINKED_FORMATS = (TraceFormat.EXECUTION_TRACE,)
PROFILE_FORMATS = (TraceFormat.KINETO, *_GRAPH_READERS)
"""What ``import_profiles`` reads."""


def import_profiles(
    paths: Mapping[TraceFormat, Sequence[Path]], options: ImportOptions
) -> list[TraceImport]:
    """What profiler and execution traces tell.

    Ranks of one job that were traced at the same time come as one import. An execution trace of a
    run whose profiler trace is given too lends it the shapes it lacks.

    Raises:
        BadRequest: one of them is damaged or not what it seemed.
    """
    graphs: list[tuple[TraceFormat, ExecutionGraph]] = []
    left_out: list[str] = []
    for format_, read in _GRAPH_READERS.items():
        for path in paths.get(format_, ()):
            with open_source(path, max_bytes=options.max_bytes) as source:
                graphs += [
                    (format_, read(member)) for member in members_of(source, format_, left_out)
                ]
    linker = _Linker([graph for format_, graph in graphs if format_ in _LINKED_FORMATS])
    ranks: list[RankAnalysis] = []
    sources: dict[str, str] = {}
    for path in paths.get(TraceFormat.KINETO, ()):
        found: list[RankAnalysis] = []
        with open_source(path, max_bytes=options.max_bytes) as source:
            for member in members_of(source, TraceFormat.KINETO, left_out):
                found.append(analyze(linker.linked(read_rank_trace(member))))
                if len(ranks) + len(found) > _MAX_RANKS:
                    raise BadRequest(f"{source.name}: more than {_MAX_RANKS} ranks; give fewer")
            said = f"{source.name} sha256:{source.sha256()}"
        sources |= {rank.file_name: said for rank in found}
        ranks += found
    imports = [_import(job, sources, options) for job in _jobs(ranks)]
    for format_, graph in graphs:
        linked_to, num_linked = linker.links.get(graph.file_name, (None, 0))
        imports.append(
            graph_import(graph, format_=format_, linked_to=linked_to, num_linked=num_linked)
        )
    if left_out and imports:
        first = imports[0]
        imports[0] = replace(
            first,
            summary={**first.summary, "files_left_out": left_out},
            lines=(*first.lines, *(f"left out of the archive: {name}" for name in left_out)),
        )
    return imports


class _Linker:
    """Execution traces that wait for the profiler trace of their run."""

    def __init__(self, graphs: list[ExecutionGraph]) -> None:
        self.links: dict[str, tuple[str, int]] = {}
        """By execution trace: the profiler trace, and how many operators are in both."""
        self._graphs = graphs

    def linked(self, trace: RankTrace) -> RankTrace:
        """``trace`` with what the first execution trace of its run adds to it."""
        for graph in self._graphs:
            found = link_graph(trace, graph)
            if found.num_linked:
                self.links[graph.file_name] = (trace.file_name, found.num_linked)
                self._graphs.remove(graph)
                return found.trace
        return trace


def _jobs(ranks: list[RankAnalysis]) -> list[list[RankAnalysis]]:
    """Ranks that are of one job: same world, different ranks, traced at the same time."""
    jobs: list[list[RankAnalysis]] = []
    by_world: dict[tuple[int | None, str], list[RankAnalysis]] = defaultdict(list)
    for rank in ranks:
        if rank.rank is None or rank.world_size is None or rank.world_size < 2:
            jobs.append([rank])
        else:
            by_world[rank.world_size, rank.backend].append(rank)
    for members in by_world.values():
        sets: list[list[RankAnalysis]] = []
        for rank in sorted(members, key=lambda one: (one.rank or 0, one.file_name)):
            for one in sets:
                if all(_together(rank, other) for other in one):
                    one.append(rank)
                    break
            else:
                sets.append([rank])
        jobs += sets
    return jobs


def _together(one: RankAnalysis, other: RankAnalysis) -> bool:
    return (
        one.rank != other.rank
        and one.zero_ns < other.zero_ns + other.span_ns
        and other.zero_ns < one.zero_ns + one.span_ns
    )


def _import(
    ranks: list[RankAnalysis], sources: dict[str, str], options: ImportOptions
) -> TraceImport:
    rank_set = None
    if len(ranks) > 1:
        origin_ns = ranks[0].zero_ns
        rank_set = match_ranks(
            [rank.rank_calls(origin_ns) for rank in ranks], world_size=ranks[0].world_size
        )
    source = "; ".join(dict.fromkeys(sources[rank.file_name] for rank in ranks))
    return TraceImport(
        format=TraceFormat.KINETO,
        names=tuple(rank.file_name for rank in ranks),
        records=records_of_ranks(ranks, rank_set, model=one_line(options.model), source=source),
        summary=summary_of(ranks, rank_set),
        missing=missing_of(ranks, rank_set, options),
        lines=lines_of(ranks, rank_set),
    )


def missing_of(
    ranks: Sequence[RankAnalysis], rank_set: RankSet | None, options: ImportOptions
) -> tuple[str, ...]:
    """What the traces do not tell, one phrase each."""
    found = [] if options.model else ["the model (name it with --model)"]
    found += ["the precision of the training", "the version of PyTorch"]
    if not all("cuda_driver" in rank.versions for rank in ranks):
        found.append("the version of the driver")
    calls = [call for rank in ranks for call in rank.calls]
    sized = Counter[str]()
    for call in calls:
        sized["the size"] += call.num_bytes is None
        sized["the type"] += call.dtype is None
        if rank_set is None or call.group_size is not None:
            sized["the group"] += call.group_size is None
    found += [
        f"{what} of {count} of {len(calls)} collectives" for what, count in sized.items() if count
    ]
    if any(rank.rank is None for rank in ranks):
        found.append("the rank")
    if not any(device.name for rank in ranks for device in rank.devices if device.device >= 0):
        found.append("the model of the device")
    if not all(rank.marked for rank in ranks):
        found.append("where iterations begin (no ProfilerStep or Optimizer.step marks)")
    if not all(rank.has_shapes for rank in ranks):
        found.append("shapes and types of operators (profile with record_shapes=True)")
    if not any(rank.peak_memory_bytes for rank in ranks):
        found.append("memory (profile with profile_memory=True)")
    if not all(rank.operators.on_device for rank in ranks):
        found.append("work of a device")
    lost = sum(rank.operators.num_unassigned for rank in ranks)
    if lost:
        total = sum(device.num_kernels for rank in ranks for device in rank.devices)
        lost_s = sum(rank.operators.unassigned_s for rank in ranks)
        whole_s = sum(rank.operators.device_s for rank in ranks) or 1.0
        found.append(
            f"the operator of {lost} pieces of device work beside {total} kernels "
            f"({lost_s / whole_s:.1%} of their time)"
        )
    dropped = sum(rank.num_dropped for rank in ranks)
    if dropped:
        found.append(f"the time of {dropped} events, which were left out")
    negative = sum(rank.num_negative for rank in ranks)
    if negative:
        found.append(f"the length of {negative} events, which is negative and counts as 0")
    apart = sum(rank.num_begin_end for rank in ranks)
    if apart:
        found.append(f"lengths of {apart} events that say begin and end apart, which are not read")
    return tuple(found)
