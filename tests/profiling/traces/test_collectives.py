"""Collectives of made-up ranks: what each says of itself, and what the ranks say together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshwright.profiling.traces.collectives import CollectiveCall, collective_name
from meshwright.profiling.traces.columns import read_rank_trace
from meshwright.profiling.traces.formats import TraceImport
from meshwright.profiling.traces.importing import import_traces
from meshwright.profiling.traces.rank_analysis import analyze
from meshwright.profiling.traces.rank_sets import RankCalls, match_ranks
from meshwright.profiling.traces.sources import open_members
from meshwright.profiling.traces.step_files import read_step_table
from tests.profiling.traces.made_traces import TraceMaker

KERNEL = "ncclDevKernel_AllReduce_Sum_f32_RING_LL"


def _calls(maker: TraceMaker, folder: Path) -> tuple[CollectiveCall, ...]:
    members = open_members(maker.write(folder / "trace.json"))
    return analyze(read_rank_trace(next(members))).calls


def _said(call: CollectiveCall) -> tuple[object, ...]:
    return call.name, call.num_bytes, call.dtype, call.group_size, call.group


def test_the_kernel_s_own_arguments_come_first(tmp_path: Path) -> None:
    """1000 bf16 elements of each of 4 ranks are gathered to 8,000 bytes."""
    maker = TraceMaker().kernel(
        "ncclDevKernel_AllGather_RING_LL", 10, 5,
        **{
            "Collective name": "_allgather_base", "In msg nelems": 1000, "Out msg nelems": 4000,
            "dtype": "BFloat16", "Group size": 4, "Process Group Name": "tp", "Seq": 17,
        },
    )  # fmt: skip

    (call,) = _calls(maker, tmp_path)

    assert ("all_gather", 8000, "bf16", 4, "tp") == _said(call)
    assert (17, None, pytest.approx(5e-6)) == (call.sequence, call.iteration, call.time_s)


def test_parameters_the_host_recorded_around_the_launch(tmp_path: Path) -> None:
    maker = TraceMaker(
        distributedInfo={"rank": 0, "world_size": 8, "pg_config": [{"pg_name": "0", "pg_size": 8}]}
    )
    maker.note("ProfilerStep#3", 0, 200)
    maker.op(
        "record_param_comms", 20, 30,
        **{"Collective name": "reduce_scatter_tensor_coalesced", "In msg nelems": 800,
           "Out msg nelems": 100, "dtype": "Float", "Process Group Name": "0"},
    ).launch(5, 30)  # fmt: skip
    maker.kernel("ncclKernel_ReduceScatter", 100, 40, correlation=5)

    (call,) = _calls(maker, tmp_path)

    assert ("reduce_scatter", 3200, "fp32", 8, "0") == _said(call)
    assert (3, 30_000) == (call.iteration, call.launch_ns)


def test_shapes_of_annotations_and_operators_tell_sizes(tmp_path: Path) -> None:
    """An annotation lists inputs; c10d's base operators the output first."""
    maker = TraceMaker()
    maker.note(
        "nccl:all_reduce", 0, 10, **{"Input Dims": [[10, 10], [5]], "Input type": ["c10::Half"]}
    )
    maker.launch(1, 5).kernel("ncclKernel_AllReduce_RING_LL_Sum_half", 50, 5, correlation=1)
    maker.op(
        "c10d::_allgather_base_", 100, 10,
        **{"Input Dims": [[64], [16], []], "Input type": ["signed char", "signed char", ""]},
    ).launch(2, 105)  # fmt: skip
    maker.kernel("ncclKernel_AllGather", 150, 5, correlation=2)

    found = [_said(call) for call in _calls(maker, tmp_path)]

    assert [
        ("all_reduce", 210, "fp16", None, None),
        ("all_gather", 64, "int8", None, None),
    ] == found


def test_what_is_not_said_stays_unknown(tmp_path: Path) -> None:
    (call,) = _calls(TraceMaker().kernel("ncclKernel_SendRecv_RING_SIMPLE", 0, 5), tmp_path)

    assert ("send_recv", None, None, None, None) == _said(call)


