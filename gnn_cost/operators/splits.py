"""Splits that ask what a cost model is for: devices, shapes and sizes it has not seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.model import Device
from meshwright.cost.work import OperatorWork
from meshwright.gnn_cost.held_out import BoolArray, Split
from meshwright.gnn_cost.samples import MeasuredGraphs

__all__ = [
    "are_siblings",
    "held_out_shapes",
    "largest_shapes",
    "leave_one_device_out",
    "leave_one_source_out",
    "subsample",
    "take",
    "with_rest",
]

IntArray = NDArray[np.int64]

_SIBLING_RATIO = 1.15


def take(graphs: MeasuredGraphs, chosen: BoolArray | IntArray) -> MeasuredGraphs:
    """The graphs chosen, by mask or by ascending places, with their rows and edges."""
    places = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen
    is_kept = np.zeros(graphs.count, np.bool_)
    is_kept[places] = True
    rows = is_kept[graphs.graph]
    new_graph = np.cumsum(is_kept) - 1
    new_row = np.cumsum(rows) - 1
    work = graphs.work
    edges = rows[work.edges[0]] if work.edges.size else np.zeros(0, np.bool_)
    return MeasuredGraphs(
        work=OperatorWork(
            family=work.family[rows],
            dtype=work.dtype[rows],
            dims=work.dims[rows],
            flop=work.flop[rows],
            num_bytes=work.num_bytes[rows],
            edges=new_row[work.edges[:, edges]].reshape(2, -1),
            edge_kind=work.edge_kind[edges],
        ),
        graph=new_graph[graphs.graph[rows]],
        weight=graphs.weight[rows],
        devices=graphs.devices,
        device=graphs.device[is_kept],
        time_s=graphs.time_s[is_kept],
        rest_s=graphs.rest_s[is_kept],
        labels={name: values[is_kept] for name, values in graphs.labels.items()},
    )


def subsample(
    graphs: MeasuredGraphs, *, most: int, by: tuple[str, ...], rng: np.random.Generator
) -> MeasuredGraphs:
    """At most ``most`` graphs of each combination of labels, drawn at random."""
    group = _groups(graphs, *by)
    shuffled = rng.permutation(graphs.count)
    order = shuffled[np.argsort(group[shuffled], kind="stable")]
    _, starts, counts = np.unique(group[order], return_index=True, return_counts=True)
    place_in_group = np.arange(graphs.count) - np.repeat(starts, counts)
    return take(graphs, np.sort(order[place_in_group < most]))


def leave_one_device_out(
    graphs: MeasuredGraphs, *, fewest: int = 50, with_siblings: bool = False
) -> Iterator[Split]:
    """One split for each device with at least ``fewest`` graphs; nothing of it is fitted on.

    Args:
        graphs: to split.
        fewest: graphs to judge by.
        with_siblings: devices of about the same data sheet are not fitted on either.
    """
    for place, device in enumerate(graphs.devices):
        test = graphs.device == place
        if test.sum() < fewest:
            continue
        hidden = [
            other == place or (with_siblings and are_siblings(device, graphs.devices[other]))
            for other in range(len(graphs.devices))
        ]
        kind = "device and siblings" if with_siblings else "device"
        yield Split(
            name=f"without {kind}: {device.name}",
            train=~np.array(hidden)[graphs.device],
            test=test,
        )


def are_siblings(one: Device, other: Device) -> bool:
    """Both have about the same units and peaks in 16 and 32 bits: the same chip, most often.

    Memory may differ, as between the A100s of 40 and 80 GB.
    """
    pairs = [(float(one.num_units), float(other.num_units))]
    for key in ("float32", "float16"):
        pairs.append((one.flop_per_s.get(key, 0.0), other.flop_per_s.get(key, 0.0)))
    return all(max(a, b) <= _SIBLING_RATIO * min(a, b) for a, b in pairs)


def held_out_shapes(
    graphs: MeasuredGraphs, *, rng: np.random.Generator, fraction: float = 0.2
) -> Split:
    """A share of all shapes (label ``shape``) is not fitted on, on any device.

    A shape is what a model fixes, such as the sizes of a weight; all batches and lengths go with
    it.
    """
    shapes, inverse = np.unique(graphs.labels["shape"], return_inverse=True)
    op = np.array([shape.split(" ")[0] for shape in shapes])
    is_out = np.zeros(len(shapes), np.bool_)
    for one in np.unique(op):
        members = np.flatnonzero(op == one)
        is_out[rng.permutation(members)[: round(fraction * len(members))]] = True
    return Split(name="held-out shapes", train=~is_out[inverse], test=is_out[inverse])


def largest_shapes(graphs: MeasuredGraphs, *, fraction: float = 0.2) -> Split:
    """The largest of each operator, by flop (bytes where there are few), are not fitted on."""
    flop = np.bincount(graphs.graph, graphs.work.flop, minlength=graphs.count)
    num_bytes = np.bincount(graphs.graph, graphs.work.num_bytes, minlength=graphs.count)
    size = flop + num_bytes
    test = np.zeros(graphs.count, np.bool_)
    group = _groups(graphs, "op", "direction")
    for one in np.unique(group):
        here = group == one
        test |= here & (size > np.quantile(size[here], 1 - fraction))
    return Split(name="largest shapes", train=~test, test=test)


def leave_one_source_out(graphs: MeasuredGraphs) -> Iterator[Split]:
    """One split for each source."""
    for source in np.unique(graphs.labels["source"]):
        test = graphs.labels["source"] == source
        yield Split(name=f"without source: {source}", train=~test, test=test)


def with_rest(graphs: MeasuredGraphs, rest_s: NDArray[np.float64]) -> MeasuredGraphs:
    """The graphs with other time that is not their operators'."""
    return replace(graphs, rest_s=rest_s)


def _groups(graphs: MeasuredGraphs, *names: str) -> NDArray[np.str_]:
    keys = graphs.labels[names[0]]
    for name in names[1:]:
        keys = np.char.add(np.char.add(keys, "|"), graphs.labels[name])
    return np.asarray(keys)
