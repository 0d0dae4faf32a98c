"""The glance: talk level by level, and rows in about the order of their prices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from meshwright.env.clusters import ClusterPart, ClusterSpec, cluster_of
from meshwright.env.estimates import _Links, glance, totals_of
from meshwright.env.generator import InstanceSpec, context_of
from meshwright.env.models import ModelSpec, Programs
from meshwright.env.rooms import PricedRooms
from meshwright.env.rows import rows_of, thinned, variants_of
from meshwright.plans.plan import OptimizerName, Precision


def on_hosts(num_hosts: int, network: str = "") -> ClusterSpec:
    part = ClusterPart(num_hosts=num_hosts, devices_per_host=4, device="v100-pcie-32gb")
    return ClusterSpec(parts=(part,), network=network)


def test_a_host_sends_its_share_once() -> None:
    """Eight devices on two hosts of four.

    In a host 3/4 of the bytes pass over PCIe at 16 GB/s, between hosts half of a quarter of them at
    1.25 GB/s. Two devices, four apart, only the network joins: half of the bytes.
    """
    links = _Links(cluster_of(on_hosts(2, "ethernet-10g")))
    ways, stride = np.array([8.0, 4.0, 2.0, 1.0]), np.array([1.0, 1.0, 4.0, 1.0])
    found_s = links.seconds(ways, stride, np.full(4, 1e9), np.zeros(4))
    latency_s = links.seconds(ways, stride, np.zeros(4), np.ones(4))

    inside_s = 0.75 * 1e9 / 16e9
    expected_s = [inside_s + 0.125 * 1e9 / 1.25e9, inside_s, 0.5 * 1e9 / 1.25e9, 0.0]
    np.testing.assert_allclose(expected_s, found_s)
    np.testing.assert_allclose([55.7e-6, 5.7e-6, 50e-6, 0.0], latency_s)


@pytest.mark.parametrize("network", ["", "ethernet-10g"])
def test_rows_are_seen_in_about_the_order_of_their_prices(network: str, tmp_path: Path) -> None:
    """A quarter of the rows holds one within 5 % of the best."""
    spec = InstanceSpec(
        model=ModelSpec(
            reference="tiny-gpt?hidden=1024&num_layers=4&seq_len=512&num_heads=16",
            global_batch=32,
            precision=Precision.FP16,
        ),
        cluster=on_hosts(2, network),
        optimizer=OptimizerName.ADAMW,
        max_rows=64,
        max_plans=64,
    )
    context = context_of(spec, Programs(tmp_path))
    rows = rows_of(context)
    seen = glance(context, totals_of(context), rows)
    variants = variants_of(context, rows)
    classes = tuple(range(1 + max(context.model.segment_classes)))
    rooms = PricedRooms(context, rows=rows, variants=variants, group_classes=(classes,), num_cuts=1)
    best_s = np.array([rooms.open(row).time_s.min() for row in range(len(rows))])
    kept = thinned(rows, seen.order_s, len(rows) // 4)
    fits = np.isfinite(best_s)
    correlation = np.corrcoef(np.log(seen.step_s[fits]), np.log(best_s[fits]))[0, 1]

    assert len(rows) > 100
    assert correlation > 0.8
    assert best_s[kept].min() <= 1.05 * best_s.min()
