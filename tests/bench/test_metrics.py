"""Errors, ranks and coverage, worked out by hand and against scipy where it is installed."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.bench.metrics import (
    Errors,
    average_ranks,
    covered_fraction,
    relative_errors,
    relative_errors_of,
    spearman,
)


def test_errors_of_three_predictions() -> None:
    """Errors -50 %, +10 %, +100 %; the 90th percentile of 10, 50, 100 is 50 + 0.8 x 50."""
    found = relative_errors_of(relative_errors([0.5, 1.1, 4.0], [1.0, 1.0, 2.0]))

    assert 3 == found.n
    assert pytest.approx(1.6 / 3) == found.mape
    assert pytest.approx(0.5) == found.median_ape
    assert pytest.approx(0.9) == found.p90_ape
    assert pytest.approx(0.2) == found.bias


def test_nothing_has_no_errors() -> None:
    found = relative_errors_of(relative_errors([], []))

    assert Errors(n=0, mape=None, median_ape=None, p90_ape=None, bias=None) == found
    assert covered_fraction([], [], []) is None


def test_equal_values_share_their_ranks() -> None:
    assert [1.0, 3.0, 3.0, 5.0, 3.0] == average_ranks([1, 2, 2, 7, 2]).tolist()


@pytest.mark.parametrize(
    ("predicted", "measured", "rho"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([3, 2, 1], [10, 20, 30], -1.0),
        ([1, 1, 1], [10, 20, 30], 0.0),
        ([1, 2, 3], [5, 5, 5], None),
        # ranks 1 2.5 2.5 4 and 1 2 3 4: 4.5 / sqrt(4.5 x 5)
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / 22.5**0.5),
    ],
)
def test_rank_correlation(predicted: list[int], measured: list[int], rho: float | None) -> None:
    assert (None if rho is None else pytest.approx(rho)) == spearman(predicted, measured)


def test_rank_correlation_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for size in (2, 5, 50):
        predicted, measured = rng.integers(0, 9, size), rng.integers(0, 9, size)
        measured[0] = 99

        assert pytest.approx(stats.spearmanr(predicted, measured).statistic, nan_ok=True) == (
            spearman(predicted, measured) if np.ptp(predicted) else float("nan")
        )


def test_ends_of_an_interval_are_covered() -> None:
    assert 0.75 == covered_fraction([1, 2, 3, 4], [1, 1, 1, 1], [4, 2, 3, 3.5])
