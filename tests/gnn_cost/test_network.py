"""The network with PyG and its twin in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost.work import EdgeKind
from meshwright.gnn_cost.features import FEATURE_NAMES, ideal_time_s, operator_features
from meshwright.gnn_cost.forward import (
    KIND_NAMES,
    LOG_MAX_SLOWDOWN,
    LOG_MAX_START_S,
    MAX_FACTOR,
    NUM_SIZES,
    components,
    kind_columns,
    log_times,
    size_columns,
)
from meshwright.gnn_cost.network import GraphInputs, GraphNetwork, directed
from tests.gnn_cost.learned import DEVICES, random_work

NUM_ROWS = 60

Graph = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def random_network(seed: int, *, num_rounds: int = 2, spread: float = 0.4) -> GraphNetwork:
    torch.manual_seed(seed)
    network = GraphNetwork(NUM_SIZES, len(KIND_NAMES), hidden=9, num_rounds=num_rounds)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += spread * torch.randn_like(parameter)
    return network


def inputs_of(graph: Graph) -> GraphInputs:
    features, ideal_s, edges, kinds = graph
    component = components(edges, len(features))
    both, both_kinds = directed(torch.from_numpy(edges), torch.from_numpy(kinds))
    return GraphInputs(
        sizes=torch.from_numpy(size_columns(features)),
        kinds=torch.from_numpy(kind_columns(features)),
        ideal_s=torch.from_numpy(ideal_s.astype(np.float32)),
        edges=both,
        edge_kind=both_kinds,
        component=torch.from_numpy(component),
        num_components=int(component.max()) + 1,
        is_pooled=torch.ones(len(features)),
    )


def example(seed: int, num_edges: int) -> Graph:
    rng = np.random.default_rng(seed)
    work, device_rows = random_work(NUM_ROWS, rng), rng.integers(0, len(DEVICES), NUM_ROWS)
    features = operator_features(work, DEVICES, device_rows)
    ideal_s = ideal_time_s(work, DEVICES, device_rows)
    edges = rng.integers(0, NUM_ROWS // 2, (2, num_edges))
    return features, ideal_s, edges, rng.integers(0, len(EdgeKind), num_edges)


def standardize(network: GraphNetwork, features: np.ndarray, unused: tuple[str, ...] = ()) -> None:
    used = [name not in unused for name in KIND_NAMES]
    network.standardize(size_columns(features), kind_columns(features), used)


def numpy_log_times(network: GraphNetwork, example: Graph) -> np.ndarray:
    features, ideal_s, edges, kinds = example
    return log_times(
        {name: one[None] for name, one in network.numpy_tensors().items()},
        features,
        ideal_s,
        edges_2E=edges,
        edge_kind_E=kinds,
        is_pooled_N=np.ones(NUM_ROWS, np.bool_),
    )[0]


@pytest.mark.parametrize("num_edges", [0, 1, 70])
@pytest.mark.parametrize("num_rounds", [0, 2])
def test_numpy_gives_what_pyg_gives(num_edges: int, num_rounds: int) -> None:
    network, graph = random_network(1, num_rounds=num_rounds), example(2, num_edges)
    standardize(network, graph[0])
    inputs = inputs_of(graph)
    with torch.no_grad():
        log_time, log_factor = network(inputs)
    has_edge = np.zeros(NUM_ROWS, np.bool_)
    has_edge[graph[2].ravel()] = num_rounds > 0
    factor = np.where(has_edge, log_factor.numpy()[inputs.component.numpy()], 0.0)

    found = numpy_log_times(network, graph)

    np.testing.assert_allclose(found, log_time.numpy() + factor, atol=1e-5)


def test_messages_and_factor_start_without_effect() -> None:
    torch.manual_seed(3)
    network = GraphNetwork(NUM_SIZES, len(KIND_NAMES), hidden=9, num_rounds=2)
    features, ideal_s, edges, kinds = example(4, 50)
    alone = (features, ideal_s, np.zeros((2, 0), np.int64), np.zeros(0, np.int64))

    np.testing.assert_allclose(
        numpy_log_times(network, alone),
        numpy_log_times(network, (features, ideal_s, edges, kinds)),
        atol=1e-6,
    )


def test_the_order_of_rows_and_edges_does_not_matter() -> None:
    network, (features, ideal_s, edges, kinds) = random_network(5), example(6, 40)
    rng = np.random.default_rng(0)
    rows, places = rng.permutation(NUM_ROWS), rng.permutation(edges.shape[1])
    moved = np.argsort(rows)[edges][:, places]

    found = numpy_log_times(network, (features[rows], ideal_s[rows], moved, kinds[places]))

    expected = numpy_log_times(network, (features, ideal_s, edges, kinds))[rows]
    np.testing.assert_allclose(expected, found, atol=1e-5)


def test_random_weights_stay_within_the_bounds() -> None:
    graph = example(8, 40)
    for seed in range(20):
        network = random_network(seed, spread=10.0 ** (seed % 4 - 1))

        found = numpy_log_times(network, graph)

        assert np.isfinite(found).all()
        assert (found >= np.log(graph[1] / MAX_FACTOR) - 1e-6).all()
        most = np.logaddexp(np.log(graph[1]) + LOG_MAX_SLOWDOWN, LOG_MAX_START_S)
        assert (found <= np.logaddexp(most, np.log(graph[1])) + np.log(MAX_FACTOR) + 1e-6).all()


def test_unused_and_constant_kinds_count_nothing() -> None:
    network, (features, ideal_s, edges, kinds) = random_network(9), example(10, 30)
    constant, unused = (FEATURE_NAMES.index(one) for one in ("is_64bit", "log_device_units"))
    standardize(network, features, ("log_device_units",))
    expected = numpy_log_times(network, (features, ideal_s, edges, kinds))
    features[:, [constant, unused]] += 100.0

    found = numpy_log_times(network, (features, ideal_s, edges, kinds))

    np.testing.assert_allclose(expected, found, atol=1e-6)


@given(seed=st.integers(0, 2**20), place=st.integers(0, NUM_SIZES - 1), grown=st.floats(0.0, 8.0))
@settings(max_examples=60, deadline=None)
def test_no_weights_predict_a_larger_operator_faster(seed: int, place: int, grown: float) -> None:
    network, (features, ideal_s, edges, kinds) = random_network(seed), example(seed, 0)
    inputs = inputs_of((features, ideal_s, edges, kinds))
    with torch.no_grad():
        before = network(inputs)[0]
        inputs.sizes[:, place] += grown
        after = network(inputs)[0]

    assert (after >= before - 1e-5).all()


def test_components_are_joined_rows() -> None:
    edges = np.array([[5, 1, 3], [1, 0, 4]])

    assert [0, 0, 1, 2, 2, 0] == components(edges, 6).tolist()
    assert [0, 1, 2] == components(np.zeros((2, 0), np.int64), 3).tolist()
    chain = np.stack([np.arange(499), np.arange(1, 500)])
    assert 0 == components(chain[:, ::-1], 500).max()
