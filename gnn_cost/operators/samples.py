"""Measured operators, from tables and from Records, as graphs to learn from.

A table is what ``docs`` describe for operators: a row each, with sizes, dtype, device, source and
median time. Rows that cannot teach what an operator costs are left out, each with its reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from meshwright.cluster.catalog import find_device
from meshwright.cluster.model import Device
from meshwright.cost.work import DTYPES, OperatorWork
from meshwright.errors import BadClusterFile, BadRequest
from meshwright.gnn_cost.features import ELEMENT_BYTES, MATRIX_FAMILIES
from meshwright.gnn_cost.operators.overheads import graph_ideal_time_s
from meshwright.gnn_cost.operators.rows import Rows, Sizes, needed_columns, rows_of
from meshwright.gnn_cost.operators.sources import reasons_of_sources
from meshwright.gnn_cost.operators.splits import take
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.records import Record

__all__ = [
    "SIZE_NOT_STATED",
    "OperatorSamples",
    "catalog_device",
    "measured_operators",
    "operator_columns",
    "operators_of_records",
    "read_operator_table",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Columns = Mapping[str, NDArray[Any]]

_DTYPES = {
    "fp64": "float64",
    "fp32": "float32",
    "tf32": "tf32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8": "float8_e4m3fn",
    "nvfp4": "nvfp4",
}
_TEXT = ("source", "gpu", "op", "direction", "dtype", "extra")
_NUMBERS = (
    *("b", "m", "n", "k", "seq_q", "seq_k", "heads", "kv_heads", "head_dim", "causal"),
    *("experts", "top_k", "tp", "time_s"),
)
_FROM_EXTRA = (
    *("ep", "window", "channels_in", "channels_out", "groups", "height", "width", "kernel"),
    *("stride", "numel", "num_tensors"),
)
_SHAPES = {
    "linear": ("n", "k"),
    "lm_head": ("n", "k"),
    "bmm": ("m", "n", "k"),
    "grouped_mm": ("experts", "n", "k"),
    "sdpa": ("heads", "kv_heads", "head_dim"),
    "moe_ffn": ("n", "k", "experts", "top_k"),
    "conv2d": ("channels_in", "channels_out", "kernel", "stride", "height"),
}
"""What a model fixes: rows that differ in batch and length only are of one shape. Of all other
operators it is the length of a row."""

_KINDS = {
    "linear": ("linear", "lm_head"),
    "bmm": ("bmm",),
    "attention": ("sdpa",),
    "moe": ("moe_ffn", "grouped_mm"),
    "norm": ("layer_norm", "rms_norm", "batch_norm"),
    "softmax": ("softmax", "cross_entropy"),
    "embedding": ("embedding",),
    "convolution": ("conv2d",),
    "optimizer": ("adam", "adamw", "sgd"),
}
_KIND_OF_OP = {op: kind for kind, ops in _KINDS.items() for op in ops}

_TRUE_DEVICES = {("sailor_ops", "rtx_2080"): "rtx_2080_ti", ("sailor", "rtx_2080"): "rtx_2080_ti"}
"""What a source must have measured. An RTX 2080 cannot move 488 GB/s over 448 GB/s of memory, as
the element-wise rows do, nor reach 60 TFLOP/s."""

_FASTEST = 0.8
"""Of the least time by data sheet; what took less was not what the row says."""

_DIRECTIONS = ("fwd", "bwd", "update")
SIZE_NOT_STATED = "is not stated"
"""Why a row is left out, after the name of the column."""

_MOST_ELEMENTS = 2.0**40

_LONGEST_S = 10.0
"""Where one source of published tables cuts off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSamples:
    """What came of R rows."""

    graphs: MeasuredGraphs
    rows: IntArray
    """(G,) row each graph was made from."""
    reasons: NDArray[np.str_]
    """(R,) why a row was left out; empty where it was not."""

    @property
    def dropped(self) -> dict[str, int]:
        """Rows left out, by reason, most first."""
        return dict(Counter(str(reason) for reason in self.reasons if reason).most_common())


def read_operator_table(path: Path) -> dict[str, NDArray[Any]]:
    """Columns of a Parquet or CSV table of operators, by name; see ``operator_columns``.

    Raises:
        BadRequest: no such file, no such format, or columns are missing.
    """
    try:
        is_csv = path.suffix == ".csv"
        table = pa.csv.read_csv(path) if is_csv else pa.parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        said = str(error).splitlines()[0]
        raise BadRequest(f"{path}: {said}; give a .parquet or .csv table of operators") from error
    return operator_columns({name: table[name] for name in table.column_names}, where=str(path))


