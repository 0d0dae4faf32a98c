"""Tables of runs, operators, collectives and steps: values, unknown columns, bad cells."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from meshwright.errors import BadRequest
from meshwright.profiling.traces.diagnosis import diagnose
from meshwright.profiling.traces.formats import TraceFormat
from meshwright.profiling.traces.importing import import_traces
from meshwright.profiling.traces.step_files import read_step_table
from meshwright.profiling.traces.tables import Column, ColumnType, read_table
from meshwright.records import Record, RecordStore, make_record
from meshwright.records.kinds import Kind

_RUN = {
    "run_id": "a-1", "source": "paper", "arch": "gpt", "model_name": "GPT 1.3B", "layers": 24.0,
    "gpu": "a100_sxm_80gb", "gpus": 8.0, "tp": 2.0, "gated_mlp": False, "oom": False,
    "step_time_s": 1.25, "color": "red",
}  # fmt: skip


def _csv(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "table.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def _rows_as_csv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    names = list(rows[0])
    lines = [",".join("" if row.get(key) is None else str(row[key]) for key in names)
             for row in rows]  # fmt: skip
    return _csv(folder, "\n".join([",".join(names), *lines]) + "\n")


@pytest.mark.parametrize("write", [_parquet, _rows_as_csv])
def test_a_table_of_runs(write: Any, tmp_path: Path) -> None:
    rows = [
        _RUN,
        _RUN | {"run_id": "a-2", "oom": True, "step_time_s": None},
        _RUN | {"run_id": "a-3", "step_time_s": None},
        _RUN | {"run_id": "a-4", "gpu": "tpu_v9"},
    ]

    (found,) = import_traces([write(tmp_path, rows)])

    assert TraceFormat.RUN_TABLE == found.format
    timed, oom, unheard_of = found.records
    assert ("run", "GPT 1.3B", "a100-sxm-80gb", "s", 1.25) == (
        timed.kind, timed.name, timed.device, timed.unit, timed.median,
    )  # fmt: skip
    assert (24, 2, False, "a-1") == tuple(
        timed.extra[key] for key in ("layers", "tp", "gated_mlp", "run_id")
    )
    assert ("ranks", 8.0) == (oom.unit, oom.median)
    assert "tpu_v9" == unheard_of.device
    assert ["color"] == found.summary["unknown_columns"]
    assert {"runs without a step time": 1} == found.summary["left_out"]
    assert timed.source.startswith("paper, table.")
    assert "sha256:" in timed.source


def test_a_table_of_operators(tmp_path: Path) -> None:
    row = {
        "gpu": "t4", "op": "linear", "direction": "fwd", "dtype": "fp16", "m": 64, "n": 128,
        "k": 256, "causal": None, "time_s": 1e-4, "source": "s", "memory_bytes": 512.0,
        "extra": '{"model":"gpt2","window":3}',
    }  # fmt: skip

    (found,) = import_traces([_parquet(tmp_path, [row, row | {"time_s": 1e6}])])

    (record,) = found.records
    assert ("operator", "linear", "t4", 1e-4) == (
        record.kind, record.name, record.device, record.median,
    )  # fmt: skip
    assert {
        "direction": "fwd", "dtype": "fp16", "m": 64, "n": 128, "k": 256, "saved_bytes": 512,
        "model": "gpt2",
    } == record.extra  # fmt: skip
    assert {"rows whose time, over a day, stands for a failure": 1} == found.summary["left_out"]


def test_tables_come_in_our_words_and_unknown_ones_are_counted(tmp_path: Path) -> None:
    operators = """gpu,op,direction,dtype,time_s
t4,linear,backward,float32,1
t4,linear,sideways,fp32,1
t4,linear,fwd,fp99,1
t4,linear,fwd,fp99,1
"""
    collectives = """gpu,collective,group_size,bytes,time_s,dtype
