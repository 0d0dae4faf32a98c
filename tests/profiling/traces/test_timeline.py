"""Made-up profiler traces whose shares, operators and collectives are worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import BadRequest
from meshwright.profiling.traces import columns
from meshwright.profiling.traces.columns import RankTrace, read_rank_trace
from meshwright.profiling.traces.families import operator_identity
from meshwright.profiling.traces.rank_analysis import RankAnalysis, analyze
from meshwright.profiling.traces.sources import open_members
from meshwright.profiling.traces.timeline import cover_of
from meshwright.profiling.traces.words import dtype_of
from tests.profiling.traces.made_traces import AUTOGRAD, MAIN, TraceMaker


def _read(maker: TraceMaker, folder: Path) -> RankTrace:
    members = open_members(maker.write(folder / "trace.json"))
    return read_rank_trace(next(members))


def _analyzed(maker: TraceMaker, folder: Path) -> RankAnalysis:
    return analyze(_read(maker, folder))


def test_shares_of_an_iteration_add_up(tmp_path: Path) -> None:
    """A step of 100 us: kernels 10-40 and 30-50 on two streams, NCCL 45-70, a copy 80-90.

    Compute 10-50 and 80-90: 50. Communication 45-70: 25. Both 45-50: 5. Busy 70, idle 30.
    """
    maker = TraceMaker().note("ProfilerStep#7", 1000, 100)
    maker.kernel("gemm", 1010, 30).kernel("relu", 1030, 20, stream=8)
    maker.kernel("ncclDevKernel_AllReduce", 1045, 25, stream=20)
    maker.kernel("Memcpy HtoD", 1080, 10, category="gpu_memcpy")

    found = _analyzed(maker, tmp_path)

    assert [(7, 0, 100_000)] == [(i.number, i.start_ns, i.end_ns) for i in found.iterations]
    ((device,),) = ([one.device for one in found.devices],)
    (share,) = found.devices[0].shares
    microseconds = [
        round(seconds * 1e6, 6)
        for seconds in (
            share.span_s, share.compute_s, share.communication_s, share.overlap_s, share.idle_s,
            share.exposed_s, share.copy_only_s,
        )
    ]  # fmt: skip
    assert 0 == device
    assert [100, 50, 25, 5, 30, 20, 10] == microseconds
    assert (3, 3) == (found.devices[0].num_kernels, found.devices[0].num_streams)


def test_work_is_cut_at_the_ends_of_iterations(tmp_path: Path) -> None:
    """A kernel 80-130 lies 20 us in each of two steps and 10 us after the last."""
    maker = TraceMaker().note("ProfilerStep#1", 0, 100).note("ProfilerStep#2", 100, 20)
    maker.kernel("gemm", 80, 50)

    (device,) = _analyzed(maker, tmp_path).devices

    assert [20e-6, 20e-6] == pytest.approx([share.compute_s for share in device.shares])
    assert 10e-6 == pytest.approx(device.after_s)


def test_steps_of_the_optimizer_stand_in_for_marks(tmp_path: Path) -> None:
    """Two optimizers take turns; the step ends with the one that ends last."""
    maker = TraceMaker()
    for start in (0, 100, 220):
        maker.note("Optimizer.step#Adam.step", start + 50, 10)
        maker.note("Optimizer.step#SGD.step", start + 70, 10)

    found = _analyzed(maker, tmp_path)

    assert "from one optimizer step's end to the next" == found.iterations_by
    assert [100e-6, 120e-6] == pytest.approx(
        [(one.end_ns - one.start_ns) * 1e-9 for one in found.iterations]
    )


def test_without_marks_the_whole_trace_is_one_and_it_is_said(tmp_path: Path) -> None:
    found = _analyzed(TraceMaker().op("aten::add", 5, 10).kernel("add", 20, 30), tmp_path)

    assert not found.marked
    assert "none marked: the whole trace" == found.iterations_by
    assert 45e-6 == pytest.approx(found.median_step_s)


def test_kernels_belong_to_the_innermost_operator_at_their_launch(tmp_path: Path) -> None:
    """Linear holds addmm, which launches two kernels; a launch after it belongs to linear."""
    shapes = {"Input Dims": [[64], [8, 32], [32, 64]], "Input type": ["float", "float", "float"]}
    maker = TraceMaker().op("aten::linear", 0, 100).op("aten::addmm", 10, 40, **shapes)
    maker.launch(1, 20).launch(2, 30).launch(3, 60).launch(4, 60, thread=AUTOGRAD)
    maker.kernel("gemm", 200, 7, correlation=1).kernel("bias", 210, 3, correlation=2)
    maker.kernel("copy", 220, 2, correlation=3).kernel("lost", 230, 4, correlation=4)
    maker.kernel("nowhere", 240, 5, correlation=99)

    operators = _analyzed(maker, tmp_path).operators

    found = {group.name: (group.times_s, group.num_kernels) for group in operators.groups}
    assert {"aten::addmm", "aten::linear"} == set(found)
    assert ((pytest.approx(10e-6),), 2) == found["aten::addmm"]
    assert ((pytest.approx(2e-6),), 1) == found["aten::linear"]
    assert (2, pytest.approx(9e-6)) == (operators.num_unassigned, operators.unassigned_s)
    assert pytest.approx(21e-6) == operators.device_s


def test_directions_come_from_what_surrounds_an_operator(tmp_path: Path) -> None:
    maker = TraceMaker()
    maker.op("aten::mm", 0, 10).launch(1, 5)
    maker.op("autograd::engine::evaluate_function: MmBackward0", 20, 30, thread=AUTOGRAD)
    maker.op("aten::mm", 25, 10, thread=AUTOGRAD).launch(2, 30, thread=AUTOGRAD)
    maker.note("Optimizer.step#SGD.step", 60, 20)
    maker.op("aten::mm", 65, 10).launch(3, 70)
    for number in (1, 2, 3):
        maker.kernel("gemm", 100 * number, number, correlation=number)

    groups = _analyzed(maker, tmp_path).operators.groups

    assert {"fwd": 1e-6, "bwd": 2e-6, "update": 3e-6} == pytest.approx(
        {group.direction: group.total_s for group in groups}
    )


def test_an_external_id_helps_where_the_launch_is_missing(tmp_path: Path) -> None:
    maker = TraceMaker().op("aten::mm", 0, 10, **{"External id": 5})
    maker.kernel("gemm", 50, 3, correlation=77, **{"External id": 5})
    maker.kernel("other", 60, 3, correlation=6, **{"External id": 6})

    operators = _analyzed(maker, tmp_path).operators

    assert ["aten::mm"] == [group.name for group in operators.groups]
    assert 1 == operators.num_unassigned


def test_without_a_device_operators_cost_their_own_time_on_the_host(tmp_path: Path) -> None:
    """Linear 0-100 holds addmm 10-60, which holds copy 20-30: 50, 40 and 10 of their own."""
    maker = TraceMaker().note("ProfilerStep#0", 0, 200)
    maker.op("aten::linear", 0, 100).op("aten::addmm", 10, 50).op("aten::copy_", 20, 10)
    maker.note("gloo:all_reduce", 90, 40, thread=AUTOGRAD)

    found = _analyzed(maker, tmp_path)

    own = {group.name: group.total_s for group in found.operators.groups}
    (share,) = found.devices[0].shares
    assert {"aten::linear": 50e-6, "aten::addmm": 40e-6, "aten::copy_": 10e-6} == pytest.approx(own)
    assert not found.operators.on_device
    assert -1 == found.devices[0].device
    assert [100e-6, 40e-6, 10e-6, 70e-6] == pytest.approx(
        [share.compute_s, share.communication_s, share.overlap_s, share.idle_s]
    )


def test_nanoseconds_survive_times_since_1970(tmp_path: Path) -> None:
    """1.7e15 us and a quarter is all a double holds; 4.4e12 us hold a nanosecond."""
    late = _read(TraceMaker().op("a", 1712195495519689.25, 1.125), tmp_path).operators
    fine = TraceMaker().op("a", 4458676522690.655, 0.001).op("b", 4458676522690.656, 0.5)
    times = _read(fine, tmp_path).operators

    assert (250, 1375) == (int(late.start_ns[0]), int(late.end_ns[0]))
    assert [655, 656] == times.start_ns.tolist()
    assert [656, 1156] == times.end_ns.tolist()


def test_odd_events_are_left_out_and_counted(tmp_path: Path) -> None:
    maker = TraceMaker().op("aten::mm", 0, 10).op("aten::mm", 20, -1)
    maker.events += [
        {"ph": "X", "cat": "cpu_op", "name": "no times"},
        {"ph": "X", "cat": "cpu_op", "name": "far", "ts": 1e300, "dur": 1},
        {"ph": "X", "cat": "cpu_op", "name": "text", "ts": "5", "dur": 1, "args": {"stream": []}},
        {"ph": "B", "name": "begin", "ts": 1},
        {"ph": "E", "ts": 2},
        {"ph": "X", "cat": "kernel", "name": "k", "ts": 5, "dur": 1e300, "args": [1]},
        {"name": 5},
        {},
    ]
    trace = _read(maker, tmp_path)

    assert (10, 3, 2) == (trace.num_events, trace.num_dropped, trace.num_begin_end)
    assert [10_000, 0] == (trace.operators.end_ns - trace.operators.start_ns).tolist()
    assert 1 == len(trace.work)


def test_more_events_than_memory_holds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "_MAX_KEPT", 3)
    maker = TraceMaker().op("a", 0, 1).op("a", 2, 1).launch(1, 3)

    assert 3 == _read(maker, tmp_path).num_events
    with pytest.raises(BadRequest, match=r"trace\.json: more than 3 events"):
        _read(maker.kernel("k", 9, 1), tmp_path)


def test_names_that_would_fill_the_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "_MAX_NAMES_BYTES", 10_000)
    maker = TraceMaker()
    for number in range(100):
        maker.op(f"name {number}", number, 1)

    with pytest.raises(BadRequest, match="of different names and shapes"):
        _read(maker, tmp_path)


def test_peak_memory_is_by_device(tmp_path: Path) -> None:
    maker = TraceMaker().op("aten::mm", 0, 10)
    for device, kind, total in ((0, 1, 500), (0, 1, 900), (0, 1, 400), (1, 1, 7), (-1, 0, 10**6)):
        args = {"Total Allocated": total, "Device Type": kind, "Device Id": device}
        maker.events.append({"ph": "i", "name": "[memory]", "ts": 1, "args": args})

    assert {0: 900, 1: 7} == _read(maker, tmp_path).peak_memory_bytes


@given(
    spans=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=12),
    low=st.integers(0, 60),
    length=st.integers(0, 30),
)
def test_covers_are_what_counting_gives(
    spans: list[tuple[int, int]], low: int, length: int
) -> None:
    start = np.array([one for one, _ in spans], dtype=np.int64)
    end = start + np.array([size for _, size in spans], dtype=np.int64)
    counted = sum(
        any(one <= moment < one + size for one, size in spans)
        for moment in range(low, low + length)
    )

    cover = cover_of(start, end)

    assert [counted] == cover.measure_ns(np.array([low]), np.array([low + length])).tolist()


@pytest.mark.parametrize(
    ("name", "dims", "family", "sizes"),
    [
        ("aten::addmm", [[64], [8, 32], [32, 64]], "linear", {"m": 8, "n": 64, "k": 32}),
        ("aten::mm", [[8, 32], [32, 64]], "linear", {"m": 8, "n": 64, "k": 32}),
        ("aten::bmm", [[4, 8, 32], [4, 32, 64]], "bmm", {"b": 4, "m": 8, "n": 64, "k": 32}),
        (
            "aten::cudnn_convolution", [[2, 64, 56, 40], [128, 16, 3, 3]], "conv2d",
            {"b": 2, "channels_in": 64, "channels_out": 128, "kernel": 3, "height": 56,
             "width": 40, "groups": 4},
        ),
        ("aten::native_layer_norm", [[4, 128, 96], [], [96], [96]], "layer_norm",
         {"m": 512, "n": 96}),
        ("aten::_scaled_dot_product_flash_attention", [[2, 8, 128, 64], [2, 4, 256, 64], []],
         "sdpa", {"b": 2, "heads": 8, "kv_heads": 4, "seq_q": 128, "seq_k": 256, "head_dim": 64}),
        ("aten::_flash_attention_forward", [[2, 128, 8, 64], [2, 256, 4, 64], []],
         "sdpa", {"b": 2, "heads": 8, "kv_heads": 4, "seq_q": 128, "seq_k": 256, "head_dim": 64}),
        ("aten::relu", [[4, 8]], "aten::relu", {"shape": "[[4,8]]", "numel": 32}),
        ("aten::mm", [[8, 32], [31, 64]], "aten::mm", {"shape": "[[8,32],[31,64]]", "numel": 256}),
        ("aten::mm", [], "aten::mm", {"shape": "[]"}),
    ],
)  # fmt: skip
def test_families(name: str, dims: list[list[int]], family: str, sizes: dict[str, int]) -> None:
    assert (family, sizes) == operator_identity(name, dims, direction="fwd")


def test_a_product_of_a_backward_pass_keeps_its_name() -> None:
    name, extra = operator_identity("aten::mm", [[8, 32], [32, 64]], direction="bwd")

    assert ("aten::mm", "[[8,32],[32,64]]") == (name, extra["shape"])


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        ("float", "fp32"), ("Float", "fp32"), ("c10::Half", "fp16"), ("torch.float16", "fp16"),
        ("BFloat16", "bf16"), ("c10::Float8_e5m2", "fp8_e5m2"),
        ("long int", "int64"), ("unsigned char", "uint8"),
        ("TensorList", None), (5, None),
    ],
)  # fmt: skip
def test_types_in_the_profiler_s_words(word: object, dtype: str | None) -> None:
    assert dtype == dtype_of(word)


def test_two_threads_do_not_enclose_one_another(tmp_path: Path) -> None:
    maker = TraceMaker().op("outer", 0, 100, thread=MAIN).op("other", 10, 10, thread=AUTOGRAD)
    maker.launch(1, 15, thread=AUTOGRAD).launch(2, 50, thread=AUTOGRAD)
    maker.kernel("a", 200, 1, correlation=1).kernel("b", 210, 1, correlation=2)

    operators = _analyzed(maker, tmp_path).operators

    assert ["other"] == [group.name for group in operators.groups]
    assert 1 == operators.num_unassigned
