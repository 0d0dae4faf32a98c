"""The network's shapes and symmetries, on graphs and candidates of random numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from meshwright.agents.policy import UNKNOWN, OnInstances, PlacementPolicy, PolicySettings, collate
from meshwright.env.instance import DECISIONS, EdgeType, InstanceGraph, NodeType

NUM_NODE, NUM_STATE, NUM_CANDIDATE = 7, 5, 6


def policy(encoder: str = "graph", seed: int = 0) -> PlacementPolicy:
    settings = PolicySettings(
        num_node_features=NUM_NODE,
        num_state_features=NUM_STATE,
        num_candidate_features=NUM_CANDIDATE,
        hidden=16,
        encoder="graph" if encoder == "graph" else "mlp",
    )
    made = PlacementPolicy(settings, seed=seed)
    with torch.no_grad():  # begins almost uniform; the tests want to see differences
        made.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    return made


def graph(seed: int, num_groups: int = 2, num_others: int = 5) -> InstanceGraph:
    rng = np.random.default_rng(seed)
    count = num_groups + num_others
    kinds = [NodeType.GROUP] * num_groups + [NodeType.DEVICE, NodeType.LEVEL] * num_others
    return InstanceGraph(
        node_type=np.array(kinds[:count], np.int64),
        node_features=rng.normal(size=(count, NUM_NODE)).astype(np.float32),
        edge_index=rng.integers(count, size=(2, 12)),
        edge_type=rng.integers(len(EdgeType), size=12),
    )


def observation(seed: int, count: int = 6, num_candidates: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask_BA = torch.rand(count, num_candidates, generator=generator) < 0.5
    mask_BA[:, 0] = True
    return {
        "decision": torch.arange(count) + DECISIONS.index("group_0") - 2,
        "action_mask": mask_BA,
        "candidates": torch.randn(count, num_candidates, NUM_CANDIDATE, generator=generator),
        "state": torch.randn(count, NUM_STATE, generator=generator),
        "instance": torch.arange(count) % 3,
    }


GRAPHS = [graph(0), graph(1, num_groups=4, num_others=3), graph(2, num_groups=1)]


def answers(given: dict[str, Tensor], encoder: str = "graph") -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return OnInstances(policy(encoder), GRAPHS)(given)


@pytest.mark.parametrize("encoder", ["graph", "mlp"])
@pytest.mark.parametrize("num_candidates", [1, 9, 48])
def test_every_candidate_gets_a_logit_and_every_state_a_value(
    encoder: str, num_candidates: int
) -> None:
    logits, values = answers(observation(0, num_candidates=num_candidates), encoder)

    assert (6, num_candidates) == tuple(logits.shape)
    assert (6,) == tuple(values.shape)
    assert bool(logits.isfinite().all())
    assert bool(values.isfinite().all())


def test_the_order_of_candidates_does_not_matter() -> None:
    given = observation(0)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    moved = given | {key: given[key][:, order] for key in ("candidates", "action_mask")}

    torch.testing.assert_close(answers(given)[0][:, order], answers(moved)[0])
    torch.testing.assert_close(answers(given)[1], answers(moved)[1])


def test_the_order_of_nodes_and_edges_does_not_matter() -> None:
    """Groups stand first and count by their place; the nodes behind them may change places."""
    one = GRAPHS[0]
    rng = np.random.default_rng(0)
    order = np.concatenate([[0, 1], 2 + rng.permutation(5)])
    place = np.argsort(order)
    edges = rng.permutation(12)
    moved = InstanceGraph(
        node_type=one.node_type[order],
        node_features=one.node_features[order],
        edge_index=place[one.edge_index][:, edges],
        edge_type=one.edge_type[edges],
    )
    given = observation(0) | {"instance": torch.zeros(6, dtype=torch.int64)}

    with torch.no_grad():
        expected = OnInstances(policy(), [one])(given)
        found = OnInstances(policy(), [moved])(given)

    torch.testing.assert_close(expected[0], found[0])
    torch.testing.assert_close(expected[1], found[1])


def test_what_is_masked_has_no_influence() -> None:
    given = observation(0)
    noise = torch.where(given["action_mask"].unsqueeze(-1), given["candidates"], 1e6)

    for expected, found in zip(answers(given), answers(given | {"candidates": noise}), strict=True):
        assert torch.equal(expected, found)


def test_instances_planned_together_get_what_they_get_alone() -> None:
    given = observation(0)
    together, _ = answers(given)
    alone = [
        answers({key: item[row : row + 1] for key, item in given.items()})[0] for row in range(6)
    ]

    torch.testing.assert_close(together, torch.cat(alone))


def test_only_the_graph_encoder_sees_edges() -> None:
    without = [replace(one, edge_index=one.edge_index[:, :0], edge_type=one.edge_type[:0])
               for one in GRAPHS]  # fmt: skip
    given = observation(0)

    with torch.no_grad():
        for encoder, is_equal in (("graph", False), ("mlp", True)):
            found = OnInstances(policy(encoder), without)(given)[0]
            assert is_equal == torch.equal(answers(given, encoder)[0], found)


def test_a_decision_about_a_group_sees_that_group_alone() -> None:
    """Group 1 of the first graph: changing another instance's graph changes nothing."""
    given = observation(0) | {"instance": torch.zeros(6, dtype=torch.int64)}
    given["decision"][:] = DECISIONS.index("group_1")
    other = given | {"decision": torch.full((6,), DECISIONS.index("group_0"))}
    batch = collate(GRAPHS[:1])
    made = policy()
    with torch.no_grad():
        encoding = made.encode(batch)
        swapped = replace(encoding, group=encoding.group[:, [1, 0, 2, 3]])
        made.decision.weight[DECISIONS.index("group_0")] = 0
        made.decision.weight[DECISIONS.index("group_1")] = 0
        expected = made.decide(encoding, given["instance"], given)[0]
        found = made.decide(swapped, given["instance"], other)[0]

    assert torch.equal(expected, found)


