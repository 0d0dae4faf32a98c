"""A delay put into one rank of four real processes is found in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.profiling.traces.diagnosis import Pattern, diagnose
from meshwright.profiling.traces.step_files import read_step_table
from tests.profiling.traces.gloo_loop import DELAY_S

_RANKS = 4
_ITERATIONS = 60


def _loop(folder: Path, *, late_rank: int, late_from: int, every: int) -> list[str]:
    """The tables the four ranks wrote."""
    processes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "tests.profiling.traces.gloo_loop",
                str(rank), str(_RANKS), str(folder),
                *map(str, (_ITERATIONS, late_rank, late_from, every)),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(_RANKS)
    ]  # fmt: skip
    try:
        assert [0] * _RANKS == [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [str(folder / f"rank{rank}.csv") for rank in range(_RANKS)]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("every", "pattern"),
    [
        pytest.param(1, Pattern.PERSISTENT, id="always"),
        pytest.param(6, Pattern.PERIODIC, id="every 6", marks=pytest.mark.slow),
    ],
)
def test_20_ms_on_one_of_four_gloo_ranks_are_attributed_to_it(
    every: int, pattern: Pattern, tmp_path: Path
) -> None:
    found = diagnose(read_step_table(_loop(tmp_path, late_rank=2, late_from=12, every=every)))

    worst = found.slow_ranks[0]
    assert (2, pattern) == (worst.rank, worst.pattern)
    assert 0.8 * DELAY_S <= worst.excess_s <= 1.5 * DELAY_S
    assert (1 if every == 1 else every) == (worst.period_iterations or 1)
    assert 10 <= worst.since_iteration <= 12 + every
    assert () == found.idle_waves
    assert all(item.rank == 2 for item in found.slow_ranks if item.pattern == pattern)
