"""The glance: talk level by level, memory, recompute, and rows in about the order of prices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.env.clusters import ClusterPart, ClusterSpec, cluster_of
from meshwright.env.estimates import _Links, glance, totals_of
from meshwright.env.generator import InstanceSpec, context_of
from meshwright.env.instance import ROW_FEATURES
from meshwright.env.models import ModelSpec, Programs
from meshwright.env.rooms import PricedRooms
from meshwright.env.rows import rows_of, thinned, variants_of
from meshwright.env.tabled import experts
from meshwright.plans.plan import OptimizerName, Precision
from tests.env.contexts import tiny_context


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
    """The row seen to be best is within 15 % of it, and times are off by little."""
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
    seen_s, price_s = seen.step_s[fits], best_s[fits]

    assert len(rows) > 100
    assert np.corrcoef(np.log(seen_s), np.log(price_s))[0, 1] > 0.9
    assert np.median(np.abs(np.log(seen_s / price_s))) < 0.1
    assert best_s[kept].min() == best_s.min()
    assert best_s[np.argmin(seen.order_s)] <= 1.15 * best_s.min()


def test_recompute_where_it_does_not_fit_without() -> None:
    """With ever less memory a row is seen to take the time of nothing, then all, computed again."""
    context = tiny_context()
    rows = rows_of(context)
    totals = totals_of(context)
    columns = [ROW_FEATURES.index(f"log_{name}") for name in ("step_s", "step_none_s")]
    columns += [ROW_FEATURES.index("log_step_full_s")]
    roomy = glance(context, replace(totals, capacity_bytes=1e15), rows)
    tight = glance(context, replace(totals, capacity_bytes=1.0), rows)
    step, none, _ = roomy.features[:, columns].T
    np.testing.assert_array_equal(none, step)
    assert (roomy.fullness < 1).all()
    step, none, full = tight.features[:, columns].T
    np.testing.assert_array_equal(full, step)
    assert (none < full).all()
    assert (tight.fullness > 1).all()


def test_experts_are_divided_and_nothing_else(tmp_path: Path) -> None:
    """Of eight experts' weights two ranks hold half; dense segments are whole on both."""
    spec = InstanceSpec(
        model=ModelSpec(
            reference="tiny-moe?num_layers=2&num_experts=8",
            global_batch=16,
            precision=Precision.FP16,
        ),
        cluster=on_hosts(1),
        optimizer=OptimizerName.ADAMW,
        max_rows=64,
        max_plans=64,
    )
    context = context_of(spec, Programs(tmp_path))
    found = experts(context, 2)

    assert found.share.max() > 0.5
    assert found.share.min() == 0.0
    assert found.talking_s > 0
    np.testing.assert_allclose(experts(context, 4).share, found.share, atol=0.02)
    assert experts(context, 1).talking_s == 0.0
