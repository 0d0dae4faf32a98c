"""Outputs of nccl-tests, of several versions, come in as Records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meshwright.errors import BadRequest
from meshwright.profiling.traces.formats import ImportOptions, TraceFormat, detect_format
from meshwright.profiling.traces.importing import import_traces
from meshwright.profiling.traces.nccl_tests import import_nccl_tests

_NEW = """\
# Collective test starting: reduce_scatter_perf
# nThread 1 nGpus 4 minBytes 8 maxBytes 134217728 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1 validation: 1 graph: 0
#
# Using devices
#  Rank  0 Group  0 Pid  41219 on    host-1 device  0 [0000:07:00] NVIDIA A100-SXM4-80GB
#  Rank  1 Group  0 Pid  41219 on    host-1 device  1 [0000:0f:00] NVIDIA A100-SXM4-80GB
#  Rank  2 Group  0 Pid  41220 on    host-2 device  0 [0000:07:00] NVIDIA A100-SXM4-80GB
#  Rank  3 Group  0 Pid  41220 on    host-2 device  1 [0000:0f:00] NVIDIA A100-SXM4-80GB
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
           0             0     float     sum      -1     0.15    0.00    0.00      0     0.14    0.00    0.00      0
     1048576         65536     float     sum      -1    41.52   25.25   18.94      0    41.60   25.21   18.90      0
   134217728       8388608     float     sum      -1   1250.0  107.37   80.53      0   1249.0  107.46   80.60      3
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 56.8
"""  # noqa: E501

_OLD = """\
# nThread 1 nGpus 8 minBytes 1048576 maxBytes 2097152 step: 2(factor) warmup iters: 5 iters: 100 validation: 1
#
# Using devices
#   Rank  0 Pid  19655 on  dgx-1 device  0 [0x06] Tesla V100-SXM2-32GB
#   Rank  1 Pid  19655 on  dgx-1 device  1 [0x07] Tesla V100-SXM2-32GB
#   Rank  2 Pid  19655 on  dgx-1 device  2 [0x0a] Tesla V100-SXM2-32GB
#   Rank  3 Pid  19655 on  dgx-1 device  3 [0x0b] Tesla V100-SXM2-32GB
#
#                                                     out-of-place                       in-place
#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error
#        (B)    (elements)                     (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
     1048576        262144   float     sum    66.29   15.82   23.73  2e-07    66.12   15.86   23.79  2e-07
     2097152        524288   float     sum    83.26   25.19   37.78  2e-07    82.98   25.27   37.91    N/A
