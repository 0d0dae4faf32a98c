"""A deep graph with its runs of equal units cut to a few, and how the two belong together.

A *stretch* is a part of a run (``periods``) whose units are also treated alike (one color). Of a
stretch of more than ``NUM_KEPT`` units the short graph keeps

    0, 1, 2, n - 2, n - 1

and unit 2, the template, stands for 2 to n - 3. What read the unit behind unit 2 reads unit n - 2
now, and what read the unit before n - 2 reads unit 2. An analysis of the short graph is one of the
deep graph in which each item is what the item of the short graph that stands for it is
(``Short.whole_analysis``): equal units share the dimension classes inside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.graph.dimensions import DimensionLabels
from meshwright.graph.factors import FactorAnalysis
from meshwright.graph.opgraph import Arg, GraphInput, GraphOutput, Op, OpGraph, Phase, Ref
from meshwright.graph.periods import NUM_KEPT, TEMPLATE, IntArray, Items, Periods, Run
from meshwright.graph.segments import Segment, Segmentation

__all__ = ["Copies", "Short", "shortened"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Items of the deep graph and the items of the short graph that stand for them.

    Stretches are numbered over all runs; units are counted from the start of their stretch. Items
    outside the repeating units of stretches that were cut have stretch -1.
    """

    source: IntArray
    """(deep,) item of the short graph that stands for it."""
    stretch: IntArray
    """(deep,)"""
    unit: IntArray
    """(deep,)"""
    short_stretch: IntArray
    """(short,)"""
    short_unit: IntArray
    """(short,) 1 to ``NUM_KEPT`` - 2."""
    slot: IntArray
    """(short,)"""
    kept: IntArray
    """(short,) item of the deep graph that it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Short:
    """A short graph that stands for a deep one."""

    graph: OpGraph
    segmentation: Segmentation
    num_units: tuple[int, ...]
    """Units kept of every run. Short graphs with equal numbers differ in names alone."""
    stretches: tuple[int, ...]
    """Units of every stretch that was cut."""
    segments: Copies
    ops: Copies
    values: Copies
    inputs: Copies
    outputs: Copies

    def whole_analysis(self, analysis: FactorAnalysis, graph: OpGraph) -> FactorAnalysis:
        """The analysis of the deep ``graph`` that follows from that of the short one."""
        return _picked_analysis(analysis, graph, self.ops.source, self.values.source)

    def whole_labels(self, labels: DimensionLabels) -> DimensionLabels:
        """The labels of the deep graph that follow from those of the short one."""
        return _picked_labels(labels, self.segments.source, self.ops.source)

    def own_analysis(self, whole: FactorAnalysis) -> FactorAnalysis:
        """The part of the deep graph's analysis that is about the short one."""
        return _picked_analysis(whole, self.graph, self.ops.kept, self.values.kept)

    def own_labels(self, whole: DimensionLabels) -> DimensionLabels:
        """The part of the deep graph's labels that is about the short one."""
        return _picked_labels(whole, self.segments.kept, self.ops.kept)


def _picked_analysis(
    analysis: FactorAnalysis, graph: OpGraph, ops: IntArray, values: IntArray
) -> FactorAnalysis:
    """The analysis of ``graph``, whose operators and values are those picked from another's."""
    picked = ops.tolist()
    return replace(
        analysis,
        graph=graph,
        rules=tuple(map(analysis.rules.__getitem__, picked)),
        leaf_factors=tuple(map(analysis.leaf_factors.__getitem__, picked)),
        value_dims=tuple(map(analysis.value_dims.__getitem__, values.tolist())),
    )


def _picked_labels(labels: DimensionLabels, segments: IntArray, ops: IntArray) -> DimensionLabels:
    """Labels of the picked segments and operators."""
    experts = np.isin(ops, sorted(labels.expert_operators))
    return replace(
        labels,
        by_segment=tuple(map(labels.by_segment.__getitem__, segments.tolist())),
        expert_operators=frozenset(np.flatnonzero(experts).tolist()),
    )


def shortened(
    graph: OpGraph,
    segmentation: Segmentation,
    periods: Periods,
    colors: Sequence[object],
    known: dict[tuple[int, ...], Short] | None = None,
) -> Short | None:
    """``graph`` with every stretch cut to ``NUM_KEPT`` units; ``None`` where there is none to cut.

    Args:
        graph: the deep graph.
        segmentation: its segments.
        periods: its runs.
        colors: of each segment; equal for segments that are treated alike.
        known: earlier answers for this graph by ``num_units``, whose graph serves again, with the
            names it has; a new one is added.
    """
    cuts = _Cuts(periods.runs, colors)
    if not cuts.stretches:
        return None
    num_units = tuple(len(kept) for kept in cuts.kept)
    cutting = _Cutting(graph, segmentation, periods, cuts)
    if known is None or num_units not in known:
        short = cutting.result(num_units)
        if known is not None:
            known[num_units] = short
        return short
    return cutting.like(known[num_units])


