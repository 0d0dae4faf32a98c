"""The local index: what is told is there, whatever kills the process or fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshwright.errors import BadRequest
from meshwright.tracking import (
    LocalTracker,
    Mirrored,
    WandbMode,
    bytes_sha256,
    read_lines,
    require_wandb,
    source_of,
)
from meshwright.tracking.tracker import Tracker


def test_everything_told_is_there(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"abc")
    tracker = LocalTracker(tmp_path)
    tracker.config({"seed": 0})
    tracker.metrics("operators/0", {"loss": np.float64(0.5), "error": float("nan")}, step=3)
    tracker.table("worst", ["op", "error"], [["linear", 0.2]])
    tracker.artifact(
        "m", kind="model", files=[tmp_path / "weights"], metadata={}, made_from=["f00"]
    )
    tracker.summary({"mape": 0.1})
    tracker.finish("finished")
    index, problems = read_lines(tmp_path / "index.jsonl")

    assert [] == problems
    assert ["started", "config", "table", "artifact", "summary", "finished"] == [
        line["event"] for line in index
    ]
    assert [{"name": "weights", "num_bytes": 3, "sha256": bytes_sha256(b"abc")}] == index[3][
        "files"
    ]
    assert ["f00"] == index[3]["made_from"]
    facts = {"group": "operators/0", "step": 3, "attempt": 1}
    assert [{**facts, "loss": 0.5, "error": None}] == read_lines(tmp_path / "metrics.jsonl")[0]


def test_goes_on_under_the_same_id_after_a_half_written_line(tmp_path: Path) -> None:
    first = LocalTracker(tmp_path)
    first.summary({"a": 1})
    first.metrics("g", {"x": 1.0}, step=1)
    with open(tmp_path / "index.jsonl", "ab") as file:
        file.write(b'{"event": "summ')
    second = LocalTracker(tmp_path)
    second.summary({"a": 2})
    second.metrics("g", {"x": 1.0}, step=1)
    index, problems = read_lines(tmp_path / "index.jsonl")

    assert [] == problems
    assert first.run_id == second.run_id
    assert ["started", "summary", "started", "summary"] == [line["event"] for line in index]
    assert [1, 2] == [line["attempt"] for line in index if line["event"] == "started"]
    assert [1, 2] == [line["attempt"] for line in read_lines(tmp_path / "metrics.jsonl")[0]]


def test_damaged_lines_are_told_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "index.jsonl").write_text('{"event": "a"}\n{"x": NaN}\n[1]\n{"event": "b"}\n')
    index, problems = read_lines(tmp_path / "index.jsonl")

    assert ["a", "b"] == [line["event"] for line in index]
    assert 2 == len(problems)
    assert "line 2" in problems[0]


class _Broken:
    """Fails at everything."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError("no space left\non device")

        return fail


def test_a_tracker_that_fails_stops_nothing_and_is_told_once(tmp_path: Path) -> None:
    said: list[str] = []
    broken: Tracker = _Broken()
    tracker = Mirrored([broken, LocalTracker(tmp_path)], complain=said.append)
    tracker.config({"a": 1})
    tracker.metrics("g", {"x": 1.0}, step=0)
    tracker.finish("finished")

    assert 1 == len(said)
    assert "_Broken failed and is off" in said[0]
    assert "\n" not in said[0]
    assert ["started", "config", "finished"] == [
        line["event"] for line in read_lines(tmp_path / "index.jsonl")[0]
    ]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(BadRequest, match="cannot write there"):
        LocalTracker(tmp_path / "file")


def test_the_hash_of_a_folder_is_that_of_its_data(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.parquet").write_bytes(b"data")
    (tmp_path / "two" / "index.json").write_text("{}")
    (tmp_path / "two" / "store.lock").write_text("")
    one, two = (source_of(tmp_path / name, kind="records", num_rows=1) for name in ("one", "two"))
    (tmp_path / "two" / "a.parquet").write_bytes(b"date")
    changed = source_of(tmp_path / "two", kind="records", num_rows=1)

    assert one.sha256 == two.sha256
    assert one.sha256 != changed.sha256
    assert ("two", 4) == (two.name, two.num_bytes)


def test_without_wandb_asking_for_it_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.tracking.mirror.find_spec", lambda _: None)
    require_wandb(WandbMode.DISABLED)

    with pytest.raises(BadRequest, match=r"pip install 'meshwright\[wandb\]'"):
        require_wandb(WandbMode.OFFLINE)
