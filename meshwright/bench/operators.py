"""Measured operators and collectives beside predictions, as columns: tables have 1e6 rows.

Times are those of the device alone. What a table's rows hold beside (a launch from the host) shows
as error of short rows, so rows of 100 us and more are judged apart too (``long``).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from meshwright.bench.collectives import collective_rows, price_collectives
from meshwright.bench.pricings import fitted_on, pricing_of
from meshwright.bench.run_table import MAX_TABLE_BYTES
from meshwright.cost.pricing import Pricing
from meshwright.errors import BadRequest
from meshwright.gnn_cost.baselines.roofline import PlainRoofline
from meshwright.gnn_cost.operators.samples import (
    SIZE_NOT_STATED,
    measured_operators,
    operator_columns,
)
from meshwright.gnn_cost.operators.splits import take
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.profiling.traces.sources import printable
from meshwright.profiling.traces.tables import read_cells
from meshwright.strict_json import one_line
from meshwright.units import format_seconds

__all__ = ["OperatorsEvaluation", "evaluate_operators"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_Priced = tuple[FloatArray, FloatArray]
"""Seconds and trust."""

_AT_ONCE = 20_000
"""Operators priced together: some hundred MB."""
_SAY_EVERY_S = 5.0
_TEXTS = ("source", "gpu", "op", "direction", "dtype", "extra", "fabric", "collective")
_OPERATORS = ("gpu", "op", "dtype", "time_s")
_COLLECTIVES = ("gpu", "collective", "group_size", "bytes", "time_s")
_LONGEST_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorsEvaluation:
    """M rows that were predicted, of R."""

    table: str
    """Of the file, fit to print."""
    sha256: str
    what: str
    """``operators`` or ``collectives``."""
    num_rows: int
    row: IntArray
    """(M,) from 0."""
    measured_s: FloatArray
    """(M,)"""
    predicted_s: Mapping[str, FloatArray]
    """(M,) by cost model; the first is the one that is judged."""
    trust: Mapping[str, FloatArray]
    """(M,) by cost model: how much of a prediction is learned, 0 to 1."""
    names: Mapping[str, str]
    """What each cost model calls itself."""
    in_sample: frozenset[str]
    """Cost models that were fitted on this very table."""
    labels: Mapping[str, NDArray[np.str_]]
    """(M,) by name: ``op``, ``direction``, ``dtype``, ``gpu``, ``source``..."""
    skipped: Mapping[str, tuple[int, int]]
    """Reason to the number of rows left out for it, and the first of them, from 1."""
    seconds: float


def evaluate_operators(
    path: str | os.PathLike[str], names: Sequence[str], *, tell: Callable[[str], None]
) -> OperatorsEvaluation:
    """Predict every row of a table of operators, or of collectives.

    Args:
        path: CSV (gzipped too) or Parquet; its columns say which of both it is.
        names: of cost models, as ``pricing_of`` takes them.
        tell: called with a line now and then.

    Raises:
        BadRequest: it cannot be read, or is neither; there is no such cost model.
    """
    start_s = time.monotonic()
    cells, sha256 = read_cells(path, max_bytes=MAX_TABLE_BYTES)
    where = printable(path)
    is_operators = all(name in cells.column_names for name in _OPERATORS)
    if not is_operators and not all(name in cells.column_names for name in _COLLECTIVES):
        raise BadRequest(
            f"{where}: neither a table of operators, with {', '.join(_OPERATORS)}, nor one of "
            f"collectives, with {', '.join(_COLLECTIVES)}; it has "
            f"{one_line(', '.join(cells.column_names))}"
        )
    pricings = {name: pricing_of(name) for name in names}
    columns = {name: _column(cells[name], name) for name in cells.column_names}
    no_numbers = {
        name: _is_text(cells[name], values)
        for name, values in columns.items()
        if name not in _TEXTS
    }
    tell(f"{cells.num_rows:,} rows read in {format_seconds(time.monotonic() - start_s)}")
    judge = _judge_operators if is_operators else _judge_collectives
    rows, time_s, labels, reasons, priced = judge(columns, where, pricings, tell)
    good = np.ones(len(rows), dtype=bool)
    for predicted_s, _ in priced.values():
        good &= np.isfinite(predicted_s) & (predicted_s > 0)
    reasons[rows[~good]] = "the prediction is no time"
    for name, is_text in no_numbers.items():
        reasons[is_text & (reasons == f"{name} {SIZE_NOT_STATED}")] = f"{name} is no number"
    return OperatorsEvaluation(
        table=where,
        sha256=sha256,
        what="operators" if is_operators else "collectives",
        num_rows=cells.num_rows,
        row=rows[good],
        measured_s=time_s[good],
        predicted_s={name: found[0][good] for name, found in priced.items()},
        trust={name: found[1][good] for name, found in priced.items()},
        names={name: pricing.label for name, pricing in pricings.items()},
        in_sample=fitted_on(sha256, pricings),
        labels={name: values[good] for name, values in labels.items()},
        skipped=_counted(reasons),
        seconds=time.monotonic() - start_s,
    )


_Judged = tuple[
    IntArray, FloatArray, dict[str, NDArray[np.str_]], NDArray[np.object_], dict[str, _Priced]
]
"""Rows, measured seconds, labels, reasons of all rows of the table, prices by cost model."""
_Columns = Mapping[str, NDArray[np.str_] | FloatArray]


def _judge_operators(
    columns: _Columns,
    where: str,
    pricings: Mapping[str, Pricing],
    tell: Callable[[str], None],
) -> _Judged:
    known = {name: values for name, values in columns.items() if name != "tp" or len(values)}
    time_s = np.asarray(known["time_s"], dtype=np.float64)
    samples = measured_operators(operator_columns(known, where=where))
    graphs = samples.graphs
    reasons = samples.reasons.astype(object)
    reasons[~np.isfinite(time_s) | (time_s <= 0)] = "no time"
    priced = {
        name: _operators(graphs, pricing, name=name, tell=tell)
        for name, pricing in pricings.items()
    }
    labels = {
        name: graphs.labels[name] for name in ("op", "kind", "direction", "dtype", "gpu", "source")
    }
    return samples.rows, graphs.time_s, labels, reasons, priced


def _operators(
    graphs: MeasuredGraphs, pricing: Pricing, *, name: str, tell: Callable[[str], None]
) -> _Priced:
    """Seconds of the graphs, and how much of each is learned."""
    time_s, trust = np.zeros(graphs.count), np.zeros(graphs.count)
    pricer = pricing.operators
    start_s = said_s = time.monotonic()
    num_done = 0
    for device in np.unique(graphs.device):
        mine = np.flatnonzero(graphs.device == device)
        for first in range(0, len(mine), _AT_ONCE):
            places = mine[first : first + _AT_ONCE]
            part = take(graphs, places)
            if pricer is None:
                time_s[places] = PlainRoofline().predict(part)
            else:
                found = pricer.operators(part.work, graphs.devices[device])
                spent_s = part.weight * found.time_s
                total_s = np.bincount(part.graph, spent_s, part.count)
                learned_s = np.bincount(part.graph, spent_s * found.trust, part.count)
                time_s[places] = total_s + part.rest_s
                trust[places] = learned_s / np.maximum(total_s, 1e-30)
            num_done += len(places)
            now_s = time.monotonic()
            if now_s - said_s > _SAY_EVERY_S:
                said_s = now_s
                left_s = (now_s - start_s) / num_done * (graphs.count - num_done)
                tell(
                    f"{name}: {num_done:,} of {graphs.count:,} priced, about "
                    f"{format_seconds(left_s)} left"
                )
    return time_s, trust


def _judge_collectives(
    columns: _Columns,
    where: str,
    pricings: Mapping[str, Pricing],
    tell: Callable[[str], None],
) -> _Judged:
    del where, tell  # seconds for all
    rows = collective_rows(columns)
    time_s = np.asarray(columns["time_s"], dtype=np.float64)
    reasons = rows.reasons
    reasons[~(np.isfinite(time_s) & (time_s > 0))] = "no time"
    reasons[time_s > _LONGEST_S] = "time was cut off: over a day"
    kept = np.flatnonzero(reasons == "")
    num_bytes = np.asarray(columns["bytes"], dtype=np.float64)[kept]
    priced = {
        name: price_collectives(rows.groups, rows.group[kept], num_bytes, pricing)
        for name, pricing in pricings.items()
    }
    labels = {name: values[kept] for name, values in rows.labels.items()}
    return kept, time_s[kept], labels, reasons, priced


def _column(cells: pa.ChunkedArray, name: str) -> NDArray[np.str_] | FloatArray:
    """Text with "" or numbers with NaN where a cell is empty or none of its kind."""
    if pa.types.is_dictionary(cells.type):
        cells = cells.cast(cells.type.value_type)
    if name in _TEXTS:
        try:
            cells = pc.utf8_trim_whitespace(cells.cast(pa.string()))
            values = pc.fill_null(cells, "").to_numpy()
        except pa.ArrowException:
            values = np.array(["" if v is None else str(v) for v in cells.to_pylist()], object)
        return np.asarray(values.tolist(), dtype=np.str_)
    if pa.types.is_boolean(cells.type):
        cells = cells.cast(pa.int8())
    if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        return _numbers_of_texts(cells)
    try:
        numbers = cells.cast(pa.float64(), safe=False)
    except pa.ArrowException:
        return np.full(len(cells), np.nan)
    return np.asarray(pc.fill_null(numbers, float("nan")).to_numpy(), dtype=np.float64)


def _is_text(cells: pa.ChunkedArray, values: NDArray[np.str_] | FloatArray) -> NDArray[np.bool_]:
    """Where something stands that was read as no number."""
    is_empty = np.asarray(pc.is_null(cells).to_numpy(), dtype=np.bool_)
    if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        blank = pc.equal(pc.utf8_trim_whitespace(pc.fill_null(cells, "")), "")
        is_empty = np.asarray(blank.to_numpy(), dtype=np.bool_)
    return ~is_empty & np.isnan(np.asarray(values, dtype=np.float64))


def _numbers_of_texts(cells: pa.ChunkedArray) -> FloatArray:
    """Few texts are different, so each is read once."""
    lowered = pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(cells, "")))
    encoded = lowered.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    known = {"true": 1.0, "false": 0.0}
    numbers = np.array([known.get(t, _number(t)) for t in encoded.dictionary.to_pylist()] or [0.0])
    return np.asarray(numbers[encoded.indices.to_numpy()], dtype=np.float64)


def _number(text: str) -> float:
    try:
        return float(text.replace("_", "?"))
    except ValueError:
        return float("nan")


def _counted(reasons: NDArray[np.object_]) -> dict[str, tuple[int, int]]:
    """Number of rows and the first, from 1, of each reason; most first."""
    texts = np.asarray(reasons.tolist(), dtype=np.str_)
    found, first = np.unique(texts, return_index=True)
    firsts = dict(zip(found.tolist(), first.tolist(), strict=True))
    return {
        reason: (count, firsts[reason] + 1)
        for reason, count in Counter(texts.tolist()).most_common()
        if reason
    }
