"""Nothing of what a split leaves out is fitted on, and what the host adds is told from the rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.gnn_cost.operators.overheads import host_overhead_s
from meshwright.gnn_cost.operators.splits import (
    are_siblings,
    held_out_shapes,
    largest_shapes,
    leave_one_device_out,
    leave_one_source_out,
    subsample,
    take,
)
from tests.gnn_cost.measured import made, products

_GPUS = ("a100_sxm_40gb", "a100_sxm_80gb", "h100_sxm_80gb", "v100_sxm2_32gb")


def _graphs(count: int = 40):  # type: ignore[no-untyped-def]
    rows = [
        {
            **{"gpu": _GPUS[place % 4], "source": f"source{place % 3}", "time_s": 1e-3 + place},
            **{"m": 64 + place, "n": 8 * (1 + place % 10), "k": 16},
            "direction": "bwd" if place % 2 else "fwd",
        }
        for place in range(count)
    ]
    return made(*({**row, "time_s": 1e-3} for row in rows)).graphs


def test_taking_keeps_rows_edges_and_labels_together() -> None:
    graphs = _graphs()
    taken = take(graphs, np.array([1, 2, 5]))

    assert [0, 0, 1, 2, 2] == taken.graph.tolist()
    assert [[0, 3], [1, 4]] == taken.work.edges.tolist()
    assert graphs.labels["gpu"][[1, 2, 5]].tolist() == taken.labels["gpu"].tolist()
    assert graphs.work.dims[graphs.graph == 5].tolist() == taken.work.dims[3:].tolist()


def test_a_device_left_out_is_not_fitted_on() -> None:
    graphs = _graphs()
    splits = list(leave_one_device_out(graphs, fewest=5))

    assert 4 == len(splits)
    for split in splits:
        tested = set(graphs.device[split.test])
        assert 1 == len(tested)
        assert not tested & set(graphs.device[split.train])
        assert (split.train | split.test).all()


def test_with_siblings_no_other_memory_of_the_same_chip_is_fitted_on() -> None:
    graphs = _graphs()
    split = next(leave_one_device_out(graphs, fewest=5, with_siblings=True))
    fitted = {graphs.devices[place].name for place in graphs.device[split.train]}

    assert {"h100-sxm-80gb", "v100-sxm2-32gb"} == fitted
    by_name = {device.name: device for device in graphs.devices}
    assert are_siblings(by_name["a100-sxm-40gb"], by_name["a100-sxm-80gb"])
    assert not are_siblings(by_name["a100-sxm-40gb"], by_name["h100-sxm-80gb"])


def test_held_out_shapes_go_with_all_their_rows() -> None:
    graphs = _graphs()
    split = held_out_shapes(graphs, rng=np.random.default_rng(0), fraction=0.3)
    shapes = graphs.labels["shape"]

    assert 3 == len(set(shapes[split.test]))
    assert not set(shapes[split.test]) & set(shapes[split.train])


def test_the_largest_are_left_out() -> None:
    graphs = _graphs()
    split = largest_shapes(graphs, fraction=0.25)
    flop = np.bincount(graphs.graph, graphs.work.flop)
    forward = graphs.labels["direction"] == "fwd"

    assert split.test.any()
    assert flop[split.test & forward].min() > flop[split.train & forward].max()


def test_a_source_left_out_is_not_fitted_on() -> None:
    graphs = _graphs()
    splits = list(leave_one_source_out(graphs))

    assert ["without source: source0", "without source: source1", "without source: source2"] == [
        split.name for split in splits
    ]
    assert not (splits[0].train & splits[0].test).any()


def test_subsamples_are_drawn_from_a_seed_and_no_group_is_larger() -> None:
    graphs = _graphs()
    one, two = (
        subsample(graphs, most=4, by=("gpu", "direction"), rng=np.random.default_rng(3))
        for _ in range(2)
    )
    _, counts = np.unique(one.labels["gpu"], return_counts=True)

    assert 4 == counts.max()
    assert one.labels["shape"].tolist() == two.labels["shape"].tolist()


def test_what_the_host_adds_is_found_without_the_device_left_out() -> None:
    """30 us on every launch; the H100's rows may not be looked at."""
    graphs = products(count=300, seed=0, overhead_s=30e-6, source="neusight")
    names = np.array([device.name for device in graphs.devices])
    seen = names[graphs.device] != "h100-sxm-80gb"
    hidden = replace(graphs, time_s=np.where(seen, graphs.time_s, 1.0))
    overhead_s = host_overhead_s(hidden, seen=seen)

    assert pytest.approx(30e-6, rel=0.1) == overhead_s[~seen].max()
    assert pytest.approx(30e-6, rel=0.1) == overhead_s[seen].min()


def test_work_that_hides_its_launch_holds_nothing_of_the_host() -> None:
    """The queue of launches runs ahead where one wait ends many of them: the longer one shows."""
    graphs = products(count=300, seed=0, source="sailor_ops")
    launched = replace(graphs, time_s=np.maximum(graphs.time_s, 30e-6))

    overhead_s = host_overhead_s(launched, seen=np.ones(300, np.bool_))

    assert 0.0 == overhead_s[graphs.time_s > 60e-6].max()
    is_short = graphs.time_s < 6e-6
    assert is_short.any()
    assert pytest.approx((30e-6 - graphs.time_s)[is_short], abs=4e-6) == overhead_s[is_short]


def test_times_of_what_is_left_out_change_nothing_of_its_overhead() -> None:
    graphs = products(count=300, seed=0, overhead_s=30e-6, source="sailor_ops")
    seen = graphs.device == graphs.device[0]
    longer = replace(graphs, time_s=np.where(seen, graphs.time_s, 10 * graphs.time_s))

    expected = host_overhead_s(graphs, seen=seen)

    assert expected.tolist() == host_overhead_s(longer, seen=seen).tolist()


def test_times_of_kernels_hold_nothing_of_the_host() -> None:
    graphs = products(count=60, seed=0)

    assert 0.0 == host_overhead_s(graphs, seen=np.ones(60, np.bool_)).max()


def test_an_unknown_table_of_slow_launches_is_told_by_its_smallest_times() -> None:
    graphs = products(count=300, seed=0, overhead_s=40e-6, source="somebody")

    assert pytest.approx(40e-6, rel=0.1) == np.median(
        host_overhead_s(graphs, seen=np.ones(300, np.bool_))
    )