def operator_columns(
    table: Mapping[str, NDArray[Any] | pa.ChunkedArray | pa.Array], *, where: str
) -> dict[str, NDArray[Any]]:
    """Columns as arrays: numbers as float64 with NaN for nothing, text with "" for nothing.

    Raises:
        BadRequest: a column that every table needs is missing, or holds something else.
    """
    wanted = ("gpu", "op", "dtype", "time_s")
    missing = [name for name in wanted if name not in table]
    if missing:
        raise BadRequest(f"{where}: no column {', '.join(missing)}; a table of operators has them")
    length = len(table["op"])
    columns: dict[str, NDArray[Any]] = {}
    for name in _TEXT:
        filler = np.full(length, "fwd" if name == "direction" else "")
        columns[name] = _text(table[name]) if name in table else filler
    for name in _NUMBERS:
        try:
            columns[name] = _numbers(table[name]) if name in table else np.full(length, np.nan)
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise BadRequest(f"{where}: column {name} holds no numbers; correct it") from error
    return columns


def _text(column: NDArray[Any] | pa.ChunkedArray | pa.Array) -> NDArray[np.str_]:
    values = column if isinstance(column, np.ndarray) else column.cast(pa.string()).to_numpy()
    return np.array(["" if value is None else str(value) for value in values.tolist()], np.str_)


def _numbers(column: NDArray[Any] | pa.ChunkedArray | pa.Array) -> FloatArray:
    if isinstance(column, np.ndarray):
        return column.astype(np.float64)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    values: FloatArray = column.cast(pa.float64()).fill_null(np.nan).to_numpy()
    return values


def catalog_device(name: str) -> Device | None:
    """The catalog's device of a name as tables have it; ``None`` where it has none."""
    try:
        return find_device(name, where="table").device
    except BadClusterFile:
        return None


def operators_of_records(
    records: Sequence[Record], *, find: Callable[[str], Device | None] = catalog_device
) -> OperatorSamples:
    """Graphs of the Records of operators that were run eagerly; other Records are left out.

    Args:
        records: any.
        find: from the name of a device to what is known of it.
    """
    eager = [
        record
        for record in records
        if record.kind == "operator" and not record.extra.get("compiled")
    ]
    table: dict[str, NDArray[Any]] = {
        "gpu": np.array([record.device for record in eager], np.str_),
        "op": np.array([record.name for record in eager], np.str_),
        "source": np.array([record.source or "measured here" for record in eager], np.str_),
        "time_s": np.array([record.median for record in eager], np.float64),
        "extra": np.array([json.dumps(record.extra) for record in eager], np.str_),
    }
    for name, usual in (("direction", "fwd"), ("dtype", "")):
        table[name] = np.array([str(record.extra.get(name, usual)) for record in eager], np.str_)
    for name in _NUMBERS[:-1]:
        table[name] = np.array([_number(record.extra.get(name)) for record in eager], np.float64)
    return measured_operators(operator_columns(table, where="Records"), find=find)


