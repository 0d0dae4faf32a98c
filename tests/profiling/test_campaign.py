"""The campaign: what it measures, what it leaves out, and the data it packs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from meshwright.plans import Precision
from meshwright.profiling import campaign as campaigns
from meshwright.profiling.campaign import ModelRun, model_runs, run_campaign
from meshwright.profiling.data.__main__ import pack
from meshwright.profiling.data.card import card
from meshwright.records import Kind, RecordStore

_EXACT = {"cpu": ((ModelRun(reference="tiny-resnet", batch=1), (1,)),)}
_ONE_MODEL = (ModelRun(reference="tiny-gpt?num_layers=1", batch=1, least_s=0.1),)


@pytest.fixture
def one_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaigns, "model_runs", lambda _: _ONE_MODEL)
    monkeypatch.setattr(campaigns, "_EXACT", _EXACT)


@pytest.mark.dist
@pytest.mark.usefixtures("one_tiny_model")
def test_ten_seconds_on_a_cpu(tmp_path: Path) -> None:
    """All parts begin; what is written can be packed and described."""
    said: list[str] = []

    result = run_campaign(
        RecordStore(tmp_path / "store"),
        device="cpu",
        device_name="cpu",
        budget_s=10.0,
        max_bytes=2**24,
        num_shapes=2,
        say=said.append,
    )

    records, problems = RecordStore(tmp_path / "store").read()
    assert ([], "") == (problems, result.stopped_by)
    assert len(records) == result.num_records > 0
    assert ["machine", "rare operators", "models", "operators of models", "other operators"] == [
        part.name for part in result.parts
    ]
    assert Kind.MACHINE in {record.kind for record in records}
    assert all(record.writer.endswith("profile campaign") for record in records)
    assert said[0].startswith("machine: ")
    packed = tmp_path / "packed"
    pack([tmp_path / "store"], packed)
    assert sorted(map(repr, records)) == sorted(map(repr, RecordStore(packed).read()[0]))
    assert f"{len(records)} Records from" in card(records)


@pytest.mark.usefixtures("one_tiny_model")
def test_records_stop_at_the_size_they_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaigns._Campaign, "_machine", lambda *_: None)

    result = run_campaign(
        RecordStore(tmp_path),
        device="cpu",
        device_name="cpu",
        budget_s=60.0,
        max_bytes=6000,
        num_shapes=1,
        say=lambda _: None,
    )

    records = RecordStore(tmp_path).read()[0]
    assert "5.9 KiB of records" == result.stopped_by
    assert len(records) == result.num_records > 0
    assert 6000 >= sum(len(msgspec.json.encode(record)) for record in records)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_kind_of_model_is_in_it(device: str) -> None:
    names = " ".join(run.reference for run in model_runs(device))

    assert [] == [word for word in ("gpt", "llama", "bert", "vit", "resnet") if word not in names]


def test_a_gpu_is_measured_in_both_precisions() -> None:
    assert {Precision.BF16, Precision.FP32} == {run.precision for run in model_runs("cuda")}
