"""Graphs of measured runs in an ``.npz`` file, so that pricing them once serves many fits."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import msgspec
import numpy as np

from meshwright.bench.run_graphs import RunGraphs
from meshwright.bench.runs import MeasuredRun, Skipped
from meshwright.cluster.model import Device
from meshwright.cost.work import OperatorWork
from meshwright.errors import BadRequest
from meshwright.gnn_cost.samples import MeasuredGraphs

__all__ = ["read_run_graphs", "write_run_graphs"]

_WORK = tuple(item.name for item in fields(OperatorWork))
_GRAPHS = ("graph", "weight", "device", "time_s", "rest_s")
_OWN = ("launch_s", "row_s", "features", "num_microbatches")


def write_run_graphs(path: Path, found: RunGraphs, *, priced_by: str) -> None:
    """Write ``found``, with the label of the pricing and table that made it."""
    graphs = found.graphs
    told = {
        "priced_by": priced_by,
        "runs": msgspec.to_builtins(found.runs),
        "skipped": msgspec.to_builtins(found.skipped),
        "devices": msgspec.to_builtins(graphs.devices),
    }
    arrays: dict[str, Any] = {
        "told": np.frombuffer(json.dumps(told).encode(), np.uint8),
        **{f"work.{name}": getattr(graphs.work, name) for name in _WORK},
        **{f"graphs.{name}": getattr(graphs, name) for name in _GRAPHS},
        **{f"labels.{name}": one for name, one in graphs.labels.items()},
        **{f"own.{name}": getattr(found, name) for name in _OWN},
        **{f"breakdown_s.{name}": one for name, one in found.breakdown_s.items()},
    }
    np.savez_compressed(path, **arrays)


def read_run_graphs(path: Path, *, priced_by: str) -> RunGraphs | None:
    """What ``write_run_graphs`` wrote; None where there is no such file or another label.

    Raises:
        BadRequest: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        told = json.loads(arrays["told"].tobytes())
        if told["priced_by"] != priced_by:
            return None

        def part(prefix: str) -> dict[str, np.ndarray]:
            first = f"{prefix}."
            return {
                name.removeprefix(first): one
                for name, one in arrays.items()
                if name.startswith(first)
            }

        graphs = MeasuredGraphs(
            work=OperatorWork(**part("work")),
            devices=msgspec.convert(told["devices"], tuple[Device, ...]),
            labels=part("labels"),
            **part("graphs"),
        )
        return RunGraphs(
            runs=msgspec.convert(told["runs"], tuple[MeasuredRun, ...]),
            skipped=msgspec.convert(told["skipped"], tuple[Skipped, ...]),
            graphs=graphs,
            breakdown_s=part("breakdown_s"),
            **part("own"),
        )
    except (OSError, BadZipFile, KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        raise BadRequest(f"{path}: damaged graphs of runs; remove the file") from error