class _Cuts:
    """Which units of every run are kept, and what stands for the others; arrays (units,)."""

    def __init__(self, runs: Sequence[Run], colors: Sequence[object]) -> None:
        self.stretches: list[int] = []
        self.kept: list[IntArray] = []
        """Units that are kept."""
        self.image: list[IntArray] = []
        """The kept unit that stands for each."""
        self.stretch: list[IntArray] = []
        """Its number, -1 where a stretch is too short to be cut."""
        self.local: list[IntArray] = []
        """Number of the unit in its stretch."""
        for run in runs:
            first, period = run.first_segment, run.period
            of_unit = [
                tuple(colors[first + unit * period : first + (unit + 1) * period])
                for unit in range(run.num_units)
            ]
            self._cut_run(of_unit)

    def _cut_run(self, colors: Sequence[object]) -> None:
        count = len(colors)
        image, local = np.arange(count), np.zeros(count, dtype=np.int64)
        stretch = np.full(count, -1, dtype=np.int64)
        start = 0
        while start < count:
            stop = start + 1
            while stop < count and colors[stop] == colors[start]:
                stop += 1
            local[start:stop] = np.arange(stop - start)
            if stop - start > NUM_KEPT:
                stretch[start:stop] = len(self.stretches)
                self.stretches.append(stop - start)
                image[start + TEMPLATE + 1 : stop - 2] = start + TEMPLATE
            start = stop
        self.kept.append(np.unique(image))
        self.image.append(image)
        self.stretch.append(stretch)
        self.local.append(local)


