"""``bench runs`` and ``bench ops`` from file to document, tables and plots."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.cli.conftest import Run

RUN: dict[str, Any] = {
    "run_id": "dp", "source": "here", "arch": "gpt", "model_name": "tiny", "layers": 2.0,
    "hidden": 256.0, "heads": 4.0, "kv_heads": 4.0, "ffn_hidden": 1024.0, "gated_mlp": False,
    "vocab": 1024.0, "seq_len": 128.0, "gpu": "a100_sxm_80gb", "gpus_per_host": 2.0, "hosts": 1.0,
    "gpus": 2.0, "precision": "bf16", "global_batch": 16.0, "micro_batch": 8.0, "dp": 2.0,
    "tp": 1.0, "pp": 1.0, "cp": 1.0, "ep": 1.0, "schedule": "none", "zero_stage": 0.0,
    "recompute": "none", "framework": "Megatron-Core", "step_time_s": 0.01, "oom": False,
    "peak_memory_bytes": 1e9,
}  # fmt: skip
FIGURES = {
    "n", "mape", "bias", "spearman_in_group", "regret_top1_mean", "regret_top1_p95",
    "regret_top3_mean", "memory_median_error", "oom_confusion",
}  # fmt: skip


def _table(folder: Path, rows: list[dict[str, Any]], name: str = "runs.parquet") -> Path:
    path = folder / name
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two plans that ran, one out of memory, and rows that cannot be predicted."""
    return _table(
        tmp_path,
        [
            RUN,
            RUN | {"run_id": "tp", "dp": 1.0, "tp": 2.0, "step_time_s": 0.02},
            RUN | {"run_id": "oom", "dp": 1.0, "tp": 2.0, "micro_batch": 16.0, "oom": True,
                   "step_time_s": None, "peak_memory_bytes": None},
            RUN | {"run_id": "unmeasured", "step_time_s": None, "peak_memory_bytes": None},
            RUN | {"run_id": "alien", "gpu": "tpu v9"},
            RUN | {"run_id": "mixed", "gpu": "mixed:t4+v100_sxm2_32gb", "layers": None},
            RUN | {"run_id": "negative", "hidden": -256.0},
        ],
    )  # fmt: skip


def test_document_of_runs(meshwright: Run, runs: Path) -> None:
    answer = meshwright(
        "bench", "runs", runs, "--cost-model", "analytic", "--by", "tp", "--json", "-o", "judged"
    )
    found = answer.document

    assert 0 == answer.status
    assert ["dp", "tp", "oom"] == [row["run_id"] for row in found["rows"]]
    assert {"unmeasured", "alien", "mixed", "negative"} == {
        one["run_id"] for one in found["skipped"]
    }
    assert all(one["reason"] for one in found["skipped"])
    assert [] == [key for key in FIGURES if key not in found["overall"]]
    assert ["here"] == list(found["by_source"])
    assert ["a100_sxm_80gb"] == list(found["by_gpu"])
    assert {"1.0": 1, "2.0": 1} == {key: one["n"] for key, one in found["by_tp"].items()}
    overall = found["overall"]
    assert (2, 1, 2) == (overall["n"], overall["groups"], overall["memory_n"])
    assert 3 == sum(overall["oom_confusion"].values())
    assert overall["regret_top1_mean"] in (0.0, pytest.approx(1.0))
    row = found["rows"][0]
    assert pytest.approx(row["predicted"]) == sum(row["breakdown"].values())
    assert row["interval"][0] <= row["predicted"] <= row["interval"][1]
    assert pytest.approx(row["predicted"] / 0.01 - 1) == row["error"]
    assert {} == found["compared"]
    assert 1 == len({r["group"] for r in found["rows"]})
    assert 3 == len({r["plan"] for r in found["rows"]})
    kept = json.loads(Path("judged/runs.json").read_text())
    assert kept["overall"] == overall
    for name in ("predicted", "regret"):
        ElementTree.parse(f"judged/{name}.svg")


def test_tables_of_runs(meshwright: Run, runs: Path) -> None:
    answer = meshwright(
        "bench", "runs", runs, "--cost-model", "analytic", "--limit", "5", "--plot", "p.svg"
    )

    assert 0 == answer.status
    assert "runs.parquet: 5 rows, 3 predicted by analytic, 2 left out" in answer.out
    for words in ("all", "here", "Megatron's rule", "predicted to fit", "worst rows", "alien"):
        assert words in answer.out
    assert "3 of 4 runs" in answer.err or "4 of 4 runs predicted" in answer.err
    assert "<svg" in Path("p.svg").read_text()


