"""Instances as files: arrays as safetensors, the rest as JSON in its header.

``rows`` (K, D), ``row_features`` (K, FR), ``time_s`` (K, S, ..., C), ``node_type``,
``node_features``, ``edge_index``, ``edge_type``; sizes as in ``env.instance``.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from meshwright.env.instance import ROW_DECISIONS, ROW_FEATURES, Instance, InstanceGraph, Variant
from meshwright.env.rooms import StoredRooms
from meshwright.errors import BadRequest
from meshwright.plans.plan import Recompute

__all__ = ["read_instance", "write_instance"]

_VERSION = "1"
_ARRAYS = (
    "rows",
    "row_features",
    "time_s",
    "node_type",
    "node_features",
    "edge_index",
    "edge_type",
)


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    variants: tuple[tuple[str, Recompute], ...]
    group_classes: tuple[tuple[int, ...], ...]
    num_cuts: int
    reference_s: float
    row_features: tuple[str, ...]


def write_instance(instance: Instance, path: Path) -> None:
    """Write ``instance``, all its rooms with it, to ``path`` at once or not at all."""
    header = _Header(
        name=instance.name,
        variants=tuple((item.sharding, item.recompute) for item in instance.variants),
        group_classes=instance.group_classes,
        num_cuts=instance.num_cuts,
        reference_s=instance.reference_s,
        row_features=ROW_FEATURES,
    )
    times = [instance.rooms.open(row).time_s for row in range(len(instance.rows))]
    arrays = {
        "rows": instance.rows,
        "row_features": instance.row_features,
        "time_s": np.stack(times),
        "node_type": instance.graph.node_type,
        "node_features": instance.graph.node_features,
        "edge_index": instance.graph.edge_index,
        "edge_type": instance.graph.edge_type,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        part,
        metadata={"instance": msgspec.json.encode(header).decode(), "version": _VERSION},
    )
    part.replace(path)


def read_instance(path: Path) -> Instance:
    """The instance in ``path``, with stored rooms.

    Raises:
        BadRequest: it is no such file, of another version, or its parts do not fit together.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        if metadata.get("version") != _VERSION:
            raise BadRequest(f"{path}: version {metadata.get('version')!r}; make it again")
        header = msgspec.json.decode(metadata.get("instance", ""), type=_Header)
        instance = _instance(header, arrays)
    except (SafetensorError, OSError, ValueError) as error:
        # msgspec's errors are ValueErrors too.
        raise BadRequest(f"{path}: no instance ({error}); make it again") from error
    return instance


def _instance(header: _Header, arrays: dict[str, np.ndarray]) -> Instance:
    rows, times = arrays["rows"], arrays["time_s"]
    shape = (len(header.variants),) * len(header.group_classes) + (header.num_cuts,)
    expected = {
        "rows": (len(rows), len(ROW_DECISIONS)),
        "row_features": (len(rows), len(ROW_FEATURES)),
        "time_s": (len(rows), *shape),
    }
    for name, wanted in expected.items():
        if arrays[name].shape != wanted:
            raise ValueError(f"{name} has shape {arrays[name].shape}, not {wanted}")
    if header.row_features != ROW_FEATURES:
        raise ValueError("other features of rows than this version has")
    return Instance(
        name=header.name,
        rows=rows,
        row_features=arrays["row_features"],
        variants=tuple(Variant(sharding=name, recompute=kind) for name, kind in header.variants),
        group_classes=header.group_classes,
        num_cuts=header.num_cuts,
        graph=InstanceGraph(
            node_type=arrays["node_type"],
            node_features=arrays["node_features"],
            edge_index=arrays["edge_index"],
            edge_type=arrays["edge_type"],
        ),
        reference_s=header.reference_s,
        rooms=StoredRooms(list(times)),
    )
