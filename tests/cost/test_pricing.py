"""Learned prices and calibrated figures in the price of a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.cluster import parse_cluster
from meshwright.cost.calibration import DEFAULTS, Origin
from meshwright.cost.collectives import CollectivePrices
from meshwright.cost.pricing import ANALYTIC, Pricing
from meshwright.plans.plan import JobSpec, Precision, Prediction
from meshwright.solvers.planner import PlanningResult, plan_graph
from meshwright.spmd.program import CollectiveKind
from tests.cost.graphs import zoo
from tests.cost.learned import FixedCollectives, PeakOperators

SIZES = {"dp_replicate": 1, "dp_shard": 4, "cp": 1, "ep": 1, "tp": 2}


def planned(
    cluster: str, *, pricing: Pricing = ANALYTIC, rule: str | None = None
) -> PlanningResult:
    return plan_graph(
        zoo("tiny-gpt", 16),
        reference="tiny",
        cluster=parse_cluster(cluster),
        job=JobSpec(global_batch=16, precision=Precision.FP32),
        rule=rule,
        pricing=pricing,
    )


def predicted(pricing: Pricing, cluster: str = "4xa100") -> Prediction:
    """The same plan, data parallel, under ``pricing``."""
    found = planned(cluster, pricing=pricing, rule="data-parallel").plan.prediction
    assert found is not None
    return found


def calibrated(**figures: float | str) -> Pricing:
    return replace(ANALYTIC, calibration=DEFAULTS.with_figures(Origin.LEARNED, **figures))


def test_learned_collectives_replace_latency_and_bandwidth() -> None:
    """A millisecond and a nanosecond for each byte."""
    pricer = FixedCollectives()
    prices = CollectivePrices(parse_cluster("8xa100"), pricer=pricer)
    payload = np.array([0.0, 1e3, 1e6, 1e9, 1e13])

    found = prices.time_s(CollectiveKind.ALL_REDUCE, payload, axes=["tp"], axis_sizes=SIZES)

    np.testing.assert_allclose([0.0, 1.001e-3, 2e-3, 1.001, 1e4], found, rtol=1e-5)
    assert pytest.approx(1e-3 + 1e-3) == prices.send_time_s(1e6, 0, 5)
    assert pytest.approx(2e-3) == prices.time_of_ranks_s(CollectiveKind.ALL_GATHER, 1e6, range(4))


def test_a_pricer_is_asked_once_for_each_group_and_kind() -> None:
    pricer = FixedCollectives()
    prices = CollectivePrices(parse_cluster("8xa100"), pricer=pricer)
    for num_bytes in (1e3, 5e5, 7e7):
        prices.time_s(CollectiveKind.ALL_REDUCE, num_bytes, axes=["tp"], axis_sizes=SIZES)
        prices.time_s(CollectiveKind.ALL_GATHER, num_bytes, axes=["tp"], axis_sizes=SIZES)

    assert [CollectiveKind.ALL_REDUCE, CollectiveKind.ALL_GATHER] == pricer.asked


def test_among_cpus_prices_stay_analytic() -> None:
    cluster = parse_cluster("cpu:8")
    learned = CollectivePrices(cluster, pricer=FixedCollectives())
    kind = CollectiveKind.ALL_REDUCE
    expected_s = CollectivePrices(cluster).time_s(kind, 1e6, axes=["tp"], axis_sizes=SIZES)

    assert expected_s == learned.time_s(kind, 1e6, axes=["tp"], axis_sizes=SIZES)
    assert 0.0 == learned.trust(kind, 1e6, axes=["tp"], axis_sizes=SIZES)


def test_an_analytic_prediction_names_no_learned_cause() -> None:
    found = predicted(ANALYTIC)

    assert ["analytic"] == found.source
    assert {} == found.sources


@pytest.mark.parametrize(("trust", "source"), [(1.0, "learned"), (0.0, "analytic")])
def test_sources_tell_trust_by_cause(trust: float, source: str) -> None:
    pricing = Pricing(
        name="test",
        operators=PeakOperators(trust=trust),
        collectives=FixedCollectives(trust=trust),
        interval=(0.9, 1.1),
    )
    found = predicted(pricing)

    assert trust == found.sources["compute"]
    assert trust == found.sources["dp_communication"]
    assert source in found.source
    assert pytest.approx(found.step_time_s) == sum(found.breakdown.values())


def test_the_interval_narrows_as_far_as_the_step_is_learned() -> None:
    pricing = Pricing(name="test", interval=(0.9, 1.1))

    assert pytest.approx((0.8, 1.5)) == pricing.interval_s(1.0, 0.0)
    assert pytest.approx((0.85, 1.3)) == pricing.interval_s(1.0, 0.5)
    assert pytest.approx((1.8, 2.2)) == pricing.interval_s(2.0, 1.0)


@pytest.mark.parametrize(
    ("figures", "cause"),
    [
        ({"host_s_per_step": 0.01}, "host"),
        ({"data_loading_share": 0.1}, "data_loading"),
        ({"straggler_share": 0.01}, "stragglers"),
        ({"clipping_passes": 3.0}, "clipping"),
        ({"optimizer_traffic": 2.0}, "optimizer"),
        ({"launch_scale": 3.0}, "launch"),
    ],
)
def test_a_term_of_the_framework_adds_to_its_cause(figures: dict[str, float], cause: str) -> None:
    before, after = predicted(ANALYTIC), predicted(calibrated(**figures))

    assert after.breakdown[cause] > before.breakdown[cause]
    assert 1.0 == after.sources[cause]
    assert pytest.approx(after.step_time_s) == sum(after.breakdown.values())
    others = set(before.breakdown) - {cause}
    assert [before.breakdown[name] for name in sorted(others)] == [
        after.breakdown[name] for name in sorted(others)
    ]


def test_stragglers_wait_for_each_doubling_of_devices() -> None:
    """Two doublings of 1 % each."""
    before, after = predicted(ANALYTIC), predicted(calibrated(straggler_share=0.01))

    assert pytest.approx(1.02 * before.step_time_s) == after.step_time_s


def test_wider_gradients_take_more_memory_and_longer_to_reduce() -> None:
    before = predicted(ANALYTIC)
    after = predicted(calibrated(gradient_item_bytes=8, reduction_item_bytes=8))

    assert after.memory_breakdown["gradients"] > before.memory_breakdown["gradients"]
    assert after.breakdown["dp_communication"] > before.breakdown["dp_communication"]


def test_gradients_in_place_are_always_there() -> None:
    """As many bytes as parameters, kept by a cause of their own, whatever the moment."""
    found = predicted(calibrated(accumulates_in_place=1)).memory_breakdown

    assert 0 == found["gradients"]
    assert found["parameters"] == found["accumulators"]


def test_a_margin_keeps_memory_free() -> None:
    before, after = predicted(ANALYTIC), predicted(calibrated(memory_margin=0.25))

    expected = pytest.approx(before.memory_capacity_bytes / 1.25, abs=1)
    assert expected == after.memory_capacity_bytes
    assert before.peak_memory_bytes == after.peak_memory_bytes


def test_what_the_allocator_holds_and_what_is_reserved() -> None:
    before = predicted(ANALYTIC)
    after = predicted(calibrated(allocator_share=0.1, reserved_bytes=2**30))

    assert 0 == before.memory_breakdown["allocator"]
    assert 0 < after.memory_breakdown["allocator"]
    assert sum(after.memory_breakdown.values()) == after.peak_memory_bytes
    assert before.memory_capacity_bytes - 2**30 == after.memory_capacity_bytes


def test_collectives_slowed_by_compute_hide_less() -> None:
    before = predicted(ANALYTIC)
    after = predicted(calibrated(communication_slowdown=0.5, compute_slowdown=0.4))

    assert after.breakdown["dp_communication"] > before.breakdown["dp_communication"]


def test_gathers_without_prefetch_wait_and_copies_add_by_the_byte() -> None:
    """ZeRO-3 on 4 devices: what is added per byte shows whole where nothing is prefetched."""

    def gather_s(**figures: float) -> float:
        found = planned("4xa100", pricing=calibrated(**figures), rule="zero3").plan.prediction
        assert found is not None
        return found.breakdown["zero_gather"]

    hidden_s = gather_s()
    waiting_s = gather_s(gather_overlap=0.0)
    copied_s = gather_s(gather_overlap=0.0, gather_s_per_byte=1e-11)

    assert 0 < hidden_s < waiting_s
    added_s = gather_s(gather_overlap=0.0, gather_s_per_byte=2e-11) - copied_s
    assert pytest.approx(copied_s - waiting_s, rel=1e-6) == added_s > 0


def test_a_plan_names_what_priced_it() -> None:
    pricing = Pricing(name="test", sha256="0123456789abcdef")

    assert "analytic" == planned("cpu:4").plan.provenance.cost_model
    assert "test 0123456789ab" == planned("cpu:4", pricing=pricing).plan.provenance.cost_model


def test_no_learned_plan_undercuts_the_bound() -> None:
    pricing = Pricing(name="test", operators=PeakOperators(efficiency=1.0))

    result = planned("4xa100", pricing=pricing)

    assert result.plan.prediction is not None
    assert 0 < result.search.lower_bound_s <= result.plan.prediction.step_time_s


def test_on_cpus_a_step_is_analytic_whatever_is_learned() -> None:
    pricing = Pricing(name="test", operators=PeakOperators(), collectives=FixedCollectives())

    assert predicted(ANALYTIC, "cpu:4") == predicted(pricing, "cpu:4")