class _Cutting:
    """One call of ``shortened``."""

    def __init__(
        self, graph: OpGraph, segmentation: Segmentation, periods: Periods, cuts: _Cuts
    ) -> None:
        self.graph, self.segmentation = graph, segmentation
        self.periods, self.cuts = periods, cuts
        self.place = [
            np.searchsorted(kept, np.arange(len(image)))
            for kept, image in zip(cuts.kept, cuts.image, strict=True)
        ]
        self.segments = self._copies(periods.segments)
        self.ops = self._copies(periods.ops)
        self.values = self._copies(periods.values)
        self.inputs = self._copies(periods.inputs)
        self.outputs = self._copies(periods.outputs)

    def like(self, other: Short) -> Short:
        """With the graph of ``other``, whose runs have as many units."""
        return replace(
            other,
            stretches=tuple(self.cuts.stretches),
            segments=self.segments,
            ops=self.ops,
            values=self.values,
            inputs=self.inputs,
            outputs=self.outputs,
        )

    def result(self, num_units: tuple[int, ...]) -> Short:
        segment_of_op = self._segment_of_op()
        graph = self._graph()
        return Short(
            graph=graph,
            segmentation=self._segmentation(graph, segment_of_op),
            num_units=num_units,
            stretches=tuple(self.cuts.stretches),
            segments=self.segments,
            ops=self.ops,
            values=self.values,
            inputs=self.inputs,
            outputs=self.outputs,
        )

    def _copies(self, items: Items) -> Copies:
        image = np.arange(len(items.run))
        stretch, unit = np.full(len(image), -1), np.zeros(len(image), dtype=np.int64)
        place = np.zeros(len(image), dtype=np.int64)
        for number in range(len(self.periods.runs)):
            mine = np.flatnonzero(items.run == number)
            units = items.unit[mine]
            image[mine] = items.at[number][items.slot[mine], self.cuts.image[number][units]]
            numbers = self.cuts.stretch[number]
            local = self.cuts.local[number][units]
            length = np.array([*self.cuts.stretches, 0])[numbers[units]]
            # The ends of a stretch are like no other unit.
            inner = (numbers[units] >= 0) & (local > 0) & (local < length - 1)
            stretch[mine] = np.where(inner, numbers[units], -1)
            unit[mine] = np.where(inner, local, 0)
            late = inner & (local == length - 2)
            place[mine] = np.where(late, NUM_KEPT - 2, np.where(inner, local, 0))
        is_kept = image == np.arange(len(image))
        kept = np.flatnonzero(is_kept)
        return Copies(
            source=(np.cumsum(is_kept) - 1)[image],
            stretch=stretch,
            unit=unit,
            short_stretch=stretch[kept],
            short_unit=place[kept],
            slot=items.slot[kept],
            kept=kept,
        )

    def _read(
        self, sort: Items, readers: IntArray, items: IntArray, among: Items, copies: Copies
    ) -> IntArray:
        """New numbers of ``items`` that kept ``readers``, of one ``sort``, name; -1 stays.

        An item so many units away is now what is so many kept units away.
        """
        found = items.copy()
        run = np.where(items >= 0, among.run[items], -1)
        for number in range(len(self.periods.runs)):
            mine = np.flatnonzero((run == number) & (sort.run[readers] == number))
            units = sort.unit[readers[mine]]
            away = among.unit[items[mine]] - units
            kept = self.cuts.kept[number]
            target = kept[np.clip(self.place[number][units] + away, 0, len(kept) - 1)]
            found[mine] = among.at[number][among.slot[items[mine]], target]
        return np.where(items >= 0, copies.source[found], -1)

    def _segment_of_op(self) -> list[int]:
        ops, kept = self.periods.ops, self.ops.kept
        old = np.array(self.segmentation.segment_of_op, dtype=np.int64)[kept]
        new: list[int] = self._read(ops, kept, old, self.periods.segments, self.segments).tolist()
        return new

    def _graph(self) -> OpGraph:
        old = [self.graph.ops[index] for index in self.ops.kept.tolist()]
        kept, sort, values = self.ops.kept, self.periods.ops, self.periods.values
        lists = [op.inputs for op in old]
        readers = np.repeat(kept, [len(read) for read in lists])
        refs = np.array([value for read in lists for value in read], dtype=np.int64)
        new_refs = iter(self._read(sort, readers, refs, values, self.values).tolist())
        origin = np.array([-1 if op.forward_op is None else op.forward_op for op in old])
        forward = self._read(sort, kept, origin, sort, self.ops).tolist()
        new_value = self.values.source.tolist()
        ops = tuple(
            self._rewritten(op, index, new_refs, forward[index], new_value)
            for index, op in enumerate(old)
        )
        inputs = [self.graph.inputs[index] for index in self.inputs.kept.tolist()]
        outputs = [self.graph.outputs[index] for index in self.outputs.kept.tolist()]
        left = np.array([item.value for item in outputs], dtype=np.int64)
        left = self._read(self.periods.outputs, self.outputs.kept, left, values, self.values)
        return OpGraph(
            name=self.graph.name,
            values=tuple(self.graph.values[value] for value in self.values.kept.tolist()),
            inputs=tuple(
                GraphInput(
                    value=new_value[item.value],
                    name=item.name,
                    role=item.role,
                    tied_names=item.tied_names,
                )
                for item in inputs
            ),
            ops=ops,
            outputs=tuple(
                GraphOutput(value=value, name=item.name, role=item.role)
                for item, value in zip(outputs, left.tolist(), strict=True)
            ),
        )

    @staticmethod
    def _rewritten(
        op: Op, index: int, refs: Iterator[int], forward_op: int, new_value: list[int]
    ) -> Op:
        return Op(
            index=index,
            target=op.target,
            args=tuple([_with_refs(arg, refs) for arg in op.args]),
            kwargs=tuple([(name, _with_refs(arg, refs)) for name, arg in op.kwargs]),
            outputs=tuple([None if v is None else new_value[v] for v in op.outputs]),
            phase=op.phase,
            forward_op=None if forward_op < 0 else forward_op,
            module_path=op.module_path,
            source=op.source,
            flop=op.flop,
            bytes_read=op.bytes_read,
            bytes_written=op.bytes_written,
        )

    def _segmentation(self, graph: OpGraph, segment_of_op: list[int]) -> Segmentation:
        forward: list[list[int]] = [[] for _ in self.segments.kept]
        backward: list[list[int]] = [[] for _ in self.segments.kept]
        for op, segment in zip(graph.ops, segment_of_op, strict=True):
            if segment >= 0:
                (forward if op.phase == Phase.FORWARD else backward)[segment].append(op.index)
        return Segmentation(
            segments=tuple(
                Segment(
                    index=index,
                    segment_class=self.segmentation.segments[old].segment_class,
                    name=self.segmentation.segments[old].name,
                    forward_ops=tuple(forward[index]),
                    backward_ops=tuple(backward[index]),
                )
                for index, old in enumerate(self.segments.kept.tolist())
            ),
            segment_of_op=tuple(segment_of_op),
        )


def _with_refs(arg: Arg, refs: Iterator[int]) -> Arg:
    """``arg`` with the values it names replaced, left to right."""
    if isinstance(arg, Ref):
        return Ref(next(refs))
    if isinstance(arg, tuple):
        return tuple([_with_refs(item, refs) for item in arg])
    return arg
