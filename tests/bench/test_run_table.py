"""Tables of runs of strangers: what is read kindly, what costs a row, what costs the file."""

from __future__ import annotations

import gzip
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from meshwright.bench.run_table import read_runs
from meshwright.errors import BadRequest

ROW: dict[str, Any] = {"run_id": "a", "gpu": "a100_sxm_80gb", "layers": 24.0, "step_time_s": 1.5}


def _csv(folder: Path, *lines: str) -> Path:
    path = folder / "runs.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "runs.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_cells_are_read_kindly(tmp_path: Path) -> None:
    """Blanks, 8.0, 1e0, words for true, every way to leave a cell empty."""
    path = _csv(
        tmp_path,
        "run_id,gpu,layers,tp,oom,sequence_parallel,hidden,micro_batch,step_time_s,color",
        " a , h100 sxm ,24.0,1e0,FALSE,yes,None,NaN,1.5,red",
    )
    table = read_runs(path)
    (run,) = table.runs

    assert ("a", "h100 sxm", 24, 1) == (run.run_id, run.gpu, run.layers, run.tp)
    assert (False, True) == (run.oom, run.sequence_parallel)
    assert (None, None, 1.5) == (run.hidden, run.micro_batch, run.step_time_s)
    assert "red" == table.labels[0]["color"]
    assert ("color",) == table.unknown


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ({"layers": 1.5}, "layers is 1.5"),
        ({"layers": -3.0}, "layers is -3.0"),
        ({"layers": math.inf}, "layers is inf"),
        ({"step_time_s": -1.0}, "step_time_s is -1.0"),
        ({"tp": "many"}, "tp is 'many'; it must be a number"),
        ({"oom": "perhaps"}, "oom is 'perhaps'; it must be true or false"),
        ({"gpu": None}, "gpu is missing"),
        ({"zero_stage": 7.0}, "zero_stage is 7"),
    ],
)
def test_a_bad_cell_costs_its_row(tmp_path: Path, cell: dict[str, Any], said: str) -> None:
    """And says which: the good row before it stays."""
    keys = {**ROW, **cell}
    good = {key: ROW.get(key) for key in keys}
    table = read_runs(_parquet(tmp_path, [good, keys | {"run_id": "b"}]))

    assert ["a"] == [run.run_id for run in table.runs]
    (skipped,) = table.skipped
    assert "b" == skipped.run_id
    assert skipped.reason.startswith("row 2: ")
    assert said in skipped.reason


def test_rows_without_a_name_are_named_by_their_number(tmp_path: Path) -> None:
    table = read_runs(_parquet(tmp_path, [ROW | {"run_id": None}, ROW]))

    assert ["row 1", "a"] == [run.run_id for run in table.runs]


def test_first_rows_only_and_gzip(tmp_path: Path) -> None:
    plain = _csv(tmp_path, "run_id,gpu,oom", *(f"{i},t4,True" for i in range(9)))
    path = tmp_path / "runs.csv.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    table = read_runs(path, limit=3)

    assert ["0", "1", "2"] == [run.run_id for run in table.runs]
    assert all(run.oom for run in table.runs)


def test_a_table_without_rows(tmp_path: Path) -> None:
    table = read_runs(_csv(tmp_path, "run_id,gpu,step_time_s"))

    assert (0, (), ()) == (table.num_rows, table.runs, table.skipped)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("a,b", "1,2"), "no column run_id and no gpu"),
        (("run_id,gpu", "1,2"), "holds nothing measured"),
        (("run_id,gpu,gpu,oom", "1,2,3,4"), "two columns"),
        (("",), "runs.csv"),
    ],
)
def test_what_is_no_table_of_runs(tmp_path: Path, lines: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadRequest, match=said) as caught:
        read_runs(_csv(tmp_path, *lines))

    assert "\n" not in str(caught.value)


def test_random_cells_never_raise(tmp_path: Path) -> None:
    """Two hundred tables of nonsense: every row is a run or has its reason."""
    rng = random.Random(0)
    cells = [
        "", "nan", "None", "1e999", "-1", "0", "1", "1.5", "8 GPUs", "true", "mixed:t4+v100",
        "\x1b[2J", "9" * 400, "1_000", "0x10", "bf16", "\u202e", "1e18", "-inf", "[1]",
    ]  # fmt: skip
    names = ["gpu", "layers", "tp", "step_time_s", "oom", "precision", "zero_stage", "params_b"]
    for _ in range(200):
        lines = [",".join(["run_id", *names])]
        lines += [",".join(["r", *(rng.choice(cells) for _ in names)]) for _ in range(5)]
        table = read_runs(_csv(tmp_path, *lines))

        assert 5 == len(table.runs) + len(table.skipped)
        assert all("\x1b" not in one.reason and len(one.reason) < 500 for one in table.skipped)
