"""The mirror in W&B, read back from the file of an offline run; online against a stand-in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshwright.errors import BadRequest
from meshwright.tracking import Tracker, WandbMode, open_mirror
from tests.tracking.offline import ended_records_of


def start(folder: Path, mode: WandbMode, said: list[str], *, attempt: int = 1) -> Tracker | None:
    return open_mirror(
        mode,
        project="meshwright-tests",
        group="nightly",
        name="fit",
        run_id="f1t",
        folder=folder,
        complain=said.append,
        attempt=attempt,
    )


def tell_everything(tracker: Tracker, folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"abc")
    tracker.config({"seed": 7})
    tracker.artifact("data", kind="dataset", files=[], metadata={"sha256": "f00"})
    for step in range(3):
        tracker.metrics("operators/0", {"loss": 1.0 / (step + 1)}, step=step)
    tracker.table("worst", ["op", "error"], [["linear", 0.2]])
    tracker.artifact(
        "model",
        kind="model",
        files=[folder / "weights.safetensors"],
        metadata={"mape": 0.1},
        made_from=["f00"],
    )
    tracker.summary({"mape": 0.1})
    tracker.finish("finished")


def test_an_offline_run_holds_what_was_told(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B, an extra, is not installed")
    tracker = start(tmp_path, WandbMode.OFFLINE, [], attempt=2)
    assert tracker is not None
    tell_everything(tracker, tmp_path)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-f1t.wandb")
    records = ended_records_of(path)
    kinds = [record.WhichOneof("record_type") for record in records]
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    logged = [
        {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    artifacts = [
        record.artifact
        for record in records
        if record.WhichOneof("record_type") == "artifact" and record.artifact.type != "run_table"
    ]

    assert ("meshwright-tests", "nightly", "f1t") == (run.project, run.run_group, run.run_id)
    assert {"config", "exit"} <= {*kinds}
    assert [1.0, 0.5, 1 / 3] == [
        row["operators/0/loss"] for row in logged if "operators/0/loss" in row
    ]
    assert [2, 2, 2] == [row["operators/0/attempt"] for row in logged if "operators/0/loss" in row]
    assert ["table-file"] == [row["worst/_type"] for row in logged if "worst/_type" in row]
    assert ["dataset", "model"] == [item.type for item in artifacts]
    assert {"mape": 0.1, "made_from": ["f00"]} == json.loads(artifacts[1].metadata)
    assert "weights.safetensors" in [entry.path for entry in artifacts[1].manifest.contents]


def test_disabled_is_no_mirror_and_makes_no_files(tmp_path: Path) -> None:
    assert None is start(tmp_path, WandbMode.DISABLED, [])
    assert [] == list(tmp_path.iterdir())


class _StandIn:
    """The part of W&B that the mirror uses; ``online`` can be out of reach."""

    def __init__(self, *, is_reachable: bool) -> None:
        self.is_reachable = is_reachable
        self.calls: list[str] = []
        self.api = SimpleNamespace(api_key="key")
        self.Settings = dict
        self.config = self.summary = SimpleNamespace(update=lambda *_, **__: None)

    def init(self, *, mode: str, **_: Any) -> Any:
        self.calls.append(f"init {mode}")
        if mode == "online" and not self.is_reachable:
            raise TimeoutError("no answer\nfrom the server")
        summary: dict[str, Any] = {}
        return SimpleNamespace(
            config={},
            summary=summary,
            use_artifact=lambda artifact: self.calls.append(f"use {artifact.type}"),
            log_artifact=lambda artifact: self.calls.append(f"log {artifact.type}"),
            define_metric=lambda *_, **__: None,
            log=lambda _: None,
            finish=lambda exit_code: self.calls.append(f"finish {exit_code}"),
        )

    def Table(self, **_: Any) -> str:  # noqa: N802 - W&B's name
        return "table"

    def Artifact(self, name: str, *, type: str, metadata: Any) -> Any:  # noqa: N802
        del name, metadata
        return SimpleNamespace(
            type=type, new_file=lambda path, mode: open("/dev/null", mode), add_file=lambda _: None
        )


def test_online_the_model_is_made_from_the_data_it_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = _StandIn(is_reachable=True)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr("meshwright.tracking.mirror.find_spec", lambda _: "found")
    tracker = start(tmp_path, WandbMode.ONLINE, [])
    assert tracker is not None
    tracker.artifact("data", kind="dataset", files=[], metadata={})
    tracker.artifact("model", kind="model", files=[], metadata={})
    tracker.finish("failed")

    assert ["init online", "use dataset", "log model", "finish 1"] == stand_in.calls


def test_a_server_out_of_reach_makes_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = _StandIn(is_reachable=False)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr("meshwright.tracking.mirror.find_spec", lambda _: "found")
    said: list[str] = []
    tracker = start(tmp_path, WandbMode.ONLINE, said)

    assert tracker is not None
    assert ["init online", "init offline"] == stand_in.calls
    assert ["W&B cannot start online: no answer\\nfrom the server"] == said


def test_online_without_a_login_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = _StandIn(is_reachable=True)
    stand_in.api.api_key = None
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr("meshwright.tracking.mirror.find_spec", lambda _: "found")

    with pytest.raises(BadRequest, match="wandb login"):
        start(tmp_path, WandbMode.ONLINE, [])