def test_an_unknown_instance_is_decided_without_its_graph() -> None:
    given = observation(0)
    some = given | {"instance": given["instance"].clone()}
    some["instance"][::2] = UNKNOWN
    every = given | {"instance": torch.full((6,), UNKNOWN)}
    known, mixed, blind = (answers(each)[0] for each in (given, some, every))

    torch.testing.assert_close(known[1::2], mixed[1::2])
    torch.testing.assert_close(blind[::2], mixed[::2])
    assert not torch.equal(known[::2], mixed[::2])


def test_the_kept_encoding_follows_the_weights() -> None:
    given = observation(0)
    kept = OnInstances(policy(), GRAPHS)
    with torch.no_grad():
        before = kept(given)[0]
        again = kept(given)[0]
        for parameter in kept.policy.parameters():
            parameter.add_(0.1)
        after = kept(given)[0]
        expected = OnInstances(kept.policy, GRAPHS)(given)[0]

    assert torch.equal(before, again)
    assert torch.equal(expected, after)
    assert not torch.equal(before, after)


def test_standardized_inputs_forget_their_unit() -> None:
    given = observation(0)
    scaled = given | {"state": given["state"] * 100 + 7, "candidates": given["candidates"] * 3}
    graphs = [replace(one, node_features=one.node_features * 50) for one in GRAPHS]

    with torch.no_grad():
        one, other = OnInstances(policy(), GRAPHS), OnInstances(policy(), graphs)
        one.policy.standardize(collate(GRAPHS), given)
        other.policy.standardize(collate(graphs), scaled)
        expected, found = one(given)[0], other(scaled)[0]

    torch.testing.assert_close(expected, found, atol=1e-4, rtol=1e-4)


def test_equal_seeds_give_equal_weights() -> None:
    def weights(seed: int) -> Tensor:
        return torch.cat([p.flatten() for p in policy(seed=seed).project.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
