"""``meshwright fit``: small tables in, weights, cards and an index out; and its ways to refuse."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from meshwright.cost.work import Family
from meshwright.gnn_cost.fitting.cards import ModelCard
from meshwright.gnn_cost.pretrained_pricing import load_pricing
from meshwright.records import RecordStore
from meshwright.tracking import read_lines
from tests.cli.conftest import Run
from tests.cli.small_training import linear_of_t4

GPUS = {"a100_sxm_80gb": 1.0, "v100_sxm2_32gb": 2.2}
SMALL = ("--members", "2", "--epochs", "2", "--rows-per-cell", "60")


def operators(path: Path, *, factor: float = 1.0, gpus: tuple[str, ...] = tuple(GPUS)) -> Path:
    """Products and norms at 60 % of an A100's data sheet, V100s 2.2 times slower; 40 of each."""
    rng = np.random.default_rng(0)
    rows = []
    for gpu in gpus:
        for number in range(40):
            m, n, k = (2 ** rng.integers(9, 13, 3)).tolist()
            op = ("linear", "layer_norm")[number % 2]
            ideal_s = 2 * m * n * k / 312e12 if op == "linear" else 4 * m * n / 2e12
            rows.append(
                {
                    "source": "ours",
                    "gpu": gpu,
                    "op": op,
                    "direction": "fwd",
                    "dtype": "fp16",
                    "m": m,
                    "n": n,
                    "k": k if op == "linear" else None,
                    "time_s": factor * GPUS[gpu] * (3e-6 + ideal_s / 0.6),
                }
            )
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small fit."""
    from meshwright.cli.main import main

    folder = tmp_path_factory.mktemp("fit")
    table = operators(folder / "ops.parquet")
    told = ["--license", "ours=MIT, of us"]
    assert 0 == main(["fit", "--tables", str(table), "-o", str(folder / "w"), *SMALL, *told])
    return folder / "w"


def test_a_fit_gives_weights_that_price_and_a_card_that_tells(fitted: Path) -> None:
    card = msgspec.json.decode((fitted / "card.json").read_bytes(), type=ModelCard)
    index, problems = read_lines(fitted / "index.jsonl")
    metrics, _ = read_lines(fitted / "metrics.jsonl")
    pricing = load_pricing(fitted)

    assert [] == problems
    assert "finished" == index[-1]["status"]
    assert ["ops.parquet"] == [source.name for source in card.data]
    assert 80 == card.data[0].num_rows
    assert "all" in [item.group for item in card.parts["operators"].splits]
    assert {"operators/ensemble/0", "operators/ensemble/1"} == {line["group"] for line in metrics}
    assert "collectives" in card.skipped
    assert pricing.operators is not None
    assert "--seed 0 --members 2 --epochs 2" in card.reproduce
    assert card.reproduce.endswith("--license 'ours=MIT, of us'")
    assert {"ours": "MIT, of us"} == card.licenses
    assert str(fitted.parent) not in (fitted / "card.json").read_text()


def test_equal_seeds_give_bit_equal_weights_from_csv_too(
    meshwright: Run, fitted: Path, tmp_path: Path
) -> None:
    """The same rows as CSV: another hash of the data, the same weights."""
    table = operators(tmp_path / "ops.csv")
    answer = meshwright("fit", table, "-o", "again", "--json", *SMALL)

    assert 0 == answer.status, answer.err
    assert "finished" == answer.document["status"]
    assert (fitted / "operators.safetensors").read_bytes() == (
        tmp_path / "again" / "operators.safetensors"
    ).read_bytes()


def test_a_device_that_is_left_out_is_judged(meshwright: Run, tmp_path: Path) -> None:
    table = operators(tmp_path / "ops.parquet")
    answer = meshwright(
        *("fit", "--tables", table, "-o", "w", "--json", *SMALL),
        *("--leave-out", "v100-sxm2-32gb"),
    )
    splits = answer.document["parts"]["operators"]["splits"]
    judged = [item for item in splits if item["split"] == "without device: v100-sxm2-32gb"]

    assert 40 == next(item["num_samples"] for item in judged if item["group"] == "all")
    assert all(math.isfinite(item["mape"]) for item in judged)


def test_a_budget_ends_a_fit_and_resume_finishes_it(meshwright: Run, tmp_path: Path) -> None:
    table = operators(tmp_path / "ops.parquet")
    cut = meshwright("fit", "--tables", table, "-o", "w", "--budget", "1ms", "--json", *SMALL)
    whole = meshwright("fit", "--tables", table, "-o", "w", "--resume", "--json", *SMALL)
    meshwright("fit", "--tables", table, "-o", "at-once", *SMALL)

    assert "budget" == cut.document["status"]
    assert "finished" == whole.document["status"]
    assert cut.document["run_id"] == whole.document["run_id"]
    assert (tmp_path / "at-once" / "operators.safetensors").read_bytes() == (
        tmp_path / "w" / "operators.safetensors"
    ).read_bytes()


def test_wandb_offline_mirrors_the_index(meshwright: Run, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B, an extra, is not installed")
    table = operators(tmp_path / "ops.parquet")
    answer = meshwright(
        *("fit", "--tables", table, "-o", "w", "--wandb", "offline", "--group", "g", "--json"),
        *SMALL,
    )

    assert 0 == answer.status, answer.err
    assert [] == answer.document["tracking_problems"]
    assert 1 == len(list((tmp_path / "w").glob("wandb/offline-run-*/*.wandb")))


def test_calibration_corrects_one_device_and_no_other(
    meshwright: Run, fitted: Path, tmp_path: Path
) -> None:
    """The user's A100 is 1.4 times slower than what was learned from."""
    slower = operators(tmp_path / "mine.parquet", factor=1.4, gpus=("a100_sxm_80gb",))
    answer = meshwright("fit", "--calibrate", slower, "--weights", fitted, "-o", "mine", "--json")
    assert 0 == answer.status, answer.err
    (found,) = answer.document["calibrations"]
    before, after = load_pricing(fitted), load_pricing(tmp_path / "mine")
    prices = {}
    for name in ("a100-sxm-80gb", "v100-sxm2-32gb"):
        prices[name] = [price_s(pricing, name) for pricing in (before, after)]

    assert "a100-sxm-80gb" == found["device"]
    assert found["error_after"] <= found["error_held_out"] < found["error_before"]
    assert prices["v100-sxm2-32gb"][0].tobytes() == prices["v100-sxm2-32gb"][1].tobytes()
    assert (prices["a100-sxm-80gb"][0] != prices["a100-sxm-80gb"][1]).any()
    assert before.sha256 != after.sha256


