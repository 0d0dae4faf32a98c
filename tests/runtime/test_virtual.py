"""The handwritten program on virtual ranks equals plain PyTorch, in fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from meshwright.errors import PlanRefused
from meshwright.graph.opgraph import TensorSpec
from meshwright.plans.plan import ScheduleName
from meshwright.plans.runnable import RUNNABLE_SCHEDULES
from meshwright.runtime.virtual import VirtualCluster
from tests.runtime import handwritten


def _cluster(dp: int, tp: int, num_microbatches: int, schedule: ScheduleName) -> VirtualCluster:
    return VirtualCluster(
        handwritten.two_stages(dp, tp, num_microbatches),
        handwritten.layout(dp, tp),
        handwritten.parameters().__getitem__,
        schedule=schedule,
        num_microbatches=num_microbatches,
        optimizer=handwritten.OPTIMIZER,
    )


@pytest.mark.parametrize("schedule", RUNNABLE_SCHEDULES)
@pytest.mark.parametrize(
    ("dp", "tp", "num_microbatches"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 3), (3, 2, 2)]
)
def test_three_steps_equal_plain_pytorch(
    dp: int, tp: int, num_microbatches: int, schedule: ScheduleName
) -> None:
    losses, gradients, parameters = handwritten.reference(3)
    cluster = _cluster(dp, tp, num_microbatches, schedule)
    for step in range(3):
        results = cluster.step(handwritten.data())
        assert results[1].loss is not None
        for loss in results[1].loss:
            torch.testing.assert_close(losses[step], loss, rtol=1e-12, atol=0)
        if step == 0:
            found = cluster.full_gradients(results)

            assert sorted(gradients) == sorted(found)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, found[name], rtol=1e-12, atol=1e-14)
    for name, parameter in cluster.full_parameters().items():
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-12, atol=1e-14)


def test_outputs_are_put_together_in_batch_order() -> None:
    cluster = _cluster(2, 2, 3, ScheduleName.ONE_F_ONE_B)
    full, batch = handwritten.parameters(), handwritten.data()
    expected = (torch.relu(batch["x"] @ full["w1"]) @ full["w2"] + full["b"]) @ full["w3"]

    found = cluster.full_outputs(cluster.step(batch, update=False))

    torch.testing.assert_close(expected + full["b"], found["z"], rtol=1e-12, atol=1e-14)


def test_without_update_parameters_stay() -> None:
    cluster = _cluster(2, 1, 1, ScheduleName.GPIPE)
    cluster.step(handwritten.data(), update=False)

    for name, parameter in cluster.full_parameters().items():
        assert torch.equal(handwritten.parameters()[name], parameter)


def test_a_wrong_shape_is_refused_where_it_arises() -> None:
    first, second = handwritten.two_stages(2, 1, 1)
    wrong = list(first.values)
    wrong[first.saved[0]] = TensorSpec(shape=(99, 6), dtype="float64", stride=(6, 1))
    cluster = VirtualCluster(
        (dataclasses.replace(first, values=tuple(wrong)), second),
        handwritten.layout(2, 1),
        handwritten.parameters().__getitem__,
        schedule=ScheduleName.GPIPE,
        num_microbatches=1,
        optimizer=handwritten.OPTIMIZER,
    )

    with pytest.raises(PlanRefused, match=r"stage 0, forward, aten.relu.default: value \d+"):
        cluster.step(handwritten.data())


def test_a_missing_input_is_named() -> None:
    cluster = _cluster(2, 1, 1, ScheduleName.GPIPE)

    with pytest.raises(PlanRefused, match="input t is missing"):
        cluster.step({"x": handwritten.data()["x"]})
