"""Small tables of made-up operators on devices of the catalog."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.gnn_cost.operators.overheads import graph_ideal_time_s
from meshwright.gnn_cost.operators.samples import (
    OperatorSamples,
    measured_operators,
    operator_columns,
)
from meshwright.gnn_cost.samples import MeasuredGraphs

__all__ = ["made", "products", "table"]


def table(*rows: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Columns of rows; a linear layer on an A100 unless a row says other."""
    usual = {
        "source": "here",
        "gpu": "a100_sxm_80gb",
        "op": "linear",
        "direction": "fwd",
        "dtype": "bf16",
        "extra": "",
        "time_s": 1e-3,
    }
    names = {*usual, *(name for row in rows for name in row)}
    text = {"source", "gpu", "op", "direction", "dtype", "extra"}
    columns = {}
    for name in names:
        filler = usual.get(name, "" if name in text else np.nan)
        values = [row.get(name, filler) for row in rows]
        columns[name] = np.array(values, np.str_ if name in text else np.float64)
    return columns


def made(*rows: dict[str, Any]) -> OperatorSamples:
    """What comes of rows."""
    return measured_operators(operator_columns(table(*rows), where="rows"))


def products(
    *, count: int, seed: int, overhead_s: float = 0.0, source: str = "here"
) -> MeasuredGraphs:
    """Products on three GPUs that take 2 us and the least time over 0.6, and what the host adds."""
    rng = np.random.default_rng(seed)
    rows = []
    for place in range(count):
        m, n, k = (int(2 ** rng.integers(7, 13)) for _ in range(3))
        gpu = ("a100_sxm_80gb", "h100_sxm_80gb", "v100_sxm2_32gb")[place % 3]
        rows.append({"gpu": gpu, "m": m, "n": n, "k": k, "dtype": "fp16", "source": source})
    graphs = made(*rows).graphs
    time_s = overhead_s + 2e-6 + graph_ideal_time_s(graphs) / 0.6
    return made(*({**row, "time_s": t} for row, t in zip(rows, time_s, strict=True))).graphs
