"""A few measurements of one device correct its prices, part of the way for one and all for many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.cluster.catalog import find_device
from meshwright.cluster.model import Device, GroupLevel, Link
from meshwright.cost.pricing import ANALYTIC, Priced, Pricing
from meshwright.cost.work import DTYPES, Family, OperatorWork
from meshwright.errors import BadRequest
from meshwright.gnn_cost.calibrate import (
    ALL_COLLECTIVES,
    ALL_OPERATORS,
    MAX_OFFSET,
    CorrectedCollectives,
    CorrectedOperators,
    FloatArray,
    Offsets,
    Prediction,
    collective_prediction,
    fit_offsets,
    held_out_error,
    operator_prediction,
)
from meshwright.gnn_cost.calibrations import (
    DeviceCalibration,
    calibrated,
    load_calibrations,
    write_calibration_of_device,
)
from meshwright.gnn_cost.collectives.samples import CollectiveSamples, MeasuredGroup
from meshwright.gnn_cost.features import ideal_time_s
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.spmd.program import CollectiveKind

A100 = find_device("a100-sxm-80gb", where="test").device
H100 = find_device("h100-sxm-80gb", where="test").device
FAMILIES = (Family.MATMUL, Family.NORM, Family.ELEMENTWISE, Family.SOFTMAX)


class TwiceTheRoofline:
    """Prices operators at an efficiency of one half."""

    def operators(self, work: OperatorWork, device: Device) -> Priced:
        time_s = 2 * roofline_s(work, device)
        return Priced(time_s=time_s, trust=np.ones(work.count))


class Bandwidth:
    """Prices collectives at 100 GB/s and 10 us."""

    def collectives(
        self,
        kind: CollectiveKind,
        num_bytes: FloatArray,
        *,
        levels: Sequence[GroupLevel],
        num_ranks: int,
        device: Device,
    ) -> Priced:
        del kind, levels, num_ranks, device
        return Priced(time_s=1e-5 + num_bytes / 1e11, trust=np.ones(len(num_bytes)))


def roofline_s(work: OperatorWork, device: Device) -> FloatArray:
    return ideal_time_s(work, (device,), np.zeros(work.count, np.int64))


def some_work(num_rows: int, *, seed: int) -> OperatorWork:
    """Large operators of four families in turn."""
    rng = np.random.default_rng(seed)
    size = rng.integers(2048, 8192, num_rows).astype(np.float64)
    family = np.array([FAMILIES[index % 4] for index in range(num_rows)], np.int64)
    is_product = family == Family.MATMUL
    return OperatorWork(
        family=family,
        dtype=np.full(num_rows, DTYPES.index("bfloat16")),
        dims=np.stack([np.ones(num_rows), size, size, np.where(is_product, size, 2.0)], axis=1),
        flop=np.where(is_product, 2 * size**3, size**2),
        num_bytes=np.where(is_product, 6.0, 4.0) * size**2,
        edges=np.zeros((2, 0), np.int64),
        edge_kind=np.zeros(0, np.int64),
    )


def measured(num_rows: int, *, slower: FloatArray | float, seed: int = 0) -> MeasuredGraphs:
    """One operator a graph, on an A100 that is ``slower`` times than priced, 3 % noise."""
    work = some_work(num_rows, seed=seed)
    noise = np.exp(0.03 * np.random.default_rng([seed, 1]).standard_normal(num_rows))
    return MeasuredGraphs(
        work=work,
        graph=np.arange(num_rows),
        weight=np.ones(num_rows),
        devices=(A100,),
        device=np.zeros(num_rows, np.int64),
        time_s=TwiceTheRoofline().operators(work, A100).time_s * slower * noise,
        rest_s=np.zeros(num_rows),
        labels={},
    )


def error_with(offsets: Offsets | None, held_out: MeasuredGraphs) -> float:
    pricer = CorrectedOperators(TwiceTheRoofline(), {A100.name: offsets} if offsets else {})
    predicted_s = pricer.operators(held_out.work, A100).time_s
    return float(np.mean(np.abs(predicted_s / held_out.time_s - 1)))


def test_the_error_falls_with_every_measurement() -> None:
    """1.4 times slower: nothing, 1, 4 and 16 measurements, judged on 200 others.

    The noise alone is a mean error of 2.4 %.
    """
    held_out = measured(200, slower=1.4, seed=9)
    errors = [error_with(None, held_out)]
    for count in (1, 4, 16):
        samples = measured(count, slower=1.4, seed=count)
        offsets = fit_offsets(operator_prediction(TwiceTheRoofline(), samples), samples.time_s)
        errors.append(error_with(offsets, held_out))

    assert 0.28 < errors[0] < 0.3
    assert errors[1] < 0.13
    assert errors[2] < 0.06
    assert errors[3] < 0.035


def test_rows_held_out_are_judged_by_the_others() -> None:
    """All 1.4 times slower, but for one family of one row, which only that row tells."""
    alike = measured(16, slower=1.4)
    odd = measured(4, slower=np.array([1.0, 1.0, 1.0, 2.5]))
    found = []
    for samples in (alike, odd):
        predict = operator_prediction(TwiceTheRoofline(), samples)
        offsets = fit_offsets(predict, samples.time_s)
        found.append((error_with(offsets, samples), held_out_error(predict, samples.time_s)))
    few = measured(3, slower=1.4)

    assert found[0][0] < found[0][1] < 0.06
    assert found[1][1] > 1.2 * found[1][0]
    assert held_out_error(operator_prediction(TwiceTheRoofline(), few), few.time_s) is None


def test_families_differ_where_there_are_measurements_of_each() -> None:
    """Norms 1.3 times faster, the rest 1.4 times slower."""

    def slower(graphs: MeasuredGraphs) -> FloatArray:
        return np.where(graphs.work.family == Family.NORM, 1 / 1.3, 1.4)

    plain = measured(400, slower=1.0, seed=2)
    samples = replace(plain, time_s=plain.time_s * slower(plain))
    offsets = fit_offsets(operator_prediction(TwiceTheRoofline(), samples), samples.time_s)
    factors = offsets.factor_of_family(np.array([Family.MATMUL, Family.NORM], np.int64))

    assert pytest.approx([1.4, 1 / 1.3], rel=0.03) == factors


def test_other_devices_keep_their_prices_to_the_last_bit() -> None:
    samples = measured(16, slower=1.4)
    offsets = fit_offsets(operator_prediction(TwiceTheRoofline(), samples), samples.time_s)
    work, before = some_work(50, seed=3), TwiceTheRoofline()
    after = CorrectedOperators(before, {A100.name: offsets})
    sizes = np.logspace(3, 9, 20)

    assert (
        before.operators(work, H100).time_s.tobytes()
        == after.operators(work, H100).time_s.tobytes()
    )
    assert (before.operators(work, A100).time_s < after.operators(work, A100).time_s).all()
    assert (
        on_link(Bandwidth(), sizes, H100).tobytes()
        == on_link(CorrectedCollectives(Bandwidth(), {A100.name: offsets}), sizes, H100).tobytes()
    )


def test_no_price_falls_below_the_roofline() -> None:
    """Measured five times faster than priced, which is 2.5 times the roofline."""
    samples = measured(64, slower=0.2)
    offsets = fit_offsets(operator_prediction(TwiceTheRoofline(), samples), samples.time_s)
    work = some_work(50, seed=3)
    priced = CorrectedOperators(TwiceTheRoofline(), {A100.name: offsets}).operators(work, A100)

    assert (priced.time_s >= roofline_s(work, A100)).all()


def test_no_price_changes_by_more_than_a_factor_of_three() -> None:
    samples = measured(64, slower=50.0)
    offsets = fit_offsets(operator_prediction(TwiceTheRoofline(), samples), samples.time_s)

    assert 3 * (1 + 1e-12) >= offsets.factor_of_family(np.arange(max(Family) + 1)).max()
    assert all(abs(value) <= MAX_OFFSET for value in offsets.values.values())


def test_one_measurement_far_off_among_many_counts_little() -> None:
    samples = measured(16, slower=1.0)
    time_s = samples.time_s.copy()
    time_s[3] *= 20
    offsets = fit_offsets(operator_prediction(TwiceTheRoofline(), samples), time_s)

    assert abs(offsets.values[ALL_OPERATORS]) < 0.05


def on_link(
    pricer: CorrectedCollectives | Bandwidth, sizes: FloatArray, device: Device
) -> FloatArray:
    return pricer.collectives(
        CollectiveKind.ALL_REDUCE, sizes, levels=levels(0), num_ranks=8, device=device
    ).time_s


def levels(index: int) -> tuple[GroupLevel, ...]:
    link = Link(name="nvlink3", bytes_per_s=3e11, latency_s=1e-6, source="test")
    return (GroupLevel(level_index=index, link=link, group_sizes=(8,)),)


def test_collectives_in_a_host_and_between_hosts_have_offsets_of_their_own() -> None:
    """Between hosts twice as slow as priced, in the host as priced."""
    groups = tuple(
        MeasuredGroup(
            kind=kind, levels=levels(index), num_ranks=8, device=A100, source="s", gpu="a100"
        )
        for kind in ("all_reduce", "all_gather")
        for index in (0, 1)
    )
    sizes = np.tile(np.logspace(4, 9, 30), 4)
    group = np.repeat(np.arange(4), 30)
    samples = CollectiveSamples(
        groups=groups,
        group=group,
        num_bytes=sizes,
        time_s=(1e-5 + sizes / 1e11) * np.where(group % 2, 2.0, 1.0),
    )
    offsets = fit_offsets(collective_prediction(Bandwidth(), samples), samples.time_s)
    factors = [
        offsets.factor_of_collective("all_reduce", leaves_host=leaves) for leaves in (False, True)
    ]

    assert pytest.approx([1.0, 2.0], rel=0.04) == factors


def test_runs_move_what_their_time_was_spent_on() -> None:
    """Of 1 s 0.9 s are operators, which take 1.3 times as long; shares follow the new prices."""

    def predict(values: dict[str, float]) -> Prediction:
        parts = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
        scaled = parts * np.exp([values.get(ALL_OPERATORS, 0.0), values.get(ALL_COLLECTIVES, 0.0)])
        total = scaled.sum(axis=1)
        return Prediction(
            time_s=total,
            names=(ALL_OPERATORS, ALL_COLLECTIVES),
            shares=scaled / total[:, None],
        )

    offsets = fit_offsets(predict, np.array([0.9 * 1.3 + 0.1, 0.8 * 1.3 + 0.2, 0.3 * 1.3 + 0.7]))  # type: ignore[arg-type] # a dict is what it gets

    assert 1.15 < np.exp(offsets.values[ALL_OPERATORS]) < 1.32
    assert abs(offsets.values[ALL_COLLECTIVES]) < 0.12
    assert offsets.deviations[ALL_OPERATORS] < offsets.deviations[ALL_COLLECTIVES]


@pytest.mark.parametrize("time_s", [[], [0.0], [float("nan")]])
def test_calibration_needs_measured_times(time_s: list[float]) -> None:
    def predict(_: object) -> Prediction:
        size = len(time_s)
        return Prediction(time_s=np.ones(size), names=(ALL_OPERATORS,), shares=np.ones((size, 1)))

    with pytest.raises(BadRequest, match="at least one measured time"):
        fit_offsets(predict, np.array(time_s))


def one(device: str = A100.name, *, sha256: str = "abc") -> DeviceCalibration:
    return DeviceCalibration(
        device=device,
        pricing_sha256=sha256,
        offsets={ALL_OPERATORS: 0.3},
        deviations={ALL_OPERATORS: 0.05},
        noise=0.05,
        num_samples=4,
        error_before=0.28,
        error_after=0.04,
        data=[],
    )


def test_a_calibration_is_loaded_with_the_weights_it_was_made_with_only(tmp_path: Path) -> None:
    write_calibration_of_device(one(), tmp_path)
    write_calibration_of_device(one(H100.name, sha256="old"), tmp_path)
    found = load_calibrations(tmp_path, pricing_sha256="abc")
    pricing = calibrated(
        Pricing(name="gnn", sha256="abc", operators=TwiceTheRoofline(), collectives=Bandwidth()),
        found.calibrations,
    )
    work = some_work(8, seed=0)
    plain_s = TwiceTheRoofline().operators(work, A100).time_s
    assert pricing.operators is not None

    assert [A100.name] == [item.device for item in found.calibrations]
    assert ["h100-sxm-80gb.json: made with other weights"] == [
        text.split(";")[0] for text in found.problems
    ]
    assert pytest.approx(plain_s * np.exp(0.3)) == pricing.operators.operators(work, A100).time_s
    assert "abc" != pricing.sha256


def test_without_calibrations_the_pricing_is_the_same_object(tmp_path: Path) -> None:
    assert ANALYTIC is calibrated(
        ANALYTIC, load_calibrations(tmp_path, pricing_sha256="").calibrations
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": {"operators": 9.0}}, "$.offsets: holds 9.0"),
        ({"schema_version": 7}, "$.schema_version: is 7"),
        ({"strange": 1}, "unknown key"),
    ],
)
def test_a_damaged_calibration_is_left_out_and_told(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = write_calibration_of_device(one(), tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    found = load_calibrations(tmp_path, pricing_sha256="abc")

    assert () == found.calibrations
    assert message in found.problems[0]
