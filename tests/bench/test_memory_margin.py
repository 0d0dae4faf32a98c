"""Margins over predicted peaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshwright.bench.memory_margin import MeasuredPeak, figures_of, margins_of
from meshwright.errors import BadRequest
from meshwright.gnn_cost.memory import MEMORY_NAME, read_memory
from meshwright.tracking import DataSource


def peaks(source: str, ratios: list[float]) -> list[MeasuredPeak]:
    return [
        MeasuredPeak(source=source, measured_bytes=ratio * 1000 * n, predicted_bytes=1000 * n)
        for n, ratio in enumerate(ratios, 1)
    ]


def test_the_worst_of_few_and_the_percentile_of_many() -> None:
    many = peaks("a", [1 + n / 1000 for n in range(300)])

    assert 0.2 == pytest.approx(margins_of(peaks("a", [0.9, 1.2, 1.1])).general)
    assert 0.297 == pytest.approx(margins_of(many).general)


def test_runs_predicted_alike_are_one_configuration() -> None:
    alike = [
        MeasuredPeak(source="a", measured_bytes=measured, predicted_bytes=100.0)
        for measured in (90.0, 105.0, 103.0)
    ]

    found = margins_of(alike)

    assert {"a": 1} == found.configurations
    assert 0.05 == pytest.approx(found.general)


def test_a_small_source_follows_all_sources() -> None:
    """20 configurations have half the say: between its own 0.1 and the general 0.3."""
    found = margins_of([*peaks("a", [1.1] * 20), *peaks("b", [1.3] * 60)])

    assert 0.3 == pytest.approx(found.general)
    assert 0.2 == pytest.approx(found.by_source["a"])


def test_no_margin_is_below_nothing() -> None:
    assert 0.0 == margins_of(peaks("a", [0.5, 0.9])).general
    assert 0.0 == margins_of([]).general


def test_what_is_written_is_what_explain_reads(tmp_path: Path) -> None:
    measured = [*peaks("a", [1.1, 0.9]), *peaks("b", [1.2])]
    data = DataSource(name="runs.parquet", kind="runs", num_bytes=1, sha256="ab", num_rows=3)

    licenses = {"a": "MIT", "c": "BSD"}
    figures_of(measured, within_left_out=0.5, data=data, licenses=licenses).write(tmp_path)
    found = read_memory(tmp_path / MEMORY_NAME)

    assert {"a": "MIT"} == json.loads((tmp_path / MEMORY_NAME).read_text())["licenses"]
    assert (0.2, 0.99) == (found.margin, found.level)
    assert (3, 3, ("a", "b")) == (found.runs, found.configurations, found.sources)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "memory.json"),
        ('{"level": 0.99, "margin": -1, "within_left_out": 1, "sources": {}}', "margin"),
        (
            '{"schema_version": 9, "level": 0.9, "margin": 0, "within_left_out": 1, '
            '"sources": {"a": {"margin": 0, "median_excess": 0, "runs": 1, "configurations": 1}}}',
            "this Meshwright reads 1",
        ),
    ],
)
def test_a_file_that_is_no_margin_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / MEMORY_NAME).write_text(text, encoding="utf-8")

    with pytest.raises(BadRequest, match=said):
        read_memory(tmp_path / MEMORY_NAME)
