"""``meshwright traces diagnose`` and the verbs that import tables, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from meshwright.cli.main import main
from tests.profiling.traces.troubled_tables import troubled_set


def _table(folder: Path) -> tuple[Path, int]:
    """A CSV file in which one rank is slow, and which."""
    table, trouble = troubled_set(np.random.default_rng(1), "persistent")
    assert table.wait_s is not None
    lines = ["rank,iteration,step_s,wait_s"] + [
        f"{rank},{at},{table.step_s[rank, at]},{table.wait_s[rank, at]}"
        for rank in table.ranks
        for at in table.iterations
    ]
    path = folder / "steps.csv"
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return path, trouble.ranks[0]


def test_the_slow_rank_in_words_in_json_and_on_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, rank = _table(tmp_path)
    page = tmp_path / "page.html"

    assert 0 == main(["traces", "diagnose", str(path)])
    said = capsys.readouterr().out
    assert 0 == main(["traces", "diagnose", str(path), "--json", "-o", str(page)])
    document = json.loads(capsys.readouterr().out)

    assert f"rank {rank} is slow in iterations" in said
    assert [rank] == [item["rank"] for item in document["slow_ranks"]]
    assert not document["healthy"]
    assert f"rank {rank} is slow" in page.read_text(encoding="utf-8")


def test_one_iteration_is_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though one rank is twice as slow as the others."""
    path = tmp_path / "steps.csv"
    path.write_text("rank,iteration,step_s,wait_s\n0,0,2,1\n1,0,2,1\n2,0,2,0\n", encoding="ascii")

    assert 0 == main(["traces", "diagnose", str(path)])
    said = capsys.readouterr().out
    assert 0 == main(["traces", "diagnose", str(path), "--json"])
    document = json.loads(capsys.readouterr().out)

    assert "no verdict: one iteration cannot tell" in said
    assert "rank 2 is slow" not in said
    assert "no rank stands out" not in said
    assert ([], False, False) == tuple(
        document[key] for key in ("slow_ranks", "healthy", "is_conclusive")
    )


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00\xff\xfe", b"PAR1", b"PAR1" * 9, b"{", b"[]", b"rank,iteration\n", b"\x1f\x8b\x08"],
    ids=repr,
)
def test_files_that_are_no_table_are_one_line(
    data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "steps"
    path.write_bytes(data)

    assert 1 == main(["traces", "diagnose", str(path)])

    said = capsys.readouterr().err
    assert said.startswith("meshwright: ")
    assert "steps: " in said
    assert 1 == said.count("\n")


def test_tables_are_imported_whole_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, store = tmp_path / "good.csv", tmp_path / "bad.csv", tmp_path / "store"
    good.write_text("job_id,duration_s,gpus\na,5,8\n", encoding="ascii")
    bad.write_text("job_id,duration_s,gpus\na,soon,8\n", encoding="ascii")

    assert 1 == main(["traces", "import", str(good), str(bad), "--store", str(store)])
    assert not store.exists()
    assert "duration_s: row 1: 'soon' is not a number" in capsys.readouterr().err
    assert 0 == main(["traces", "import", str(good), "--store", str(store)])
    assert "1 records added" in capsys.readouterr().out


def test_a_share_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 1 == main(["traces", "diagnose", str(tmp_path), "--min-share", "2"])
    assert "--min-share" in capsys.readouterr().err
