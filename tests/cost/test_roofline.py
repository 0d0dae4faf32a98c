"""Operator times, and a whole step worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.cluster.model import Cluster, Device, Host, Link
from meshwright.cost.roofline import Roofline, roofline_of
from meshwright.plans.plan import JobSpec, OptimizerName, OptimizerSpec
from meshwright.solvers.planner import make_context
from tests.cost.graphs import two_linear
from tests.cost.plans import uniform_plan

# Reached: 0.7 x 10 = 7 flop/s and 0.8 x 10 = 8 bytes/s.
DEVICE = Device(
    name="toy",
    memory_bytes=2**20,
    memory_bytes_per_s=10.0,
    flop_per_s={"float32": 10.0},
    launch_latency_s=2.0,
    source="test",
)


def test_the_slower_of_arithmetic_and_memory_counts() -> None:
    roofline = roofline_of(DEVICE, "float32")

    times_s = roofline.device_time_s(np.array([14.0, 7.0]), np.array([8.0, 80.0]))

    assert [2.0, 10.0] == pytest.approx(times_s.tolist())


@pytest.mark.parametrize(("queue_runs_ahead", "exposed_s"), [(True, 0.0), (False, 6.0)])
def test_launches_hide_behind_a_device_with_a_queue(
    queue_runs_ahead: bool, exposed_s: float
) -> None:
    """Three launches of 2 s beside 10 s of work."""
    roofline = Roofline(
        flop_per_s=1.0,
        peak_flop_per_s=1.0,
        bytes_per_s=1.0,
        launch_latency_s=2.0,
        queue_runs_ahead=queue_runs_ahead,
    )

    assert exposed_s == float(roofline.exposed_launch_s(np.array([10.0]), np.array([3.0]))[0])


def test_arithmetic_of_two_products_by_hand() -> None:
    """Batch 16, 4 -> 8 -> 2, on one device whose memory costs nothing.

    Forward 2 x 16 x (32 + 16) = 1536 flop; backward the same again for weights, and 2 x 16 x 16
    for the input of the second product: 1536 + 512. At 7 flop/s that is 512 s.
    """
    device = Device(
        name="toy",
        memory_bytes=2**30,
        memory_bytes_per_s=1e15,
        flop_per_s={"float32": 10.0},
        launch_latency_s=0.0,
        source="test",
    )
    link = Link(name="toy", bytes_per_s=1.0, latency_s=0.0, source="test")
    cluster = Cluster(name="toy", hosts=(Host(device=device, num_devices=1, link=link),), levels=())
    job = JobSpec(global_batch=16, optimizer=OptimizerSpec(name=OptimizerName.SGD))
    context = make_context(two_linear(), reference="toy", cluster=cluster, job=job)
    prediction = context.model.predict(uniform_plan(context))

    assert pytest.approx((1536 + 1536 + 512) / 7.0) == prediction.step_time_s
    assert pytest.approx(0.7) == prediction.mfu
    assert pytest.approx(16 / prediction.step_time_s) == prediction.samples_per_s
