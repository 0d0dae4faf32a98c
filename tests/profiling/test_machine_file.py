"""A measured machine as a cluster file: the figures in it, the way there and back, a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshwright.cluster import cluster_to_toml, cpu_cluster, read_cluster_file
from meshwright.cluster.model import GroupLevel, Link
from meshwright.cost.collectives import alternatives
from meshwright.cost.roofline import roofline_of
from meshwright.errors import MissingProfile
from meshwright.profiling.figures import Figure
from meshwright.profiling.machine_file import cluster_of, fit_link
from meshwright.records.kinds import Kind
from meshwright.spmd.program import CollectiveKind

LATENCY_S, BYTES_PER_S = 2e-4, 1.5e9
_KINDS = {
    "all_reduce": CollectiveKind.ALL_REDUCE,
    "all_gather": CollectiveKind.ALL_GATHER,
    "all_to_all": CollectiveKind.ALL_TO_ALL,
}


def collective(op: str, num_bytes: int, size: int, *, factor: float = 1.0) -> Figure:
    """What the cost model says it takes over a link of known latency and bandwidth."""
    link = Link(name="known", bytes_per_s=BYTES_PER_S, latency_s=LATENCY_S, source="a test")
    level = GroupLevel(level_index=0, link=link, group_sizes=(size,))
    time_s = min(
        fixed_s + num_bytes * per_byte_s
        for fixed_s, per_byte_s in alternatives(_KINDS[op], (level,), size)
    )
    return Figure(
        kind=Kind.COLLECTIVE,
        name=op,
        unit="s",
        values=(factor * time_s,),
        method="",
        extra={"bytes": num_bytes, "group_size": size},
    )


def machine_figure(name: str, value: float, **extra: str) -> Figure:
    return Figure(
        kind=Kind.MACHINE, name=name, unit="", values=(value,) * 5, method="", extra=dict(extra)
    )


COLLECTIVES = [
    collective(op, num_bytes, size)
    for op in _KINDS
    for num_bytes in (2**10, 2**14, 2**18, 2**22)
    for size in (2, 4)
]
FIGURES = [
    *COLLECTIVES,
    machine_figure("matmul_peak", 4e10, dtype="fp32"),
    machine_figure("matmul_peak", 2e10, dtype="fp64"),
    machine_figure("memory_bandwidth", 9e9, operator="copy"),
    machine_figure("memory_bandwidth", 8e9, operator="triad"),
    machine_figure("launch_latency", 3e-6, operator="add"),
]


def test_the_link_is_recovered_from_what_the_formulas_say() -> None:
    fit = fit_link(COLLECTIVES)

    assert pytest.approx(LATENCY_S, rel=0.03) == fit.latency_s
    assert pytest.approx(BYTES_PER_S, rel=0.03) == fit.bytes_per_s
    assert fit.mean_error_fraction < 0.02
    assert len(COLLECTIVES) == fit.num_figures


def test_a_wild_measurement_moves_the_link_little() -> None:
    """Least absolute deviations: one collective of 24 that took a hundred times as long."""
    wild = [*COLLECTIVES[1:], collective("all_reduce", 2**10, 2, factor=100.0)]

    assert pytest.approx(LATENCY_S, rel=0.1) == fit_link(wild).latency_s


def test_predictions_from_the_file_are_what_was_measured() -> None:
    """The roofline takes its share of the file's figures: that gives the measured ones back."""
    (host,) = cluster_of(FIGURES, cpu_cluster(4), date="2026-01-02").hosts
    reached = roofline_of(host.device, "float32")

    assert pytest.approx(4e10) == reached.flop_per_s
    assert pytest.approx(8e9) == reached.bytes_per_s
    assert 3e-6 == reached.launch_latency_s
    assert {"float32", "float64"} == set(host.device.flop_per_s)
    assert host.device.memory_bytes == cpu_cluster(4).hosts[0].device.memory_bytes


def test_the_file_reads_back_and_names_its_source(tmp_path: Path) -> None:
    found = cluster_of(FIGURES, cpu_cluster(4), date="2026-01-02")
    path = tmp_path / "machine.toml"
    path.write_text(cluster_to_toml(found), encoding="utf-8")
    read = read_cluster_file(path)
    says = "measured by meshwright profile machine, n=1 to 5, 2026-01-02, 4 ranks at the same time"

    assert found == read
    assert read.hosts[0].device.source.startswith(says)
    assert read.hosts[0].link.source.startswith(says)


def test_a_bad_fit_is_warned_of_in_the_file() -> None:
    """Half of the collectives took four times as long as the formulas say, by no rule."""
    uneven = [
        collective(
            figure.name,
            int(figure.extra["bytes"] or 0),
            int(figure.extra["group_size"] or 0),
            factor=1.0 if index % 2 else 4.0,
        )
        for index, figure in enumerate(COLLECTIVES)
    ]
    rest = FIGURES[len(COLLECTIVES) :]
    good, bad = (
        cluster_of([*links, *rest], cpu_cluster(4), date="2026-01-02").hosts[0].link.source
        for links in (COLLECTIVES, uneven)
    )
    percent = f"{100 * fit_link(uneven).mean_error_fraction:.0f} %"

    assert "WARNING" not in good
    assert (
        f"WARNING: latency and bandwidth explain these collectives with a mean error of {percent}"
        in bad
    )


def test_a_plan_is_made_for_the_file(tmp_path: Path) -> None:
    from meshwright.api import plan_reference
    from meshwright.plans import JobSpec

    path = tmp_path / "machine.toml"
    found = cluster_of(FIGURES, cpu_cluster(4), date="2026-01-02")
    path.write_text(cluster_to_toml(found), encoding="utf-8")
    planned = plan_reference("tiny-mlp", cluster=str(path), job=JobSpec(global_batch=8))
    plan = planned.result.plan

    assert str(path) == plan.cluster
    assert plan.prediction is not None
    assert plan.prediction.fits


@pytest.mark.parametrize("missing", ["launch_latency", "memory_bandwidth", "matmul_peak"])
def test_a_figure_that_is_missing_is_not_invented(missing: str) -> None:
    figures = [figure for figure in FIGURES if figure.name != missing]
    with pytest.raises(MissingProfile, match="with a longer --budget"):
        cluster_of(figures, cpu_cluster(4), date="2026-01-02")


def test_without_collectives_there_is_no_link() -> None:
    with pytest.raises(MissingProfile, match="no collective was measured"):
        fit_link(FIGURES[len(COLLECTIVES) :])
