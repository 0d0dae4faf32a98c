"""Slow ranks, delays and waves put into tables are found; healthy tables stay healthy."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.profiling.traces.components import cluster_of_rank, principal_components
from meshwright.profiling.traces.diagnosis import Pattern, diagnose
from meshwright.profiling.traces.excess import excess_of_ranks, period_of
from meshwright.profiling.traces.phase_plot import diagnosis_page, sentences
from meshwright.profiling.traces.step_table import step_table
from tests.profiling.traces.troubled_tables import (
    KINDS,
    chain,
    is_right,
    noisy_compute,
    synchronous,
    troubled_set,
)


def _compute(ranks: int, iterations: int, *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return noisy_compute(rng, ranks=ranks, iterations=iterations, step_s=0.1, noise="normal")


def test_the_slow_rank_waits_least_and_all_steps_are_equal() -> None:
    """Rank 1 computes 3 s, the others 1 s; each step lasts 3 s on all."""
    table = synchronous(np.tile([[1.0], [3.0], [1.0]], (1, 20)), exchange_s=0.0)

    found = diagnose(table)

    assert np.array_equal(np.full((3, 20), 3.0), table.step_s)
    assert table.wait_s is not None
    assert 0.0 == table.wait_s[1].max()
    (slow,) = found.slow_ranks
    assert (1, Pattern.PERSISTENT, 0, 19) == (
        slow.rank, slow.pattern, slow.since_iteration, slow.until_iteration,
    )  # fmt: skip
    assert (2.0, 40.0) == (slow.excess_s, slow.total_excess_s)
    assert 40 / 60 == pytest.approx(slow.step_fraction)


def test_excess_is_over_the_lower_median_of_the_ranks() -> None:
    excess_s, lengths = excess_of_ranks(np.array([[1.0, 4.0], [2.0, 4.0], [3.0, 4.0], [4.0, 9.0]]))

    assert [[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [2.0, 5.0]] == excess_s.tolist()
    assert [1.0, 4 / 3] == pytest.approx(lengths.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_trouble_is_found(kind: str) -> None:
    """Ten of each kind; the benchmark has more."""
    drawn = [troubled_set(np.random.default_rng([seed, 99]), kind) for seed in range(10)]

    right = [is_right(diagnose(table), trouble) for table, trouble in drawn]

    assert sum(right) >= 9, right


def test_a_wave_travels_as_fast_as_waiting_reaches() -> None:
    """With neighbors two apart a delay of rank 8 travels two ranks an iteration, both ways."""
    compute_RI = _compute(32, 60)
    compute_RI[8, 20] += 0.5

    slow_wave = diagnose(chain(compute_RI, exchange_s=0.01)).idle_waves
    fast_wave = diagnose(chain(compute_RI, exchange_s=0.01, reach=2)).idle_waves

    assert [(8, 20)] == [(wave.source_rank, wave.iteration) for wave in slow_wave]
    assert 1.0 == pytest.approx(slow_wave[0].speed_ranks_per_iteration, rel=0.05)
    assert 2.0 == pytest.approx(fast_wave[0].speed_ranks_per_iteration, rel=0.15)
    assert 31 == slow_wave[0].num_ranks_reached


def test_by_step_times_alone_the_source_of_a_wave_is_still_found() -> None:
    compute_RI = _compute(16, 60)
    compute_RI[4, 20] += 0.5
    table = chain(compute_RI, exchange_s=0.01)
    steps_only = step_table(
        (
            (rank, at, float(table.step_s[rank, at]), None, None)
            for rank in range(16)
            for at in range(60)
        ),
        name="steps",
    )

    found = diagnose(steps_only)

    assert "step" == found.judged_by
    assert [(4, 20)] == [(wave.source_rank, wave.iteration) for wave in found.idle_waves]
    assert [(4, Pattern.ONE_OFF)] == [(item.rank, item.pattern) for item in found.slow_ranks]


def test_equal_step_times_alone_tell_nothing_and_it_is_said() -> None:
    rows = [(rank, at, 1.0, None, None) for rank in range(4) for at in range(10)]

    found = diagnose(step_table(rows, name="steps"))

    assert () == found.slow_ranks
    assert "10 iterations show neither what is noise nor what lasts" in found.notes[0]
    assert "without waiting or compute times a slow rank cannot be told" in found.notes[1]


def test_a_slow_network_is_blamed_on_no_rank() -> None:
    compute_RI = _compute(8, 50)
    table = synchronous(compute_RI, exchange_s=0.01)
    assert table.wait_s is not None
    table.wait_s[:, 30] += 0.4

    found = diagnose(table)

    assert () == found.slow_ranks
    assert [(30, "communication")] == [
        (item.iteration, item.where) for item in found.common_delays if item.iteration > 0
    ]


def test_ranks_that_drift_apart_are_said_to() -> None:
    """Nobody waits for anybody; rank 3 takes 10 % longer, so it is 4 s late after 40 s."""
    step_RI = np.ones((4, 40))
    step_RI[3] = 1.1
    rows = [(r, t, float(step_RI[r, t]), 0.0, None) for r in range(4) for t in range(40)]

    found = diagnose(step_table(rows, name="steps"))

    assert found.desynchronized
    assert 4.0 == pytest.approx(found.lag_s)


@pytest.mark.parametrize(
    ("columns", "period"),
    [
        ([3, 8, 13, 18], 5),
        ([3, 8, 18, 23, 28], 5),  # one missed
        ([3, 9, 13, 18, 23], 5),  # one late
        ([3, 4, 11, 30], None),
        ([3, 8], None),
    ],
)
def test_periods(columns: list[int], period: int | None) -> None:
    assert period == period_of(columns, num_iterations=40)


def test_components_and_clusters_of_two_groups() -> None:
    """Ranks 0-5 wait 1 s in every iteration, 6 and 7 nothing: one component, two clusters."""
    waits_s = np.vstack([np.ones((6, 10)), np.zeros((2, 10))])
    waits_s += 1e-3 * np.random.default_rng(0).standard_normal(waits_s.shape)

    found = principal_components(waits_s)

    assert found.explained_fraction[0] > 0.99
    assert (0, 0, 0, 0, 0, 0, 1, 1) == cluster_of_rank(found.scores)


def test_equal_ranks_have_no_components_and_one_cluster() -> None:
    found = principal_components(np.ones((5, 7)))

    assert () == found.explained_fraction
    assert (0, 0, 0, 0, 0) == cluster_of_rank(found.scores)


def test_the_page_says_what_the_sentences_say() -> None:
    table, trouble = troubled_set(np.random.default_rng(5), "persistent")
    found = diagnose(table)

    page = diagnosis_page(table, found)

    assert f"rank {trouble.ranks[0]} is slow" in sentences(found)[1]
    assert sentences(found)[1] in page
    assert 3 == page.count("<svg")
    assert "<script" not in page