"""  # noqa: E501

_ALL_TO_ALL = """\
[1,0]<stdout>:# nThread 1 nGpus 2 minBytes 1 maxBytes 2 step: 2(factor) warmup iters: 5 iters: 20
[1,0]<stdout>:#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
[1,0]<stdout>:    67108864      16777216  bfloat16    none      -1    503.1  133.39   66.69      0    501.7  133.76   66.88    N/A
"""  # noqa: E501


_ALL_ON_ONE = "\n".join(
    line for line in _OLD.splitlines() if not re.search(r"Rank  [123]", line)
).replace("# nThread", "# all_reduce_perf nThread")


def _file(folder: Path, text: str, name: str = "output.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_new_output_with_its_devices(tmp_path: Path) -> None:
    path = _file(tmp_path, _NEW)

    (found,) = import_traces([path])

    assert TraceFormat.NCCL_TESTS == found.format
    first, in_place, last = found.records
    assert ("reduce_scatter", "a100-sxm-80gb", "s", 20) == (
        first.name, first.device, first.unit, first.num_repeats,
    )  # fmt: skip
    assert 41.52e-6 == pytest.approx(first.median)
    assert {
        "bytes": 1048576, "group_size": 4, "backend": "nccl", "dtype": "fp32", "in_place": False,
        "num_calls": 1, "hosts": 2, "ranks_per_host": 2,
    } == first.extra  # fmt: skip
    assert in_place.extra["in_place"] is True
    assert (134217728, False) == (last.extra["bytes"], last.extra["in_place"])
    assert {"results of no bytes": 2, "results that were wrong": 1} == found.summary["left_out"]
    assert "the spread of the repeats" in found.missing


def test_an_old_output_tells_its_collective_by_its_bandwidths(tmp_path: Path) -> None:
    """23.73 / 15.82 is 1.5, which is 2 (n - 1) / n of four ranks: an all-reduce."""
    (found,) = import_nccl_tests([_file(tmp_path, _OLD)], ImportOptions())

    assert {"all_reduce"} == {record.name for record in found.records}
    assert [66.29e-6, 66.12e-6, 83.26e-6, 82.98e-6] == pytest.approx(
        [record.median for record in found.records]
    )
    assert {"v100-sxm2-32gb"} == {record.device for record in found.records}


def test_the_name_of_the_file_says_what_the_text_does_not(tmp_path: Path) -> None:
    """All ranks of one process; prefixes of the launcher are taken off."""
    (found,) = import_traces([_file(tmp_path, _ALL_TO_ALL, "alltoall_2gpu.log")])

    assert [("all_to_all", 2, "bf16")] * 2 == [
        (record.name, record.extra["group_size"], record.extra["dtype"]) for record in found.records
    ]
    assert "the devices" in found.missing
    with pytest.raises(BadRequest, match="put its name into that of the file"):
        import_traces([_file(tmp_path, _ALL_TO_ALL, "output.log")])


def test_a_log_of_several_tests_is_an_import_each(tmp_path: Path) -> None:
    """The second broke off before its first result and is counted."""
    broken_off = _NEW.split("           0  ")[0].replace("reduce_scatter_perf", "alltoall_perf")
    concluded = "# Collective test concluded: reduce_scatter_perf\n"
    log = _NEW + concluded + broken_off + "srun ./all_reduce_perf -b 1M\n" + _OLD

    first, second = import_traces([_file(tmp_path, log)])

    assert ["reduce_scatter", "all_reduce"] == [one.records[0].name for one in (first, second)]
    assert [3, 4] == [len(one.records) for one in (first, second)]
    assert 1 == first.summary["left_out"]["tests without any result"]
    assert {} == second.summary["left_out"]


def test_lines_that_hold_no_result_are_counted(tmp_path: Path) -> None:
    good = next(line for line in _OLD.splitlines() if line.startswith("     2097152"))
    broken = [
        "     4194304 Test NCCL failure common.cu:958 'remote process exited'",
        good.replace(" 2097152", "-2097152"),
        good.replace("83.26", "-83.26"),
    ]

    (found,) = import_traces([_file(tmp_path, _OLD + "\n".join(broken) + "\n")])

    assert 5 == len(found.records)
    assert {
        "lines of a size without a result": 2, "results without a time": 1,
    } == found.summary["left_out"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (_NEW.split("    1048576")[0], "did the test end early"),
        (_ALL_ON_ONE, "holds no usable result (left out: 4 results of one rank alone"),
        (_OLD.replace("#   Rank", "#   Rang"), "does not tell among how many ranks"),
        (_NEW.replace("Rank  3 Group  0", "Rank  3 Group  1"), "different numbers of ranks"),
    ],
)
def test_what_cannot_be_told_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        import_traces([_file(tmp_path, text)])

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_mangled_output_is_an_error_of_one_line_or_an_import(tmp_path: Path) -> None:
    """Every prefix, and every output with one piece cut out."""
    outcomes = []
    for at in range(0, len(_NEW), 97):
        for text in (_NEW[:at], _NEW[:at] + _NEW[at + 41 :]):
            path = _file(tmp_path, text)
            try:
                outcomes.append(len(import_traces([path])[0].records) > 0)
            except BadRequest as error:
                outcomes.append("\n" not in str(error))

    assert all(outcomes)


def test_it_is_told_from_other_files(tmp_path: Path) -> None:
    assert TraceFormat.NCCL_TESTS == detect_format(_file(tmp_path, _NEW))
    assert TraceFormat.NCCL_TESTS == detect_format(_file(tmp_path, _ALL_TO_ALL))
