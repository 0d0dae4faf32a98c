"""Tables of operators of strangers: cells read kindly, rows left out by reason, figures by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshwright.bench.operator_report import OperatorsReport
from meshwright.bench.operators import OperatorsEvaluation, evaluate_operators
from meshwright.cost.calibration import DEFAULTS
from meshwright.errors import BadRequest
from meshwright.gnn_cost.pretrained_pricing import StepFigures
from meshwright.tracking import file_sha256


def _evaluated(folder: Path, text: str) -> OperatorsEvaluation:
    path = folder / "ops.csv"
    path.write_text(text, encoding="utf-8")
    return evaluate_operators(path, ["analytic"], tell=lambda line: None)


def test_cells_are_read_kindly(tmp_path: Path) -> None:
    """Numbers as text, blanks, words for true; a bad number costs its row alone."""
    found = _evaluated(
        tmp_path,
        "gpu,op,direction,dtype,m,n,k,b,seq_q,seq_k,heads,kv_heads,head_dim,causal,time_s\n"
        " a100_sxm_80gb ,linear,fwd,bf16,4096.0,4096,4e3,,,,,,,,1e-3\n"
        "a100_sxm_80gb,sdpa,fwd,bf16,,,,1,2048,2048,16,16,64,True,1e-3\n"
        "a100_sxm_80gb,linear,fwd,bf16,many,4096,4096,,,,,,,,1e-3\n"
        "a100_sxm_80gb,linear,fwd,bf16,4096,4096,4096,,,,,,,,-1\n",
    )

    assert [0, 1] == found.row.tolist()
    assert [1e-3, 1e-3] == found.measured_s.tolist()
    assert {3, 4} == {first for _, first in found.skipped.values()}
    assert {"m is no number", "no time"} == set(found.skipped)
    assert 2 == sum(count for count, _ in found.skipped.values())
    # 2 x 4096 x 4096 x 4000 flop over 312e12 a second are 430 us
    assert 430e-6 < found.predicted_s["analytic"][0] < 600e-6


def test_figures_by_kind(tmp_path: Path) -> None:
    """Twice the same product; measured at its predicted time once, at twice that the other time."""
    head = "gpu,op,direction,dtype,m,n,k,time_s,source\n"
    row = "a100_sxm_80gb,linear,fwd,bf16,8192,8192,8192,{},{}\n"
    time_s = _evaluated(tmp_path, head + row.format(1, "a")).predicted_s["analytic"][0]
    found = _evaluated(tmp_path, head + row.format(time_s, "a") + row.format(2 * time_s, "b"))
    document = OperatorsReport(found).document()

    assert pytest.approx(0.25) == document["overall"]["mape"]
    assert pytest.approx(-0.25) == document["overall"]["bias"]
    assert pytest.approx(0.0, abs=1e-9) == document["by_source"]["a"]["mape"]
    assert pytest.approx(0.5) == document["by_source"]["b"]["mape"]
    assert [2, 1] == [one["row"] for one in document["worst"]]
    assert 2 == document["overall"]["long"]["n"]


def test_a_table_a_model_was_fitted_on_is_named_as_such(tmp_path: Path) -> None:
    """The card of a fit lists the file's hash among its data; another file's it does not."""
    fit = tmp_path / "fit"
    fit.mkdir()
    StepFigures(calibration=DEFAULTS.to_json(), interval=(0.9, 1.1)).write(fit)
    table = tmp_path / "ops.csv"
    head = "gpu,op,direction,dtype,m,n,k,time_s\n"
    row = "a100_sxm_80gb,linear,fwd,bf16,8192,8192,8192,{}\n"
    table.write_text(head + row.format(5e-3), encoding="utf-8")
    card = {"data": [{"name": "ops.csv", "sha256": file_sha256(table)}], "sha256": "0" * 64}
    (fit / "card.json").write_text(json.dumps(card), encoding="utf-8")
    names = [str(fit), "analytic"]
    seen = OperatorsReport(evaluate_operators(table, names, tell=lambda line: None))
    table.write_text(head + row.format(6e-3), encoding="utf-8")
    unseen = OperatorsReport(evaluate_operators(table, names, tell=lambda line: None))

    assert [True, False] == [found.document()["is_in_sample"] for found in (seen, unseen)]
    assert not seen.document()["compared"]["analytic"]["is_in_sample"]
    assert "fitted on this very table" in seen.headline()
    assert "fitted" not in unseen.headline()


def test_group_sizes_stand_in_their_order(tmp_path: Path) -> None:
    head = "gpu,collective,fabric,group_size,hosts,bytes,time_s\n"
    rows = "".join(f"a100_sxm_80gb,all_reduce,nvlink,{n},,1e6,1e-4\n" for n in (8, 2, 4))
    rows += "a100_sxm_80gb,all_reduce,ib,16,2,1e6,1e-4\n"
    rows += "a100_sxm_80gb,all_reduce,ib,2.5,1,1e6,1e-4\n"
    rows += "a100_sxm_80gb,all_reduce,ib,2,4,1e6,1e-4\n"
    rows += "a100_sxm_80gb,all_reduce,nvlink,1,1,1e6,1e-4\n"
    document = OperatorsReport(_evaluated(tmp_path, head + rows)).document()

    assert ["2", "4", "8", "16"] == list(document["by_group_size"])
    assert {5, 6, 7} == {one["first_row"] for one in document["skipped"]}
    assert "group_size is 1: nothing is exchanged" in [one["reason"] for one in document["skipped"]]


def test_hosts_of_one_rack_exchange_by_nvlink(tmp_path: Path) -> None:
    """18 hosts of an NVL72 rack as one, and slower where the fabric between them is InfiniBand."""
    head = "gpu,collective,fabric,group_size,hosts,bytes,time_s\n"
    cells = ("nvlink,72,18", "nvlink,72,1", "ib,72,18")
    rows = "".join(f"gb200,all_gather,{one},1e7,1e-4\n" for one in cells)
    told, alone, network = _evaluated(tmp_path, head + rows).predicted_s["analytic"]

    assert alone == told
    assert 3 * alone < network


@pytest.mark.parametrize("text", ["", "a\n1\n", "gpu,op\nt4,add\n"])
def test_no_such_table(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadRequest, match=r"ops\.csv"):
        _evaluated(tmp_path, text)


def test_a_table_without_rows(tmp_path: Path) -> None:
    document = OperatorsReport(_evaluated(tmp_path, "gpu,op,dtype,m,n,time_s\n")).document()

    assert (0, None) == (document["overall"]["n"], document["overall"]["mape"])
    assert [] == document["worst"]
