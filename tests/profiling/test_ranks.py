"""Local processes that measure together: what they say arrives, and their deaths are told."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from meshwright.errors import BadRequest
from meshwright.profiling.figures import Figure, Note, to_record
from meshwright.profiling.overlap import spreads_too_wide
from meshwright.profiling.ranks import run_on_local_ranks
from meshwright.profiling.sweeps import (
    COLLECTIVES,
    CollectiveSweep,
    GroupShape,
    MachineSweep,
    OverlapSweep,
    RankJob,
    shapes_for,
)
from meshwright.records import RecordStore
from meshwright.records.kinds import Kind
from tests.profiling.late_worker import DELAY_S

NUM_RANKS = 4
SIZE_BYTES = 2**12

_SAYS_ONE = (
    '{"type":"figure","kind":"collective","name":"all_reduce","unit":"s","values":[1.0],'
    '"method":"","extra":{}}'
)


def run(job: RankJob, *command: str) -> list[Figure | Note]:
    heard: list[Figure | Note] = []
    run_on_local_ranks(job, heard.append, command=command or None)
    return heard


@pytest.fixture(scope="module")
def heard() -> list[Figure | Note]:
    """Every sweep once, on four gloo processes of one thread each."""
    sweeps = (
        CollectiveSweep(
            sizes_bytes=(SIZE_BYTES,), shapes=shapes_for(NUM_RANKS), budget_s=60, point_s=0.02
        ),
        OverlapSweep(
            ops=("all_reduce",),
            sizes_bytes=(2**14, 2**20),
            shape=GroupShape(size=2),
            budget_s=20,
            repeats=10,
        ),
        MachineSweep(budget_s=60, largest_bytes=2**20),
    )
    job = RankJob(num_ranks=NUM_RANKS, device="cpu", sweeps=sweeps)
    return run(job)


@pytest.fixture(scope="module")
def figures(heard: list[Figure | Note]) -> list[Figure]:
    return [message for message in heard if isinstance(message, Figure)]


@pytest.mark.dist
def test_every_collective_is_measured_at_once_and_alone(figures: list[Figure]) -> None:
    """Two pairs run at a time or one alone; four ranks are one group anyway."""
    found = {
        (figure.name, *(figure.extra[key] for key in ("group_size", "stride", "num_groups")))
        for figure in figures
        if figure.kind == Kind.COLLECTIVE
    }
    pairs = {(op, 2, stride, n) for op in COLLECTIVES for stride in (1, 2) for n in (1, 2)}
    fours = {(op, 4, 1, 1) for op in COLLECTIVES if op != "send_recv"}

    assert pairs | fours == found


@pytest.mark.dist
def test_figures_become_records_of_their_kinds(figures: list[Figure], tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.append([to_record(figure, device="cpu", verb="profile test") for figure in figures])
    records, problems = store.read()
    collectives = [record for record in records if record.kind == Kind.COLLECTIVE]

    assert [] == problems
    assert Counter(figure.kind for figure in figures) == Counter(item.kind for item in records)
    assert {SIZE_BYTES} == {record.extra["bytes"] for record in collectives}
    assert {"gloo"} == {record.extra["backend"] for record in collectives}
    assert all(0 < record.p10 <= record.median <= record.p90 for record in records)
    assert all(record.num_repeats >= 3 for record in collectives)


@pytest.mark.dist
def test_slow_downs_are_stored_or_named_as_left_out(heard: list[Figure | Note]) -> None:
    """Both ways at every size; a ratio that is stored spreads no wider than itself."""
    found = [item for item in heard if isinstance(item, Figure) and item.kind == Kind.OVERLAP]
    left_out = [item for item in heard if isinstance(item, Note) and "left out: " in item.text]

    assert 4 == len(found) + len(left_out)
    for figure in found:
        assert all(math.isfinite(value) for value in figure.values)
        assert 10 <= len(figure.values)
        assert not spreads_too_wide(figure.values)
        assert "just before and just after" in figure.method
        assert (NUM_RANKS > len(os.sched_getaffinity(0))) == ("ranks share" in figure.method)


@pytest.mark.parametrize(
    ("values", "is_wide"),
    [((1.0,) * 10, False), ((0.5, 22.6, 1.0, 9.0), True), ((100.0, 112.0, 130.0), False)],
)
def test_a_spread_is_wide_beyond_the_median(values: tuple[float, ...], is_wide: bool) -> None:
    assert is_wide == spreads_too_wide(values)


@pytest.mark.dist
def test_a_machine_has_launches_products_and_memory(figures: list[Figure]) -> None:
    found = {figure.name for figure in figures if figure.kind == Kind.MACHINE}
    dtypes = {figure.extra["dtype"] for figure in figures if figure.name == "matmul_peak"}

    assert {"launch_latency", "matmul_peak", "cache_bandwidth", "memory_bandwidth"} == found
    assert {"fp32", "fp64"} <= dtypes


@pytest.mark.dist
def test_the_slowest_rank_counts() -> None:
    """Rank 1 takes 30 ms, rank 0 nothing: rank 0 says 30 ms."""
    job = RankJob(num_ranks=2, device="cpu", sweeps=())
    heard = run(job, sys.executable, "-m", "tests.profiling.late_worker")
    (figure,) = heard

    assert isinstance(figure, Figure)
    assert all(DELAY_S <= value < 1.0 for value in figure.values)


def test_what_was_said_before_a_rank_died_is_kept() -> None:
    """Rank 1 dies while rank 0 would go on for a minute; that does not hang."""
    program = (
        "import os, sys, time\n"
        f"if os.environ['RANK'] == '0': print('{_SAYS_ONE}', flush=True)\n"
        "else: time.sleep(0.5); sys.exit('the disk is on fire')\n"
        "time.sleep(60)\n"
    )
    heard: list[Figure | Note] = []
    start_s = time.monotonic()
    with pytest.raises(BadRequest, match=r"rank 1 of 2 ended with status 1: the disk is on fire"):
        run_on_local_ranks(
            RankJob(num_ranks=2, device="cpu", sweeps=()),
            heard.append,
            command=(sys.executable, "-c", program),
        )

    assert ["all_reduce"] == [message.name for message in heard if isinstance(message, Figure)]
    assert time.monotonic() - start_s < 30


def test_a_rank_that_is_killed_is_named() -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(BadRequest, match=r"rank 0 of 1 was ended by signal 9: no message"):
        run(RankJob(num_ranks=1, device="cpu", sweeps=()), sys.executable, "-c", program)


def test_silence_of_all_ranks_ends_them() -> None:
    job = RankJob(num_ranks=2, device="cpu", sweeps=(), timeout_s=0.5)
    with pytest.raises(BadRequest, match="nothing heard of 2 processes for 1 s"):
        run(job, sys.executable, "-c", "import time; time.sleep(60)")