def test_kernels_of_one_call_count_as_one(tmp_path: Path) -> None:
    maker = TraceMaker().op("record_param_comms", 0, 50, **{"Collective name": "alltoallv"})
    maker.launch(1, 10).launch(2, 20)
    maker.kernel("ncclKernel_SendRecv", 100, 10, correlation=1)
    maker.kernel("ncclKernel_SendRecv", 120, 30, correlation=2)

    (call,) = _calls(maker, tmp_path)

    assert ("all_to_all", 0, 50_000) == (call.name, call.start_ns - 100_000, call.end_ns - 100_000)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("allreduce_coalesced", "all_reduce"), ("nccl:_all_gather_base", "all_gather"),
        ("ALLTOALL_BASE", "all_to_all"), ("ncclDevKernel_ReduceScatter_Sum_bf16", "reduce_scatter"),
        ("nccl:send 0->1", "send_recv"), ("wait", None), ("gemm", None),
    ],
)  # fmt: skip
def test_names(word: str, name: str | None) -> None:
    assert name == collective_name(word)


def _call(start: int, end: int, **changes: Any) -> CollectiveCall:
    fields: dict[str, Any] = {
        "name": "all_reduce", "num_bytes": 400, "dtype": "fp32", "group_size": None,
        "group": None, "sequence": None, "iteration": 0, "start_ns": start, "end_ns": end,
        "launch_ns": start,
    }  # fmt: skip
    return CollectiveCall(**{**fields, **changes})


def _rank(rank: int, zero_ns: int, *calls: CollectiveCall) -> RankCalls:
    return RankCalls(rank=rank, zero_ns=zero_ns, calls=calls)


def test_ranks_side_by_side() -> None:
    """Rank 2 comes last, at 90; all end at 100. Rank 1's clock is 1,000,000 ns ahead."""
    found = match_ranks(
        [
            _rank(0, 0, _call(10, 100), _call(200, 300)),
            _rank(1, 1_000_000, _call(30, 100), _call(280, 300)),
            _rank(2, 0, _call(90, 100), _call(240, 300)),
        ],
        world_size=3,
    )

    first, second = found.collectives
    assert {0: 0.0, 1: pytest.approx(1e-3), 2: 0.0} == found.clock_errors_s
    assert (3, (0, 1, 2), True, 400) == (
        first.group_size, first.ranks, first.sizes_agree, first.num_bytes,
    )  # fmt: skip
    assert (2, 1) == (first.last_rank, second.last_rank)
    assert [10e-9, 80e-9, 0.0] == pytest.approx(
        [first.transfer_s, first.start_skew_s, first.end_skew_s]
    )
    assert 70e-9 == pytest.approx(first.waited_s)  # the mean of 80 and 60
    assert (2, ()) == (found.slowest_rank, found.unmatched)


def test_sizes_that_disagree_are_said() -> None:
    ranks = [_rank(0, 0, _call(0, 9)), _rank(1, 0, _call(0, 9, num_bytes=500))]

    (one,) = match_ranks(ranks, world_size=2).collectives

    assert one.sizes_agree is False


def test_unequal_parts_of_an_all_to_all_are_no_disagreement() -> None:
    parts = [_call(0, 9, name="all_to_all", num_bytes=size) for size in (400, 500)]

    (one,) = match_ranks([_rank(0, 0, parts[0]), _rank(1, 0, parts[1])], world_size=2).collectives

    assert (None, False, 500) == (one.sizes_agree, one.sizes_are_equal, one.num_bytes)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ((_call(0, 9), _call(10, 19)), "rank 0 has 1 collectives, rank 1 2"),
        (
            (_call(0, 9, name="broadcast"),),
            "collective 0 is all_reduce of fp32 on rank 0, broad",
        ),
        ((_call(0, 9, dtype=None),), "all_reduce of unknown type on rank 1"),
        ((), "only rank 0 of 2 has it"),
    ],
)
def test_lists_that_differ_are_not_matched(other: tuple[CollectiveCall, ...], problem: str) -> None:
    found = match_ranks([_rank(0, 0, _call(0, 9)), _rank(1, 0, *other)], world_size=2)

    assert () == found.collectives
    assert problem in found.unmatched[0]


def test_sequence_numbers_order_calls() -> None:
    """Two streams interleave differently on the ranks; the numbers tell which is which."""
    one, two, three = (_call(20 * n, 20 * n + 9, sequence=n) for n in (1, 2, 3))
    late = _call(50, 59, sequence=1)

    found = match_ranks([_rank(0, 0, one, two, three), _rank(1, 0, two, late, three)], world_size=2)

    assert [30e-9, 0.0, 0.0] == pytest.approx([call.start_skew_s for call in found.collectives])