def price_s(pricing: object, device: str) -> np.ndarray:
    from meshwright.cluster.catalog import find_device
    from meshwright.cost.work import DTYPES, OperatorWork

    sizes = np.array([[1.0, 512.0, 512.0, 512.0], [1.0, 4096.0, 4096.0, 4096.0]])
    work = OperatorWork(
        family=np.full(2, Family.MATMUL),
        dtype=np.full(2, DTYPES.index("float16")),
        dims=sizes,
        flop=2 * sizes.prod(axis=1),
        num_bytes=6 * sizes[:, 1] ** 2,
        edges=np.zeros((2, 0), np.int64),
        edge_kind=np.zeros(0, np.int64),
    )
    priced = pricing.operators.operators(  # type: ignore[attr-defined]
        work, find_device(device, where="test").device
    )
    return np.asarray(priced.time_s)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --records DIR or --tables FILE"),
        (("--tables", "nowhere.parquet"), "nowhere.parquet"),
        (("--tables", "odd.csv"), "no table of operators, collectives or runs"),
        (("--records", "empty"), "holds no measured operators or collectives"),
        (("--tables", "ops.parquet", "--members", "0"), "--members: 0"),
        (("--tables", "ops.parquet", "--budget", "soon"), "--budget"),
        (("--tables", "ops.parquet", "--leave-out", "t4"), "nothing was measured on 't4'"),
        (("--tables", "ops.parquet", "--license", "MIT"), "SOURCE=LICENSE"),
        (("--tables", "ops.parquet", "--weights", "w"), "goes with --calibrate"),
        (("--calibrate", "odd.csv", "--weights", "empty"), "no learned cost model"),
        (("--calibrate", "nowhere", "--weights", "empty"), "nowhere: cannot be read: No such file"),
        (("--calibrate", "/dev/null"), "neither a file nor a folder"),
    ],
)
def test_bad_requests_are_one_line(
    meshwright: Run, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    operators(tmp_path / "ops.parquet")
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty").mkdir()
    answer = meshwright("fit", *words)

    assert 1 == answer.status
    assert 1 == len(answer.lines_of_error), answer.err
    assert message in answer.lines_of_error[0]


def test_a_folder_with_a_fit_is_not_overwritten(
    meshwright: Run, fitted: Path, tmp_path: Path
) -> None:
    before = (fitted / "card.json").read_bytes()
    answer = meshwright("fit", "--tables", operators(tmp_path / "ops.parquet"), "-o", fitted)

    assert 1 == answer.status
    assert "--resume" in answer.lines_of_error[0]
    assert before == (fitted / "card.json").read_bytes()


def test_wandb_that_is_not_installed_is_one_line(
    meshwright: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshwright.tracking.mirror.find_spec", lambda _: None)
    table = operators(tmp_path / "ops.parquet")
    answer = meshwright("fit", "--tables", table, "-o", "w", "--wandb", "offline")

    assert 1 == answer.status
    assert "pip install" in answer.lines_of_error[0]
    assert not (tmp_path / "w").exists()


def test_records_of_unknown_devices_cannot_calibrate(meshwright: Run, tmp_path: Path) -> None:
    record = msgspec.structs.replace(linear_of_t4(512), device="nothing-1")
    RecordStore(tmp_path / "store").append([record])
    answer = meshwright("fit", "--calibrate", "store", "-o", "mine")

    assert 1 == answer.status
    assert 1 == len(answer.lines_of_error)
    assert "device not in the catalog; say by --cluster" in answer.lines_of_error[0]
    assert not (tmp_path / "mine").exists()
