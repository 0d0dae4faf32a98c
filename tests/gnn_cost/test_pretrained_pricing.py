"""One ``Pricing`` from the folder of a fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from meshwright.cluster import parse_cluster
from meshwright.cost.calibration import DEFAULTS, Origin
from meshwright.cost.pricing import ANALYTIC, ANALYTIC_INTERVAL
from meshwright.errors import BadRequest
from meshwright.gnn_cost.pretrained_pricing import (
    STEPS_NAME,
    StepFigures,
    load_pricing,
    named_pricing,
    pretrained_folder,
    usual_pricing,
)

CALIBRATION = DEFAULTS.with_figures(Origin.LEARNED, overlap_fraction=0.5)


def steps(folder: Path, interval: tuple[float, float] = (0.9, 1.2)) -> Path:
    StepFigures(calibration=CALIBRATION.to_json(), interval=interval).write(folder)
    return folder


def test_a_folder_with_figures_of_steps_alone(tmp_path: Path) -> None:
    found = load_pricing(steps(tmp_path))

    assert (CALIBRATION, (0.9, 1.2)) == (found.calibration, found.interval)
    assert found.operators is None
    assert found.collectives is None
    assert 64 == len(found.sha256)


def test_the_hash_tells_other_figures(tmp_path: Path) -> None:
    before = load_pricing(steps(tmp_path)).sha256

    assert before == load_pricing(tmp_path).sha256
    assert before != load_pricing(steps(tmp_path, (0.8, 1.2))).sha256


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="holds no learned cost model"):
        load_pricing(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"schema_version": 7, "calibration": {}, "interval": [0.9, 1.1]}',
        '{"calibration": {}, "interval": [0.9, 1.1]}',
        '{"calibration": {"schema_version": 1, "figures": {}}, "interval": [1.9, 1.1]}',
        '{"calibration": {"schema_version": 1, "figures": {"x": {"value": 1}}}, '
        '"interval": [0.9, 1.1]}',
    ],
)
def test_damaged_figures_are_an_error_of_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / STEPS_NAME).write_text(text, encoding="utf-8")

    with pytest.raises(BadRequest) as error:
        load_pricing(tmp_path)

    assert "\n" not in str(error.value)


def test_on_cpus_nothing_learned_is_used(tmp_path: Path) -> None:
    steps(tmp_path)

    assert ANALYTIC is usual_pricing(parse_cluster("cpu:2"))
    assert ANALYTIC is named_pricing("learned", parse_cluster("cpu:2"))
    assert ANALYTIC is named_pricing("analytic", parse_cluster("2xa100"))
    assert CALIBRATION == named_pricing(str(tmp_path), parse_cluster("cpu:2")).calibration


def test_a_cost_model_that_is_nothing_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"--cost-model: 'best' is no folder"):
        named_pricing("best", parse_cluster("2xa100"))


def test_what_comes_with_the_package_is_loaded_by_default() -> None:
    found = usual_pricing(parse_cluster("8xa100"))

    if not (pretrained_folder() / "operators.safetensors").is_file():
        pytest.skip("no weights in the package")
    assert found.is_learned
    assert "learned" == found.name
    assert found.label.startswith("learned ")


def test_the_package_s_correction_belongs_to_its_prices() -> None:
    """Whoever fits operators or collectives anew makes steps.json anew (docs/fit.md)."""
    path = pretrained_folder() / STEPS_NAME
    if not path.is_file():
        pytest.skip("no weights in the package")
    found = msgspec.json.decode(path.read_bytes(), type=StepFigures)

    assert load_pricing(with_steps=False).sha256 == found.made_with
    assert {source.sha256 for source in found.data} <= load_pricing().data_sha256
    assert ["runs"] == [source.kind for source in found.data]
    assert load_pricing().steps is not None


def test_a_correction_of_other_prices_is_left_out(tmp_path: Path) -> None:
    if not (pretrained_folder() / STEPS_NAME).is_file():
        pytest.skip("no weights in the package")
    copy = tmp_path / "copy"
    shutil.copytree(pretrained_folder(), copy)
    figures = msgspec.json.decode((copy / STEPS_NAME).read_bytes(), type=StepFigures)
    kept = msgspec.structs.replace(figures, made_with="")
    other = msgspec.structs.replace(figures, made_with="0" * 64)

    kept.write(copy)
    assert load_pricing(copy).steps is not None
    assert load_pricing(copy, with_steps=False).steps is None
    other.write(copy)
    assert load_pricing(copy).steps is None
    assert load_pricing(copy).calibration == load_pricing().calibration


def test_a_copy_of_the_package_folder_is_the_same_model(tmp_path: Path) -> None:
    if not (pretrained_folder() / "operators.safetensors").is_file():
        pytest.skip("no weights in the package")
    copy = tmp_path / "copy"
    shutil.copytree(pretrained_folder(), copy)

    assert usual_pricing(parse_cluster("8xa100")).sha256 == load_pricing(copy).sha256


def test_no_torch_is_needed() -> None:
    code = (
        "import sys, json; from meshwright.gnn_cost.pretrained_pricing import load_pricing; "
        "pricing = load_pricing(); print(json.dumps(['torch' in sys.modules, pricing.interval]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    has_torch, interval = json.loads(answer.stdout)

    assert not has_torch
    assert 0 < interval[0] <= 1 <= interval[1] <= 2 * ANALYTIC_INTERVAL[1]
