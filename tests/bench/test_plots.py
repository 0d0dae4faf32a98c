"""Plots are whole SVG whatever is drawn."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from meshwright.bench.plots import Bar, regret_bars, scatter

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("num_points", [0, 1, 3, 8000])
def test_points_within_the_frame(num_points: int) -> None:
    """Five thousand at most, each inside the square of 520."""
    rng = np.random.default_rng(0)
    measured = np.exp(rng.normal(0, 5, num_points))
    text = scatter(measured, measured * 1.1, ["a <b>&"] * num_points, title="<t>")
    root = ElementTree.fromstring(text)
    marks = [p for p in root.iter(f"{SVG}path") if p.get("fill-opacity")]
    legend = min(1, num_points)

    assert min(num_points, 5000) + legend == len(marks)
    places = [p.attrib["d"][1:].split("m")[0].split(" ") for p in marks][: len(marks) - legend]
    assert all(78 <= float(x) <= 598 and 46 <= float(y) <= 566 for x, y in places)
    assert "script" not in text


def test_agreement_lies_on_the_diagonal() -> None:
    """From 1 to 100 s: 10 s is in the middle of both axes."""
    text = scatter([1, 10, 100], [1, 10, 100], ["k"] * 3, names=["p", "q", "r"], title="t")

    assert "M338.0 306.0" in text
    assert "q: measured 10 s, predicted 10 s (+0.0%)" in text


def test_many_kinds_share_the_last_color() -> None:
    kinds = [f"kind {i}" for i in range(9) for _ in range(10 - i)]
    text = scatter(np.ones(len(kinds)), np.ones(len(kinds)), kinds, title="t")

    assert "kind 5 (5)" in text
    assert "kind 6" not in text
    assert "others (9)" in text


def test_points_without_a_time_are_left_out() -> None:
    text = scatter([1.0, float("nan"), 0.0], [1.0, 1.0, 1.0], ["a"] * 3, title="t")

    assert 2 == text.count("fill-opacity")  # the point and its line of the legend
    assert "nan" not in text


@pytest.mark.parametrize("values", [(0.0, 0.0, 0.0), (0.5, 9.0, 0.1), (1e6, 1e7, 1e3)])
def test_bars(values: tuple[float, float, float]) -> None:
    top1, p95, top3 = values
    bar = Bar(name="a & b", top1_mean=top1, top1_p95=p95, top3_mean=top3)
    root = ElementTree.fromstring(regret_bars([bar], title="t"))
    widths = [float(r.attrib["width"]) for r in root.iter(f"{SVG}rect")][1:]

    assert 2 == len(widths)
    assert all(1 <= width <= 520 for width in widths)


def test_no_bars() -> None:
    assert "<svg" in regret_bars([], title="t")