def _job(folder: Path, *, ranks: int = 3, delay: float = 0.0) -> list[Path]:
    """Ranks of one job: steps of 100 us, an all-reduce of 4,000 bytes that ends at 90.

    Rank 1 computes 10-(40 + delay), the others 10-40; each joins when it has computed.
    """
    paths = []
    for rank in range(ranks):
        maker = TraceMaker(
            distributedInfo={"backend": "nccl", "rank": rank, "world_size": ranks},
            deviceProperties=[{"id": rank, "name": "NVIDIA A100-SXM4-80GB"}],
        )
        for step in range(3):
            at = 1.7e15 + 100 * step
            busy = 30 + (delay if rank == 1 else 0.0)
            maker.note(f"ProfilerStep#{step}", at, 100)
            dims = {"Input Dims": [[8, 32], [32, 64]], "Input type": ["float", "float"]}
            maker.op("aten::mm", at + 1, 8, **dims).launch(step + 1, at + 5)
            maker.kernel("gemm", at + 10, busy, correlation=step + 1, device=rank)
            maker.kernel(
                KERNEL, at + 10 + busy, 80 - busy, correlation=-1, stream=9, device=rank,
                **{"Collective name": "allreduce", "In msg nelems": 1000, "dtype": "Float"},
            )  # fmt: skip
        paths.append(maker.write(folder / f"rank{rank}.json.gz"))
    return paths


def _only(found: list[TraceImport]) -> TraceImport:
    assert 1 == len(found)
    return found[0]


def test_ranks_of_a_job_are_one_import(tmp_path: Path) -> None:
    found = _only(import_traces(_job(tmp_path, delay=20.0)))

    summary = found.summary["set"]
    assert 3 == len(summary["collectives"])
    assert (1, [1, 1, 1]) == (
        summary["slowest_rank"], [one["last_rank"] for one in summary["collectives"]],
    )  # fmt: skip
    by_kind = {kind: [r for r in found.records if r.kind == kind] for kind in
               ("step_time", "collective", "operator")}  # fmt: skip
    assert (9, 1, 1) == tuple(len(records) for records in by_kind.values())
    (collective,) = by_kind["collective"]
    assert ("all_reduce", "a100-sxm-80gb") == (collective.name, collective.device)
    assert {
        "bytes": 4000,
        "group_size": 3,
        "dtype": "fp32",
        "backend": "nccl",
    } == collective.extra
    assert 30e-6 == pytest.approx(collective.median)  # of rank 1, which waits for nobody
    (linear,) = by_kind["operator"]
    assert ("linear", 9) == (linear.name, linear.num_repeats)
    assert {"direction": "fwd", "dtype": "fp32", "m": 8, "n": 64, "k": 32} == linear.extra
    steps = {(r.extra["rank"], r.extra["iteration"]): r.extra for r in by_kind["step_time"]}
    assert [50e-6, 30e-6, 0.0, 20e-6] == pytest.approx(
        [steps[1, 2][key] for key in ("compute_s", "communication_s", "overlap_s", "idle_s")]
    )


def test_the_import_says_what_is_missing(tmp_path: Path) -> None:
    found = _only(import_traces(_job(tmp_path, ranks=1)))

    text = "; ".join(found.missing)
    assert "the model (name it with --model)" in text
    assert "the group of 3 of 3 collectives" in text
    assert "memory" in text
    assert [] == [record for record in found.records if record.kind == "collective"]
    assert {"unknown"} == {r.name for r in found.records if r.kind == "step_time"}
    assert {"2023-11-14T22:13:20+00:00"} == {record.measured_utc for record in found.records}


def test_jobs_of_other_times_or_sizes_are_kept_apart(tmp_path: Path) -> None:
    """Same world, but the second job ran when the first was over."""
    paths = _job(tmp_path, ranks=2)
    text = json.loads(TraceMaker(distributedInfo={"backend": "nccl", "rank": 1, "world_size": 2})
                      .op("aten::mm", 1.8e15, 5).text())  # fmt: skip
    (tmp_path / "later.json").write_text(json.dumps(text))

    found = import_traces([*paths, tmp_path / "later.json"])

    assert [2, 1] == [len(one.names) for one in found]


def test_a_diagnosis_of_traces_says_whom_the_others_waited_for(tmp_path: Path) -> None:
    table = read_step_table(_job(tmp_path, delay=30.0))

    (note,) = table.notes
    assert "the others waited longest for rank 1: " in note
    assert "last in 3 of 3; `meshwright traces show` lists them" in note