t4,AllGather,8,64,1,torch.bfloat16
t4,teleport,8,64,1,fp32
t4,all_reduce,1,64,1,fp32
"""

    (of_operators,) = import_traces([_csv(tmp_path, operators)])
    (of_collectives,) = import_traces([_csv(tmp_path, collectives)])

    (linear,), (gather,) = of_operators.records, of_collectives.records
    assert {"direction": "bwd", "dtype": "fp32"} == linear.extra
    assert ("all_gather", "bf16") == (gather.name, gather.extra["dtype"])
    assert {
        "rows of unknown direction such as 'sideways'": 1,
        "rows of unknown dtype such as 'fp99'": 2,
    } == of_operators.summary["left_out"]
    assert {
        "rows of unknown collective such as 'teleport'": 1,
        "rows of a collective of one rank alone": 1,
    } == of_collectives.summary["left_out"]


def test_a_table_of_collectives_goes_into_a_store(tmp_path: Path) -> None:
    text = "gpu,collective,group_size,bytes,time_s,fabric\nb200,all_gather,8,1048576,2e-5,nvlink\n"

    (found,) = import_traces([_csv(tmp_path, text)])
    RecordStore(tmp_path / "store").append(found.records)

    (record,) = RecordStore(tmp_path / "store").read()[0]
    assert found.records == (record,)
    assert {"bytes": 1048576, "group_size": 8, "fabric": "nvlink"} == record.extra


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run_id,gpu,layers\nx,t4,many\n", "layers: row 1: 'many' is not a whole number"),
        ("run_id,gpu,layers\nx,t4,1.5\n", "layers: row 1: 1.5 is not a whole number"),
        ("run_id,gpu,step_time_s\nx,t4,1\ny,t4,inf\n", "step_time_s: row 2: inf is not a number"),
        ("run_id,gpu,step_time_s\nx,t4,-1\n", "row 1: -1 is not a number of 0 or more"),
        ("run_id,gpu,oom\nx,t4,perhaps\n", "oom: row 1: 'perhaps' is not true or false"),
        ("run_id,gpu,gpu\nx,t4,t4\n", "has two columns 'gpu'"),
        ("run_id,gpu\nx\n", "not a table"),
        ("a,b\n1,2\n", "not a trace we know"),
    ],
)
def test_a_bad_cell_is_named_with_its_row(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        import_traces([_csv(tmp_path, text)])

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_type_in_parquet_and_a_damaged_one(tmp_path: Path) -> None:
    path = _parquet(tmp_path, [_RUN | {"layers": [1, 2]}])

    with pytest.raises(BadRequest, match=r"layers: is list.* where a whole number is needed"):
        import_traces([path])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadRequest, match="not a whole Parquet file"):
        import_traces([path])


def test_flipped_bytes_are_an_error_of_one_line_or_another_value(tmp_path: Path) -> None:
    """Two hundred times; names and texts that are no UTF-8 any more are among them."""
    path = _parquet(tmp_path, [_RUN | {"run_id": f"run-{index}"} for index in range(20)])
    data, rng, said = path.read_bytes(), random.Random(0), []
    for _ in range(200):
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 3, 20))):
            flipped[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(flipped)
        try:
            import_traces([path])
        except BadRequest as error:
            said.append(str(error))

    assert 100 < len(said)
    assert [] == [line for line in said if "\n" in line]


def test_a_table_too_large_is_refused(tmp_path: Path) -> None:
    path = _csv(tmp_path, "a\n" + "1\n" * 1000)

    with pytest.raises(BadRequest, match="more than"):
        read_table(path, (Column(name="a", type=ColumnType.INTEGER),), max_bytes=100)


_STEPS = "rank,iteration,step_s,wait_s\n0,0,2,0.5\n1,0,2,1.5\n0,1,2,0.5\n"


def test_step_times_from_csv_parquet_and_json_are_the_same(tmp_path: Path) -> None:
    """Iteration 1 lacks rank 1 and is left out."""
    rows = [
        {"rank": 0, "iteration": 0, "step_s": 2.0, "wait_s": 0.5},
        {"rank": 1, "iteration": 0, "step_s": 2.0, "wait_s": 1.5},
    ]
    zipped = tmp_path / "steps.csv.gz"
    zipped.write_bytes(gzip.compress(_STEPS.encode()))
    matrices = {"step_s": [[2.0], [2.0]], "wait_s": [[0.5], [1.5]]}
    tables = [
        read_step_table([path])
        for path in (
            _csv(tmp_path, _STEPS),
            zipped,
            _parquet(tmp_path, rows),
            _csv(tmp_path, json.dumps(rows), "rows.json"),
            _csv(tmp_path, json.dumps(matrices), "matrices.json"),
        )
    ]

    for table in tables:
        assert ((0, 1), (0,)) == (table.ranks, table.iterations)
        assert table.compute_s is not None
        assert [[1.5], [0.5]] == table.compute_s.tolist()


def test_iterations_that_a_rank_lacks_are_named(tmp_path: Path) -> None:
    ragged = {"step_s": [[1.0] * 14, [1.0, 1.0]]}

    table = read_step_table([_csv(tmp_path, json.dumps(ragged), "ragged.json")])

    expected = "left out, for not all ranks have them: iterations 2, 3, 4, 5, 6, 7, 8, 9 and 4 more"
    assert (expected,) == table.notes
    assert expected in diagnose(table).notes


def _steps_of(model: str, source: str) -> list[Record]:
    return [
        make_record(
            kind=Kind.STEP_TIME, name=model, device="t4", verb="test", method="made up", unit="s",
            median=1.0 + rank, source=source,
            extra={"precision": "fp32", "rank": rank, "iteration": 3},
        )
        for rank in range(2)
    ]  # fmt: skip


def test_of_a_store_with_several_jobs_one_is_chosen(tmp_path: Path) -> None:
    """What was added twice counts once; a job is chosen by a part of its source or its model."""
    store = RecordStore(tmp_path / "store")
    for model, source in (("gpt2", "a.json sha256:1"), ("bert", "b.json sha256:2")) * 2:
        store.append(_steps_of(model, source))

    with pytest.raises(BadRequest) as caught:
        read_step_table([tmp_path / "store"])

    assert "holds the steps of 2 jobs; choose one with --source" in str(caught.value)
    assert "gpt2 of a.json sha256:1; bert of b.json sha256:2" in str(caught.value)
    for choice in ("b.json", "bert"):
        assert (0, 1) == read_step_table([tmp_path / "store"], source=choice).ranks
    with pytest.raises(BadRequest, match=r"no job of 'c'; there are gpt2 of a\.json"):
        read_step_table([tmp_path / "store"], source="c")


def test_files_of_a_rank_each_are_one_job_and_other_jobs_are_not(tmp_path: Path) -> None:
    first, second = _steps_of("gpt2", "a.json sha256:1"), _steps_of("gpt2", "b.json sha256:2")
    other = _steps_of("bert", "c.json sha256:3")
    by_rank, mixed = RecordStore(tmp_path / "by rank"), RecordStore(tmp_path / "mixed")
    by_rank.append([first[0], second[1]])
    mixed.append([first[0], other[1]])

    assert (0, 1) == read_step_table([by_rank.path]).ranks
    with pytest.raises(BadRequest, match="holds the steps of 2 jobs; choose one"):
        read_step_table([mixed.path])


def test_step_times_from_a_store(tmp_path: Path) -> None:
    """Waiting is communication beside which nothing ran: 0.5 - 0.2 s."""
    store = RecordStore(tmp_path / "store")
    store.append(
        make_record(
            kind=Kind.STEP_TIME,
            name="gpt2",
            device="t4",
            verb="test",
            method="made up",
            unit="s",
            median=2.0,
            extra={
                "precision": "fp32", "rank": rank, "iteration": 3, "compute_s": 1.0,
                "communication_s": 0.5, "overlap_s": 0.2,
            },
        )
        for rank in range(2)
    )  # fmt: skip

    table = read_step_table([tmp_path / "store"])

    assert table.wait_s is not None
    assert [0.3, 0.3] == pytest.approx(table.wait_s[:, 0].tolist())
    assert (3,) == table.iterations


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("rank,iteration,step_s\n0,0,1\n", "a.csv", "has 1 rank"),
        ("rank,iteration,step_s\n0,0,1\n0,0,1\n1,0,1\n", "a.csv", "there twice"),
        ("rank,iteration,wait_s\n0,0,1\n1,0,1\n", "a.csv", "needs step_s"),
        ("rank,iteration,step_s\n0,0,1\n1,1,1\n", "a.csv", "no iteration has a time of each"),
        ("rank,step_s\n0,1\n", "a.csv", "has no column iteration"),
        (
            "rank,iteration,step_s,wait_s\n0,0,1,2\n1,0,1,0\n",
            "a.csv",
            "rank 0, iteration 0: wait_s is 2, longer than its step of 1",
        ),
        (
            "rank,iteration,step_s,compute_s\n0,0,1,0\n1,0,1,3\n",
            "a.csv",
            "rank 1, iteration 0: compute_s is 3, longer",
        ),
        ('{"step_time": {}, "plan_sha256": ""}', "a.json", "is a StepReport"),
        ('{"speed": [[1]]}', "a.json", "has speed; give step_s"),
        ('{"step_s": [[1], [2]], "wait_s": [[1]]}', "a.json", "matrices differ"),
        ('{"step_s": [[1], ["x"]]}', "a.json", "$.step_s[1][0]: is no number"),
        ('[{"rank": -1}]', "a.json", "$[0].rank: must be a whole number"),
    ],
)
def test_bad_step_tables_say_what_to_do(text: str, name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        read_step_table([_csv(tmp_path, text, name)])

    assert said in str(caught.value)
