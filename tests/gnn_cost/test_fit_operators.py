"""The operators' part: measurements of several places as one set of graphs."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.cluster import parse_cluster
from meshwright.cost.work import EdgeKind
from meshwright.errors import BadRequest
from meshwright.gnn_cost.fitting import FitData
from meshwright.gnn_cost.fitting.operators import OperatorsPart, joined_graphs, read_graphs
from meshwright.gnn_cost.operators.samples import operators_of_records
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.records import Kind, Record, record_of_timing, timing_of


def record(device: str, *, m: int, row_s: float = 1e-6) -> Record:
    """A backward of a linear layer is a graph of two products; it takes ``m * row_s``."""
    return record_of_timing(
        timing_of([m * row_s]),
        kind=Kind.OPERATOR,
        name="linear",
        device=device,
        verb="test",
        method="by formula",
        extra={"direction": "bwd", "dtype": "bf16", "m": m, "n": 512, "k": 256},
    )


def graphs(device: str, *sizes: int) -> MeasuredGraphs:
    return operators_of_records([record(device, m=size) for size in sizes]).graphs


def test_joined_graphs_keep_rows_edges_devices_and_labels_together() -> None:
    one, other = graphs("a100-sxm-80gb", 64, 128), graphs("h100-sxm-80gb", 256)
    both = joined_graphs([one, other, graphs("a100-sxm-80gb", 512)])
    assert both is not None

    assert 4 == both.count
    assert [64e-6, 128e-6, 256e-6, 512e-6] == pytest.approx(both.time_s.tolist())
    assert ["a100-sxm-80gb", "h100-sxm-80gb"] == [device.name for device in both.devices]
    assert [0, 0, 1, 0] == both.device.tolist()
    assert ["a100-sxm-80gb", "a100-sxm-80gb", "h100-sxm-80gb", "a100-sxm-80gb"] == both.labels[
        "device_name"
    ].tolist()
    assert np.array_equal(np.repeat(np.arange(4), 2), both.graph)
    assert np.array_equal(both.graph[both.work.edges[0]], both.graph[both.work.edges[1]])
    assert 2 * one.work.edges.shape[1] == both.work.edges.shape[1]
    assert {*both.work.edge_kind.tolist()} <= {int(kind) for kind in EdgeKind}


def test_no_parts_are_no_graphs() -> None:
    assert None is joined_graphs([])


def test_records_of_a_device_the_catalog_lacks_need_its_cluster() -> None:
    records = tuple(record("cpu", m=size, row_s=1e-3) for size in (64, 128))
    found, dropped = read_graphs(FitData(records=records, cluster=parse_cluster("cpu:2")))

    assert 2 == found.count
    assert {} == dropped
    with pytest.raises(BadRequest, match=r"device not in the catalog \(2\); say by --cluster"):
        read_graphs(FitData(records=records))


def test_without_operators_the_part_is_skipped() -> None:
    assert "no measured operators" in OperatorsPart().reason_to_skip(FitData())
