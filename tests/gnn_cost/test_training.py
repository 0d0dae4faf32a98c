"""Training: it learns, repeats itself bit by bit, and goes on where it was killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from meshwright.errors import BadRequest
from meshwright.gnn_cost.batches import (
    batch_of,
    group_weights,
    split_groups,
    training_rows,
)
from meshwright.gnn_cost.operators.splits import take
from meshwright.gnn_cost.training import EpochMetrics, held_out, train
from tests.gnn_cost.learned import measured, small_settings


def test_it_learns_a_constant_efficiency_and_floor() -> None:
    """Measured are 4 us and 1.6 ideal times, with 2 % of noise."""
    trained = train(small_settings(max_epochs=30), training_rows(measured(800)))

    assert trained.history[0].held_out_error > trained.history[-1].held_out_error
    assert min(one.held_out_error for one in trained.history) < 0.15


def test_graphs_of_many_rows_train_messages_and_factor() -> None:
    """Chains take 1.4 times less than their operators alone."""
    rows = training_rows(measured(600, rows_each=5, speedup=1.4))
    tensors = train(small_settings(max_epochs=5), rows).tensors

    assert np.abs(tensors["message_weight"]).max() > 1e-3
    assert np.abs(tensors["graph_weight"]).max() > 1e-3


def test_isolated_operators_leave_messages_alone() -> None:
    trained = train(small_settings(max_epochs=2), training_rows(measured(300)))

    assert 0.0 == np.abs(trained.tensors["message_weight"]).max()
    assert 0.0 == trained.tensors["graph_bias"]


def test_equal_settings_give_equal_bits() -> None:
    rows = training_rows(measured(300))
    first, second = (train(small_settings(max_epochs=3), rows) for _ in range(2))
    other = train(small_settings(max_epochs=3, seed=1), rows)

    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(tensor, second.tensors[name])
    assert not np.array_equal(first.tensors["two_weight"], other.tensors["two_weight"])


@pytest.mark.parametrize("rows_each", [1, 3])
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path, rows_each: int) -> None:
    rows = training_rows(measured(240, rows_each=rows_each))
    settings = small_settings(max_epochs=5)
    checkpoint = tmp_path / "member.safetensors"
    seen: list[EpochMetrics] = []
    cut = train(
        settings,
        rows,
        checkpoint=checkpoint,
        on_epoch=seen.append,
        is_stopped=lambda: len(seen) == 2,
    )

    resumed = train(settings, rows, checkpoint=checkpoint)
    whole = train(settings, rows)

    assert cut.is_cut
    assert [0, 1] == [one.epoch for one in seen]
    assert not resumed.is_cut
    assert whole.history == resumed.history
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(tensor, resumed.tensors[name])


def test_checkpoints_of_other_data_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    rows = training_rows(measured(200))
    checkpoint = tmp_path / "member.safetensors"
    train(small_settings(max_epochs=1), rows, checkpoint=checkpoint)

    with pytest.raises(BadRequest, match="other settings or data"):
        train(small_settings(max_epochs=2), rows, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-40])
    with pytest.raises(BadRequest, match="damaged checkpoint"):
        train(small_settings(max_epochs=1), rows, checkpoint=checkpoint)


def test_nothing_to_learn_from_is_said() -> None:
    rows = training_rows(measured(200))
    empty = take(measured(200), np.zeros(200, np.bool_))

    with pytest.raises(BadRequest, match="no measurement"):
        train(small_settings(), training_rows(empty))
    assert 200 == rows.count


def test_what_is_alike_is_held_out_together() -> None:
    graphs = measured(2000)
    rows = training_rows(graphs)
    out = held_out(rows, small_settings())
    share = [out[rows.split_group == group].mean() for group in np.unique(rows.split_group)]

    assert {0.0, 1.0} == set(share)
    assert 0.02 < out.mean() < 0.25


def test_split_groups_do_not_depend_on_order() -> None:
    graphs = measured(100)
    reverse = take(graphs, np.arange(50, 100))

    assert split_groups(graphs)[50:].tolist() == split_groups(reverse).tolist()


def test_batches_hold_their_graphs_rows_and_edges() -> None:
    """Graphs of 3 rows: those of numbers 4 and 1 are rows 12 to 14 and 3 to 5."""
    rows = training_rows(measured(10, rows_each=3))
    batch = batch_of(rows, np.array([4, 1]))

    np.testing.assert_array_equal(rows.sizes[[12, 13, 14, 3, 4, 5]], batch.inputs.sizes.numpy())
    assert [0, 0, 0, 1, 1, 1] == batch.graph.tolist()
    assert [[0, 1, 3, 4], [1, 2, 4, 5]] == batch.inputs.edges[:, :4].tolist()
    assert 2 == batch.inputs.num_components


def test_group_weights_balance_between_graphs_and_groups() -> None:
    group = np.array([0, 0, 0, 0, 1])

    assert [1.0] * 5 == group_weights(group, balance=0.0).tolist()
    np.testing.assert_allclose([0.625] * 4 + [2.5], group_weights(group, balance=1.0), rtol=1e-6)
