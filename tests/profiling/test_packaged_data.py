"""The measurements that come with the package are whole, of known kinds, and as the card says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from meshwright.errors import MissingProfile
from meshwright.profiling import data
from meshwright.profiling.data import CARD_PATH, packaged_records
from meshwright.profiling.data.card import card
from meshwright.records import Kind, RecordStore
from meshwright.records.kinds import KINDS

_MAX_FILE_BYTES = 10 * 10**6


def test_every_record_is_whole_and_of_a_known_kind() -> None:
    verified = RecordStore(CARD_PATH.parent).verify()

    assert 0 < len(packaged_records())
    assert not verified.problems
    for record in packaged_records():
        keys = KINDS[Kind(record.kind)]
        assert record.unit in keys.units
        assert [] == [key for key in record.extra if not keys.allows(key)]
        assert record.num_repeats == len(record.samples) or not record.samples
        assert record.measured_utc


def test_files_are_small() -> None:
    files = list(CARD_PATH.parent.glob("*.parquet"))

    assert files
    assert [] == [path.name for path in files if path.stat().st_size >= _MAX_FILE_BYTES]


def test_the_card_is_that_of_the_data() -> None:
    assert card(packaged_records()) == CARD_PATH.read_text(encoding="utf-8")


def test_the_card_counts_what_is_there() -> None:
    """Counted here, not by the card's own code."""
    lines = CARD_PATH.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    counts = Counter((record.device, record.kind, record.name) for record in packaged_records())

    assert counts == {tuple(row[:3]): int(row[3]) for row in rows[2:]}


def test_what_was_asked_for_is_in_it() -> None:
    """Attention, normalization, softmax, embedding, grouped products and Adam; models' steps."""
    operators = {record.name for record in packaged_records() if record.kind == Kind.OPERATOR}
    backward = {
        record.name for record in packaged_records() if record.extra.get("direction") == "bwd"
    }

    assert {"sdpa", "layer_norm", "softmax", "embedding", "grouped_mm"} <= backward
    assert {"adam", "adamw"} <= operators
    assert any(record.kind == Kind.STEP_TIME for record in packaged_records())


def test_the_card_counts_what_was_cut_by_tensor_parallelism() -> None:
    cut = [int(record.extra["tp"]) for record in packaged_records() if record.extra.get("tp")]
    words = ", ".join(f"{count} of {tp}" for tp, count in sorted(Counter(cut).items()))

    assert {1, 2, 4} <= set(cut)
    assert f"by tensor-parallel degree: {words}\n" in CARD_PATH.read_text(encoding="utf-8")


def test_steps_of_real_models_are_in_it_and_repeated() -> None:
    steps = [record for record in packaged_records() if record.kind == Kind.STEP_TIME]
    large = [record for record in steps if int(record.extra["num_params"] or 0) > 2e7]

    assert {"gpt2", "bert-base", "vit-b16", "resnet-50"} <= {record.name for record in large}
    assert {"fp32", "bf16"} == {record.extra["precision"] for record in steps}
    assert all(record.num_repeats >= 3 for record in steps)


def test_data_that_is_not_there_says_how_to_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged_records.cache_clear()
    monkeypatch.setattr(data, "_FOLDER", tmp_path)

    with pytest.raises(MissingProfile, match="meshwright profile campaign"):
        packaged_records()
    packaged_records.cache_clear()