def measured_operators(
    columns: Columns, *, find: Callable[[str], Device | None] = catalog_device
) -> OperatorSamples:
    """Graphs of all rows that teach something; ``rest_s`` is 0.

    Args:
        columns: of ``operator_columns``, R rows.
        find: from the name of a device to what is known of it.
    """
    extra, is_damaged = _extra_of(columns["extra"])
    sizes = {name: columns[name] for name in _NUMBERS}
    sizes |= {name: _extra_numbers(extra, name) for name in _FROM_EXTRA}
    sizes["ep"] = np.where(np.isfinite(sizes["ep"]), sizes["ep"], 1.0)
    sizes["tp"] = np.where(np.isfinite(sizes["tp"]), sizes["tp"], 1.0)
    sizes["causal"] = np.nan_to_num(sizes["causal"])
    gpu = columns["gpu"].astype("U64")
    for (source, stated), true in _TRUE_DEVICES.items():
        gpu[(columns["source"] == source) & (gpu == stated)] = true
    columns = {**columns, "gpu": gpu}
    names = np.unique(gpu)
    devices = {str(name): find(str(name)) for name in names}
    reasons = _reasons(columns, sizes, extra, devices)
    reasons[is_damaged] = "extra is no JSON object"
    parts: list[tuple[IntArray, Rows, IntArray]] = []
    kept = np.flatnonzero(reasons == "")
    groups = np.char.add(np.char.add(columns["op"][kept], "|"), columns["direction"][kept])
    one = columns["source"][kept] == "sailor_ops"
    groups = np.char.add(groups, np.where(one, "|one", "|"))
    dtype = _dtype_of(columns["dtype"])
    for group in np.unique(groups):
        rows = kept[groups == group]
        op, direction, how = str(group).split("|")
        of = Sizes(
            columns={name: values[rows] for name, values in sizes.items()},
            element_bytes=ELEMENT_BYTES[dtype[rows]],
            is_one_product=how == "one" and op == "linear",
        )
        parts.append((rows, rows_of(op, direction, of), dtype[rows]))
    known = {name: device for name, device in devices.items() if device is not None}
    graphs, order = _graphs(parts, columns, known)
    graphs = replace(graphs, labels=_labels(columns, sizes, extra, order))
    if not graphs.count:
        return OperatorSamples(graphs=graphs, rows=order, reasons=reasons)
    is_possible = graphs.time_s >= _FASTEST * graph_ideal_time_s(graphs)
    reasons[order[~is_possible]] = "faster than the device's data sheet allows"
    elements = graphs.work.num_bytes / ELEMENT_BYTES[graphs.work.dtype]
    reasons[order[graphs.graph[elements > _MOST_ELEMENTS]]] = "over 2**40 elements"
    is_kept = reasons[order] == ""
    return OperatorSamples(graphs=take(graphs, is_kept), rows=order[is_kept], reasons=reasons)


def _reasons(
    columns: Columns,
    sizes: Mapping[str, FloatArray],
    extra: Sequence[Mapping[str, Any]],
    devices: Mapping[str, Device | None],
) -> NDArray[np.str_]:
    """Why each row is left out; the last that holds is said."""
    reasons = np.full(len(columns["op"]), "", dtype="U64")
    direction = columns["direction"]
    group = np.char.add(np.char.add(columns["op"], "|"), direction)
    for name in np.unique(group):
        here = np.flatnonzero(group == name)
        op, _, way = str(name).rpartition("|")
        needed = needed_columns(op, way)
        if needed is None:
            reasons[here] = "no rule for this operator and direction"
            continue
        for one in reversed(needed):
            for is_bad, why in _bad_sizes(sizes[one][here]):
                reasons[here[is_bad]] = f"{one} {why}"
    reasons[~np.isin(direction, _DIRECTIONS)] = "direction is not fwd, bwd or update"
    reasons[direction == ""] = "direction is not stated"
    unknown = [name for name, device in devices.items() if device is None]
    reasons[np.isin(columns["gpu"], unknown)] = "device not in the catalog"
    dtype = columns["dtype"]
    reasons[~np.isin(dtype, list(_DTYPES))] = "element types are mixed or not stated"
    for is_other, why in reasons_of_sources(columns, sizes, extra):
        reasons[is_other] = why
    routing = np.array([str(one.get("dist", "balanced")) for one in extra], np.str_)
    reasons[routing != "balanced"] = "routing is not balanced"
    variant = np.array([str(one.get("variant", "")) for one in extra], np.str_)
    to_host = np.isin(variant, ("host_to_device", "device_to_host"))
    reasons[to_host] = "runs over the link to the host"
    time_s = columns["time_s"]
    reasons[~(np.isfinite(time_s) & (time_s > 0))] = "no time"
    reasons[time_s >= _LONGEST_S] = "time was cut off"
    return reasons


def _bad_sizes(values: FloatArray) -> tuple[tuple[NDArray[np.bool_], str], ...]:
    """Masks of values that are no size, and why."""
    return (
        (np.isnan(values), SIZE_NOT_STATED),
        (np.isfinite(values) & (values != np.floor(values)), "is no whole number"),
        (values < 1, "is below 1"),
        (values > _MOST_ELEMENTS, "is over 2**40"),
    )


def _dtype_of(names: NDArray[np.str_]) -> IntArray:
    found, inverse = np.unique(names, return_inverse=True)
    places = [DTYPES.index(_DTYPES.get(str(name), "float32")) for name in found]
    return np.array(places, np.int64)[inverse]


