"""Tuning on steps: nothing moves before it, and messages learn what operators do to each other."""

from __future__ import annotations

import numpy as np
import torch

from meshwright.cluster.catalog import find_device
from meshwright.cost.work import DTYPES, EdgeKind, Family, OperatorWork
from meshwright.gnn_cost.forward import KIND_NAMES, MAX_FACTOR, NUM_SIZES
from meshwright.gnn_cost.network import GraphNetwork
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.gnn_cost.steps.network import StepNetwork, StepRows, network_of

PRICED_S = 1e-3
LAUNCH_S = 2e-3


def tensors(num_members: int = 2) -> dict[str, np.ndarray]:
    """Of an ensemble with random weights."""
    members = []
    for seed in range(num_members):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = GraphNetwork(NUM_SIZES, len(KIND_NAMES), hidden=12, num_rounds=1)
            torch.nn.init.normal_(network.graph_output.weight)
        members.append(network.numpy_tensors())
    return {name: np.stack([one[name] for one in members]) for name in members[0]}


def steps(count: int, *, slower: float = 1.0, waits: bool = False) -> MeasuredGraphs:
    """Graphs of a product and what follows it; those that can be fused took ``slower``."""
    rows = 2 * count
    is_fused = np.arange(count) % 2 == 0
    tokens = np.repeat(2.0 ** (10 + np.arange(count) % 4), 2)
    work = OperatorWork(
        family=np.tile([Family.MATMUL, Family.ELEMENTWISE], count).astype(np.int64),
        dtype=np.full(rows, DTYPES.index("bfloat16")),
        dims=np.column_stack([np.ones(rows), tokens, np.full(rows, 1024.0), np.full(rows, 512.0)]),
        flop=2 * tokens * 1024 * 512,
        num_bytes=2 * tokens * 1024,
        edges=np.array([np.arange(0, rows, 2), np.arange(1, rows, 2)]),
        edge_kind=np.where(is_fused, EdgeKind.FUSION, EdgeKind.ORDER).astype(np.int64),
    )
    operators_s = 2 * PRICED_S * np.where(is_fused, slower, 1.0)
    rest_s = np.full(count, LAUNCH_S if waits else 0.0)
    return MeasuredGraphs(
        work=work,
        graph=np.repeat(np.arange(count), 2),
        weight=np.ones(rows),
        devices=(find_device("a100_sxm_80gb", where="test").device,),
        device=np.zeros(count, np.int64),
        time_s=operators_s + rest_s,
        rest_s=rest_s,
        labels={"source": np.full(count, "made up")},
    )


def rows_of(graphs: MeasuredGraphs) -> StepRows:
    return StepRows.of(
        graphs, row_s=np.full(graphs.work.count, PRICED_S), launch_s=graphs.rest_s.copy()
    )


def test_a_member_is_the_network_it_was() -> None:
    ensemble = tensors()
    for member in range(2):
        again = network_of(ensemble, member).numpy_tensors()
        for name, one in ensemble.items():
            np.testing.assert_allclose(one[member], again[name], rtol=1e-5, err_msg=name)


def test_before_tuning_steps_are_as_priced() -> None:
    graphs = steps(8)
    found_s = StepNetwork(tensors()).predict(rows_of(graphs), np.arange(8))

    np.testing.assert_allclose(2 * PRICED_S, found_s, rtol=1e-5)


def test_messages_tell_fused_from_ordered() -> None:
    """Rows are the same in both; only the kind of edge tells which step is the slower one."""
    graphs = steps(64, slower=1.3)
    rows, chosen = rows_of(graphs), np.arange(48)
    network = StepNetwork(tensors(), num_epochs=40)
    network.fit(rows, chosen)
    others = np.arange(48, 64)
    found_s = network.predict(rows, others)

    np.testing.assert_allclose(graphs.time_s[others], found_s, rtol=0.05)


def test_slower_operators_wait_less_for_launches() -> None:
    """All of what operators got slower by was hidden in waits: the step is as it was."""
    graphs = steps(16, slower=1.3)
    network = StepNetwork(tensors(), num_epochs=40)
    network.fit(rows_of(graphs), np.arange(16))
    network._network.graph_output.requires_grad_(False).weight.zero_()
    network._network.graph_output.bias.zero_()
    waiting = rows_of(steps(16, waits=True))
    found_s = network.predict(waiting, np.arange(16))

    assert (2 * PRICED_S + LAUNCH_S) * 0.99 < found_s.min()
    assert found_s[::2].max() < 2.6 * PRICED_S + LAUNCH_S * 0.9


def test_messages_that_run_away_are_capped() -> None:
    """Of rows and of the graph: no step gets beyond the square of the bound."""
    graphs = steps(8)
    network = StepNetwork(tensors())
    for parameter in network._tuned:
        torch.nn.init.constant_(parameter, 50.0)
    found_s = network.predict(rows_of(graphs), np.arange(8))

    assert np.isfinite(found_s).all()
    assert found_s.max() <= 2 * PRICED_S * MAX_FACTOR**2 * (1 + 1e-5)
    assert found_s.min() >= 2 * PRICED_S / MAX_FACTOR**2 * (1 - 1e-5)