def test_no_row_can_be_predicted(meshwright: Run, tmp_path: Path) -> None:
    path = _table(tmp_path, [RUN | {"gpu": "abacus"}])
    answer = meshwright("bench", "runs", path, "--cost-model", "analytic", "--json")

    assert 0 == answer.status
    assert [] == answer.document["rows"]
    assert (0, None) == (answer.document["overall"]["n"], answer.document["overall"]["mape"])
    assert 1 == len(answer.document["skipped"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("runs", "none.parquet"), "cannot read the file"),
        (("runs", "plain.csv"), "no table of measured runs"),
        (("ops", "plain.csv", "--cost-model", "analytic"), "neither a table of operators"),
        (("runs", "runs.csv", "--by", "color"), "no column 'color'"),
        (("runs", "runs.csv", "--cost-model", "guess"), "no cost model 'guess'"),
        (("ops", "ops.csv", "--cost-model", "guess"), "no cost model 'guess'"),
        (("runs", "runs.csv", "--limit", "0"), "--limit"),
    ],
)
def test_user_errors_are_one_line(
    meshwright: Run, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    (tmp_path / "plain.csv").write_text("a,b\n1,2\n")
    (tmp_path / "runs.csv").write_text("run_id,gpu,oom\n1,t4,True\n")
    (tmp_path / "ops.csv").write_text("gpu,op,dtype,time_s\nt4,add,fp32,1e-5\n")
    answer = meshwright("bench", *words)

    assert 1 == answer.status
    assert "" == answer.out
    assert 1 == len(answer.lines_of_error)
    assert said in answer.lines_of_error[0]


def test_document_of_operators(meshwright: Run, tmp_path: Path) -> None:
    """An add of 2^28 floats moves 3 GiB: 2.07 ms at 1.555e12 bytes/s of an A100 of 40 GB."""
    add = {
        "gpu": "a100_sxm_40gb", "op": "add", "direction": "fwd", "dtype": "fp32", "m": 2.0**14,
        "n": 2.0**14, "time_s": 3 * 2**30 / 1.555e12, "source": "here",
    }  # fmt: skip
    rows = [add, add | {"gpu": "abacus"}, add | {"time_s": math.nan}, add | {"op": "conjure"}]
    answer = meshwright(
        "bench", "ops", _table(tmp_path, rows), "--cost-model", "analytic", "--json",
        "--plot", "ops.svg",
    )  # fmt: skip
    found = answer.document

    assert 0 == answer.status
    assert ("operators", 4, 1) == (found["what"], found["num_rows"], found["overall"]["n"])
    assert pytest.approx(0.0, abs=0.02) == found["overall"]["bias"]
    assert {"add": 1} == {name: one["n"] for name, one in found["by_op"].items()}
    assert 0.0 == found["overall"]["learned_share"]
    assert 3 == sum(one["rows"] for one in found["skipped"])
    assert {2, 3, 4} == {one["first_row"] for one in found["skipped"]}
    assert 1 == found["worst"][0]["row"]
    ElementTree.parse("ops.svg")


def test_tables_of_collectives(meshwright: Run, tmp_path: Path) -> None:
    row = {
        "gpu": "a100_sxm_80gb", "fabric": "nvlink", "collective": "all_reduce", "group_size": 8,
        "hosts": 1, "bytes": 2.0**28, "dtype": "fp16", "time_s": 2e-3, "source": "here",
    }  # fmt: skip
    bad: list[dict[str, Any]] = [
        {"group_size": 1}, {"gpu": "abacus"}, {"bytes": None}, {"collective": "shout"},
        {"time_s": 1e6},
    ]  # fmt: skip
    rows = [row, row | {"hosts": None}, *(row | change for change in bad)]
    path = _table(tmp_path, rows)
    answer = meshwright("bench", "ops", path, "--cost-model", "analytic", "--json")
    found = answer.document

    assert ("collectives", 2) == (found["what"], found["overall"]["n"])
    assert 5 == sum(one["rows"] for one in found["skipped"])
    # 2 x 7/8 x 2^28 bytes over 300e9 bytes/s are 1.57 ms
    assert 1.5e-3 < found["worst"][0]["predicted_s"] < 3e-3
    assert "all_reduce" in meshwright("bench", "ops", path, "--cost-model", "analytic").out