def _graphs(
    parts: Sequence[tuple[IntArray, Rows, IntArray]],
    columns: Columns,
    devices: Mapping[str, Device],
) -> tuple[MeasuredGraphs, IntArray]:
    """Graphs in the order of the rows they are from, and these rows; without labels."""
    order = np.sort(np.concatenate([np.zeros(0, np.int64), *(rows for rows, _, _ in parts)]))
    position = np.zeros(len(columns["op"]), np.int64)
    count = np.zeros(len(order), np.int64)
    position[order] = np.arange(len(order))
    for rows, made, _ in parts:
        count[position[rows]] = len(made.family)
    first = np.concatenate([[0], np.cumsum(count)])
    total = int(first[-1])
    family, dtype = np.zeros(total, np.int64), np.zeros(total, np.int64)
    dims, flop, num_bytes = np.ones((total, 4)), np.zeros(total), np.zeros(total)
    edges, edge_kind = [np.zeros((2, 0), np.int64)], [np.zeros(0, np.int64)]
    for rows, made, of in parts:
        start = first[position[rows]]
        for place, one in enumerate(made.family):
            at = start + place
            family[at], dtype[at] = one, _arithmetic(of, is_matrix=one in MATRIX_FAMILIES)
            dims[at], flop[at] = made.dims[:, place], made.flop[:, place]
            num_bytes[at] = made.num_bytes[:, place]
        for head, tail, kind in made.edges:
            edges.append(np.stack([start + head, start + tail]))
            edge_kind.append(np.full(len(start), int(kind), np.int64))
    names = sorted(devices)
    place_of = {name: place for place, name in enumerate(names)}
    device = np.array([place_of[str(name)] for name in columns["gpu"][order]], np.int64)
    work = OperatorWork(
        family=family,
        dtype=dtype,
        dims=dims,
        flop=flop,
        num_bytes=num_bytes,
        edges=np.concatenate(edges, axis=1),
        edge_kind=np.concatenate(edge_kind),
    )
    graphs = MeasuredGraphs(
        work=work,
        graph=np.repeat(np.arange(len(order)), count),
        weight=np.ones(total),
        devices=tuple(devices[name] for name in names),
        device=device,
        time_s=columns["time_s"][order].astype(np.float64),
        rest_s=np.zeros(len(order)),
        labels={},
    )
    return graphs, order


def _arithmetic(dtype: IntArray, *, is_matrix: bool) -> IntArray:
    """What a row computes in: beside the products, nothing is in tf32 or in less than 16 bits."""
    if is_matrix:
        return dtype
    wide = np.where(ELEMENT_BYTES[dtype] < 2, DTYPES.index("bfloat16"), dtype)
    return np.where(wide == DTYPES.index("tf32"), DTYPES.index("float32"), wide)


def _labels(
    columns: Columns,
    sizes: Mapping[str, FloatArray],
    extra: Sequence[Mapping[str, Any]],
    order: IntArray,
) -> dict[str, NDArray[np.str_]]:
    labels = {name: columns[name][order] for name in _TEXT if name != "extra"}
    op = labels["op"]
    labels["kind"] = np.array([_KIND_OF_OP.get(str(one), "element-wise") for one in op], np.str_)
    labels["kernel"] = np.array([str(extra[row].get("kernel", "")) for row in order], np.str_)
    shape = np.full(len(order), "", dtype="U96")
    for one in np.unique(op):
        here = np.flatnonzero(op == one)
        parts = [sizes[name][order[here]] for name in _SHAPES.get(str(one), ("n",))]
        table = np.nan_to_num(np.stack(parts, axis=1)).astype(np.int64)
        found, inverse = np.unique(table, axis=0, return_inverse=True)
        texts = np.array([f"{one} {'x'.join(map(str, row))}" for row in found], dtype="U96")
        shape[here] = texts[inverse.reshape(-1)]
    labels["shape"] = shape
    return labels


def _extra_of(texts: NDArray[np.str_]) -> tuple[list[dict[str, Any]], NDArray[np.bool_]]:
    """The small JSON of each row, and where text is none and counts as empty."""
    found, inverse = np.unique(texts, return_inverse=True)
    read = [_object(str(text)) for text in found]
    is_damaged = np.array([one is None for one in read], np.bool_)
    return [read[place] or {} for place in inverse], is_damaged[inverse]


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _extra_numbers(extra: Sequence[Mapping[str, Any]], name: str) -> FloatArray:
    return np.array([_number(one.get(name)) for one in extra], np.float64)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else np.nan
