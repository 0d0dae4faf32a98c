"""The order of a sweep, its budget, what it skips and what it takes up again."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.profiling.operators import (
    FAMILIES,
    Candidate,
    Direction,
    DtypeName,
    Limits,
    NeighborUncertainty,
    SweepPlan,
    SweepResult,
    measured_here,
    run_sweep,
    sampled_candidates,
)
from meshwright.records import (
    Kind,
    Record,
    RecordStore,
    describe_machine,
    describe_software,
    make_record,
)


def gelu(m: int, dtype: DtypeName = DtypeName.FP32) -> Candidate:
    return FAMILIES["gelu"].candidate({"m": m, "n": 64}, Direction.FWD, dtype)


def record_of(candidate: Candidate, median_s: float) -> Record:
    return make_record(
        kind=Kind.OPERATOR,
        name=candidate.op,
        device="cpu",
        verb="profile ops",
        method="made up by a test",
        unit="s",
        median=median_s,
        extra={**candidate.extra(), "num_threads": 1, "cache_flushed": False},
    )


class Bench:
    """Takes as long as it is told, on a clock of its own."""

    def __init__(self, seconds: Callable[[Candidate], float] = lambda _: 1.0) -> None:
        self.now_s = 0.0
        self.order: list[Candidate] = []
        self.kept: list[Record] = []
        self._seconds = seconds

    def measure(self, candidate: Candidate) -> Record:
        self.order.append(candidate)
        self.now_s += self._seconds(candidate)
        return record_of(candidate, 1e-6 * self._seconds(candidate))

    def sweep(
        self, candidates: list[Candidate], budget_s: float = 1e6, **more: object
    ) -> SweepResult:
        return run_sweep(
            SweepPlan(
                candidates=candidates,
                measure=more.pop("measure", self.measure),  # type: ignore[arg-type]
                sink=self.kept.append,
                device="cpu",
                budget_s=budget_s,
                now_s=lambda: self.now_s,
                **more,  # type: ignore[arg-type]
            )
        )


def test_the_farthest_from_what_is_measured_is_next() -> None:
    """In doublings of m: 64 first (the smallest), then 4096; 512 is 3 from both, then 128."""
    bench = Bench()
    result = bench.sweep([gelu(m) for m in (4096, 128, 512, 64)])

    assert [64, 4096, 512, 128] == [candidate.sizes["m"] for candidate in bench.order]
    assert (4, 0, 0) == (result.num_measured, result.num_known, result.num_left)


def test_disagreement_draws_measurements() -> None:
    """Between 64 and 128 times differ 100-fold for twice the work; from 4096 on they agree."""
    uncertainty = NeighborUncertainty()
    for m, median_s in ((64, 1e-6), (128, 1e-4), (256, 4e-6), (4096, 64e-6), (8192, 128e-6)):
        uncertainty.observe(gelu(m), record_of(gelu(m), median_s))
    uncertainty.observe(gelu(16384), record_of(gelu(16384), 256e-6))

    assert uncertainty(gelu(96)) > 5 * uncertainty(gelu(6144))
    assert 0.0 == uncertainty(gelu(64))
    assert math.inf == uncertainty(gelu(64, DtypeName.BF16))


def test_an_injected_uncertainty_decides() -> None:
    bench = Bench()
    bench.sweep(
        [gelu(m) for m in (64, 128, 256)], uncertainty=lambda item: -abs(int(item.sizes["m"]) - 128)
    )

    assert 128 == bench.order[0].sizes["m"]


def test_equal_candidates_are_measured_once() -> None:
    bench = Bench()
    again = FAMILIES["gelu"].candidate(
        {"m": 64, "n": 64}, Direction.FWD, DtypeName.FP32, model="gpt2", tp=2
    )

    assert 1 == bench.sweep([gelu(64), again]).num_measured


def test_the_budget_ends_it() -> None:
    bench = Bench(seconds=lambda _: 10.0)
    result = bench.sweep([gelu(64 * count) for count in range(1, 21)], budget_s=45.0)

    assert (5, 15) == (result.num_measured, result.num_left)
    assert 50.0 == result.seconds


def test_what_cannot_be_over_in_time_is_left() -> None:
    """Work of m = 64 takes 1 s; of 640,000 it would take 10,000 s at that rate."""
    bench = Bench(seconds=lambda item: int(item.sizes["m"]) / 64 * 1e-6)

    def measure(candidate: Candidate) -> Record:
        record = bench.measure(candidate)
        return record_of(candidate, 1.0) if record.median else record

    result = bench.sweep([gelu(64), gelu(640_000)], budget_s=100.0, measure=measure)

    assert [64] == [candidate.sizes["m"] for candidate in bench.order]
    assert 1 == result.num_left


def test_failures_are_named_and_passed_over() -> None:
    bench = Bench()

    def measure(candidate: Candidate) -> Record:
        if candidate.sizes["m"] == 128:
            raise RuntimeError("out of memory: tried to allocate 9 GiB\nwith more lines")
        return bench.measure(candidate)

    result = bench.sweep([gelu(m) for m in (64, 128, 256)], measure=measure)

    assert 2 == result.num_measured == len(bench.kept)
    assert ["RuntimeError: out of memory: tried to allocate 9 GiB"] == [
        item.reason for item in result.skipped
    ]


def test_a_dead_device_ends_it() -> None:
    def measure(_: Candidate) -> Record:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    result = Bench().sweep([gelu(m) for m in (64, 128, 256)], measure=measure)

    assert "illegal memory access" in result.stopped_by
    assert 2 == result.num_left


def test_problems_known_before_are_not_tried() -> None:
    bench = Bench()
    result = bench.sweep([gelu(64), gelu(128)], problem=lambda item: "no" * (item.sizes["m"] == 64))

    assert [128] == [candidate.sizes["m"] for candidate in bench.order]
    assert ["no"] == [item.reason for item in result.skipped]


def test_interruption_keeps_what_was_measured() -> None:
    bench = Bench()

    def measure(candidate: Candidate) -> Record:
        if len(bench.order) == 2:
            raise KeyboardInterrupt
        return bench.measure(candidate)

    result = bench.sweep([gelu(64 * count) for count in range(1, 6)], measure=measure)

    assert result.is_interrupted
    assert 2 == result.num_measured == len(bench.kept)
    assert 3 == result.num_left


def test_a_second_sweep_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    candidates = [gelu(64 * count) for count in range(1, 6)]
    store.append([record_of(candidate, 1e-6) for candidate in candidates[:3]])
    records, problems = store.read()

    def known(**conditions: int | bool) -> int:
        return len(
            measured_here(
                records,
                candidates,
                device="cpu",
                machine=describe_machine(),
                software=describe_software(),
                conditions={"num_threads": 1, "cache_flushed": False, "clock": None} | conditions,
            )
        )

    assert [] == problems
    assert (3, 0, 0) == (known(), known(num_threads=2), known(cache_flushed=True))

    bench = Bench()
    pairs = list(zip(candidates, records, strict=False))
    result = bench.sweep(candidates, known=pairs)

    assert (2, 3) == (result.num_measured, result.num_known)


def test_other_software_does_not_count_as_measured() -> None:
    import msgspec

    candidate = gelu(64)
    software = describe_software()
    other = msgspec.structs.replace(software, packages={**software.packages, "torch": "1.0"})

    assert [] == measured_here(
        [record_of(candidate, 1e-6)],
        [candidate],
        device="cpu",
        machine=describe_machine(),
        software=other,
        conditions={},
    )


def test_drawn_sizes_depend_on_the_seed_and_stay_within_limits() -> None:
    limits = Limits(flop=1e9, bytes=2.0**24)

    def drawn(seed: int) -> list[Candidate]:
        return sampled_candidates(
            ["linear", "sdpa"], [DtypeName.FP32], num_shapes=5, limits=limits, seed=seed
        )

    assert drawn(3) == drawn(3) != drawn(4)
    assert 20 == len({candidate.key for candidate in drawn(3)})
    for candidate in drawn(3):
        work = FAMILIES[candidate.op].work(candidate.sizes, Direction.FWD, 4)
        assert work.flop <= limits.flop
        assert work.bytes <= limits.bytes


@pytest.mark.dist
def test_kill_9_keeps_every_record_that_was_made(tmp_path: Path) -> None:
    """The process says each Record it has stored; after SIGKILL the store holds all of them."""
    program = textwrap.dedent(
        """
        import sys
        from meshwright.profiling.operators import *
        from meshwright.profiling.timer import Effort
        from meshwright.records import RecordStore
        store = RecordStore(sys.argv[1])
        def keep(record):
            store.append([record])
            print(record.extra["m"], flush=True)
        bench = OperatorBench(device="cpu", effort=Effort(budget_s=1e-3))
        run_sweep(SweepPlan(
            candidates=[FAMILIES["add"].candidate({"m": m, "n": 64}, Direction.FWD, DtypeName.FP32)
                        for m in range(16, 4096, 16)],
            measure=bench.measure, sink=keep, device="cpu", budget_s=600))
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(0.05)
        process.kill()
        said.extend(int(line) for line in process.stdout.read().split())
    records, problems = RecordStore(tmp_path).read()

    assert [] == problems
    assert set(said) <= {record.extra["m"] for record in records}
    assert len(records) <= len(said) + 1
