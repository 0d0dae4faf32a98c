"""Rows, variants, groups, estimates and graphs of instances made from a context."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.env.build import instance_of
from meshwright.env.estimates import glance, totals_of
from meshwright.env.graph import MAX_EDGES, MAX_NODES, NUM_NODE_FEATURES, padded
from meshwright.env.instance import (
    MAX_CANDIDATES,
    MAX_GROUPS,
    ROW_DECISIONS,
    ROW_FEATURES,
    EdgeType,
    NodeType,
)
from meshwright.env.rows import (
    groups_of,
    num_groups_for,
    rows_of,
    skeleton_of,
    strategies_of,
    thinned,
    variants_of,
)
from meshwright.errors import NoFeasiblePlan
from meshwright.plans.plan import Recompute, ScheduleName
from meshwright.space.pins import Pins
from meshwright.space.skeletons import skeletons
from tests.env.contexts import rooms_of, tiny_context, tiny_instance

COLUMN = {name: place for place, name in enumerate(ROW_DECISIONS)}


def test_rows_cover_every_skeleton_once() -> None:
    context = tiny_context()
    rows = rows_of(context)
    found = {replace(skeleton_of(context, row), schedule=ScheduleName.ONE_F_ONE_B) for row in rows}
    replicated = {
        replace(skeleton, axis_sizes=with_replicas(skeleton.axis_sizes))
        for skeleton in skeletons(context)
    }

    assert set(skeletons(context)) | replicated == found
    assert len(rows) == len(np.unique(rows, axis=0))
    assert rows.tolist() == sorted(rows.tolist())


def with_replicas(axis_sizes: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    sizes = dict(axis_sizes)
    sizes["dp_replicate"] *= sizes["dp_shard"]
    return tuple({**sizes, "dp_shard": 1}.items())


def test_rows_without_zero_shard_nothing_and_single_stages_have_one_schedule() -> None:
    rows = rows_of(tiny_context())
    no_zero = rows[:, COLUMN["zero_stage"]] == 0
    one_stage = rows[:, COLUMN["pp"]] == 1

    assert {1} == set(rows[no_zero, COLUMN["dp_shard"]])
    assert (rows[~no_zero, COLUMN["dp_shard"]] > 1).all()
    assert 1 == len(set(rows[one_stage, COLUMN["schedule"]]))
    assert 2 == len(set(rows[~one_stage, COLUMN["schedule"]]))


def test_pins_are_kept() -> None:
    context = tiny_context(
        pins=Pins(sizes=(("tp", 2),), zero_stage=1, recompute=Recompute.SELECTIVE)
    )
    rows = rows_of(context)
    variants = variants_of(context, rows)

    assert {2} == set(rows[:, COLUMN["tp"]])
    assert {1} == set(rows[:, COLUMN["zero_stage"]])
    assert {Recompute.SELECTIVE} == {variant.recompute for variant in variants}
    assert {"tensor", "tensor+sequence"} == {variant.sharding for variant in variants}


def test_pins_that_leave_nothing_are_refused() -> None:
    context = tiny_context(pins=Pins(sizes=(("tp", 3),)))
    with pytest.raises(NoFeasiblePlan, match="no mesh of this cluster respects what is fixed"):
        instance_of(context, reference=lambda _: 1.0)


def test_rows_without_tensor_parallelism_have_one_way_of_sharding() -> None:
    instance, context = tiny_instance(), tiny_context()
    for row in instance.rows[::10]:
        strategies = strategies_of(context, row, instance.variants)
        names = {strategy.sharding.name for strategy in strategies.values()}

        is_cut = row[COLUMN["tp"]] > 1
        assert names == ({"tensor", "tensor+sequence"} if is_cut else {"plain"})
        assert {row[COLUMN["zero_stage"]]} == {s.zero_stage for s in strategies.values()}


@pytest.mark.parametrize(
    ("expected", "classes", "variants", "cuts", "max_plans"),
    [(4, 9, 3, 4, 1024), (3, 9, 6, 4, 1024), (2, 2, 6, 4, 1024), (1, 9, 6, 4, 10)],
)
def test_groups_are_as_many_as_a_room_allows(
    expected: int, classes: int, variants: int, cuts: int, max_plans: int
) -> None:
    assert expected == num_groups_for(classes, variants, cuts, max_plans)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4])
def test_groups_share_out_the_classes(num_groups: int) -> None:
    """The heaviest own a group each."""
    context = tiny_context()
    count = context.model.segmentation.num_classes
    weight = np.arange(count, dtype=np.float64)
    groups = groups_of(context, weight, num_groups)
    owners = range(count - num_groups, count)

    assert list(range(count)) == sorted(number for group in groups for number in group)
    assert num_groups == len(groups)
    assert [1] * num_groups == [len(set(group) & set(owners)) for group in groups]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(4, 60))
def test_thinning_keeps_the_best_and_some_others(seed: int, max_rows: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.integers(1, 80, size=(200, len(ROW_DECISIONS))), axis=0)
    estimate_s = rng.random(200)
    kept = thinned(rows, estimate_s, max_rows)

    assert int(estimate_s.argmin()) in kept
    assert len(kept) <= max_rows
    assert (np.diff(kept) > 0).all()
    assert all(len(np.unique(rows[kept, d])) <= MAX_CANDIDATES for d in range(rows.shape[1]))


def test_an_instance_says_its_name_and_takes_its_reference() -> None:
    instance = tiny_instance()

    assert "tiny-gpt:16:cpu:4" == instance.name
    assert 0.01 == instance.reference_s
    assert (len(instance.rows), len(ROW_FEATURES)) == instance.row_features.shape
    assert np.isfinite(instance.row_features).all()
    assert 1 <= instance.num_groups <= MAX_GROUPS


def test_fewer_rows_are_some_of_all() -> None:
    context = tiny_context()
    instance = instance_of(context, reference=lambda _: 1.0, name="few", max_rows=20)
    every = {tuple(row) for row in rows_of(context).tolist()}

    assert "few" == instance.name
    assert 20 == len(instance.rows)
    assert {tuple(row) for row in instance.rows.tolist()} < every


def test_a_glance_ranks_rows_much_as_their_prices_do() -> None:
    instance = tiny_instance()
    best_s = np.array([time_s.min() for time_s in rooms_of(instance)])
    seen_s = instance.row_features[:, ROW_FEATURES.index("log_step_s")]
    ranks = np.argsort(np.argsort(best_s)), np.argsort(np.argsort(seen_s))

    assert np.corrcoef(*ranks)[0, 1] > 0.7


def test_a_glance_sees_what_takes_less_memory() -> None:
    """More ZeRO, tensor parallelism and micro-batches each leave more room."""
    context = tiny_context()
    usual = (1, 1, 1, 1, 4, 4, 1, 1, 1)
    others = [(1, 1, 1, 1, 4, 4, 3, 1, 1), (4, 1, 1, 1, 1, 1, 0, 1, 1), (1, 1, 1, 1, 4, 4, 1, 4, 1)]
    found = glance(context, totals_of(context), np.array([usual, *others]))

    assert (found.fullness[1:] < found.fullness[0]).all()
    assert (found.step_s > 0).all()


def test_the_graph_is_whole_and_fits_its_padding() -> None:
    instance = tiny_instance()
    graph = instance.graph
    num_nodes = len(graph.node_type)
    pairs = {(int(a), int(b)) for a, b in graph.edge_index.T}
    arrays = padded(graph)

    assert [NodeType.GROUP] * instance.num_groups == graph.node_type[: instance.num_groups].tolist()
    assert {NodeType.DEVICE, NodeType.LEVEL} == set(graph.node_type[instance.num_groups :])
    assert pairs == {(b, a) for a, b in pairs}
    assert set(range(num_nodes)) == set(graph.edge_index.ravel().tolist())
    assert {EdgeType.NEXT, EdgeType.PREVIOUS} <= set(graph.edge_type.tolist())
    assert (MAX_NODES, NUM_NODE_FEATURES) == arrays["node_features"].shape
    assert (2, MAX_EDGES) == arrays["edge_index"].shape
    assert num_nodes == arrays["num_nodes"] <= MAX_NODES
    assert 5.0 >= np.abs(graph.node_features).max()
