"""The columns of a graph for every way of sharding it, by way of short graphs where it has any.

Two things are remembered. Short graphs with equal numbers of units in every run are the same but
for names, wherever stretches begin; so they are cut out and analyzed once. And what a short graph
is like under one way of sharding is found once for all lengths of its stretches. For a mixture
whose stretches begin elsewhere all that remains is to write the columns out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshwright.cost.columns import Columns
from meshwright.cost.op_work import OpWorks
from meshwright.cost.unfold import NotPeriodic, unfolded
from meshwright.cost.write_columns import columns_of
from meshwright.graph.dimensions import DimensionLabels
from meshwright.graph.factors import FactorAnalysis
from meshwright.graph.periods import Periods
from meshwright.graph.segments import Segmentation
from meshwright.graph.shorten import Short, shortened
from meshwright.spmd.nodes import ShardedGraph
from meshwright.spmd.sharded import shard_graph
from meshwright.spmd.wanted import Shard

__all__ = ["Tabulator", "Ways"]

_MAX_SHARDED = 32
"""Sharded short graphs that are remembered unless told; one of GPT-3 takes a few MB."""

Ways = tuple[tuple[object, ...], tuple[int, ...]]
"""Distinct ways of sharding a segment, and for each segment which one it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Analyzed:
    """A short graph ready for sharding."""

    analysis: FactorAnalysis
    segmentation: Segmentation
    labels: DimensionLabels
    works: OpWorks


def _analyzed(
    analysis: FactorAnalysis, segmentation: Segmentation, labels: DimensionLabels
) -> _Analyzed:
    return _Analyzed(
        analysis=analysis,
        segmentation=segmentation,
        labels=labels,
        works=OpWorks(analysis.graph),
    )


class Tabulator:
    """Makes columns for one graph."""

    def __init__(
        self,
        analysis: FactorAnalysis,
        segmentation: Segmentation,
        labels: DimensionLabels,
        periods: Periods | None,
        *,
        max_sharded: int = _MAX_SHARDED,
    ) -> None:
        """From a graph's analysis; without ``periods`` every graph is sharded whole."""
        self.whole = _analyzed(analysis, segmentation, labels)
        self.periods = periods
        self._classes = [segment.segment_class for segment in segmentation.segments]
        self._max_sharded = max_sharded
        self._analyzed: dict[tuple[int, ...], _Analyzed] = {}
        self._sharded: OrderedDict[tuple[object, ...], tuple[ShardedGraph, Columns]] = OrderedDict()
        self._known: dict[tuple[int, ...], Short] = {}

    def columns(
        self,
        ways: Ways,
        shards: Sequence[Shard],
        sizes: Mapping[str, int],
        operators: Sequence[Mapping[int, Shard]],
        *,
        scaled: bool,
    ) -> Columns:
        """The columns of one way of sharding every segment.

        Args:
            ways: which segments have equal ``shards`` and ``operators``.
            shards: as ``shard_graph`` takes them.
            sizes: devices along each mesh axis, and ``micro``.
            operators: as ``shard_graph`` takes them.
            scaled: as ``columns_of`` takes it.

        Raises:
            PlanRefused: the graph cannot be sharded so.
        """
        short = self.short(ways)
        if short is not None:
            sharded, columns = self._short_columns(short, ways, shards, sizes, operators, scaled)
            try:
                return unfolded(columns, sharded, short, self.whole.analysis.graph)
            except NotPeriodic:
                pass
        sharded = _shard(self.whole, shards, sizes, operators)
        return columns_of(sharded, scaled=scaled, works=self.whole.works)

    def short(self, ways: Ways) -> Short | None:
        """The short graph for segments sharded in these ways; ``None`` where there is none."""
        if self.periods is None:
            return None
        colors = list(zip(self._classes, ways[1], strict=True))
        return shortened(
            self.whole.analysis.graph, self.whole.segmentation, self.periods, colors, self._known
        )

    def _short_columns(
        self,
        short: Short,
        ways: Ways,
        shards: Sequence[Shard],
        sizes: Mapping[str, int],
        operators: Sequence[Mapping[int, Shard]],
        scaled: bool,
    ) -> tuple[ShardedGraph, Columns]:
        kept = short.segments.kept.tolist()
        key = (
            short.num_units,
            ways[0],
            tuple([ways[1][segment] for segment in kept]),
            tuple(sorted(sizes.items())),
            scaled,
        )
        if key in self._sharded:
            self._sharded.move_to_end(key)
            return self._sharded[key]
        if short.num_units not in self._analyzed:
            self._analyzed[short.num_units] = _analyzed(
                short.own_analysis(self.whole.analysis),
                short.segmentation,
                short.own_labels(self.whole.labels),
            )
        found = self._analyzed[short.num_units]
        sharded = _shard(
            found,
            [shards[segment] for segment in kept],
            sizes,
            [operators[segment] for segment in kept] if operators else (),
        )
        columns = columns_of(sharded, scaled=scaled, works=found.works)
        self._sharded[key] = (sharded, columns)
        if len(self._sharded) > self._max_sharded:
            self._sharded.popitem(last=False)
        return self._sharded[key]


def _shard(
    found: _Analyzed,
    shards: Sequence[Shard],
    sizes: Mapping[str, int],
    operators: Sequence[Mapping[int, Shard]],
) -> ShardedGraph:
    return shard_graph(
        found.analysis,
        found.segmentation,
        found.labels,
        shards=shards,
        operators=operators,
        axis_sizes=sizes,
    )
