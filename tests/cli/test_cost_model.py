"""``--cost-model``: what plans are priced with, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshwright.cost.calibration import DEFAULTS, Origin
from meshwright.gnn_cost.pretrained_pricing import StepFigures
from tests.cli.conftest import Run

WORDS = ["plan", "tiny-mlp", "--cluster", "4xh100", "--global-batch", "16"]


@pytest.fixture
def fitted(tmp_path: Path) -> Path:
    """The folder of a fit that knows of the host's time alone."""
    folder = tmp_path / "fit"
    folder.mkdir()
    calibration = DEFAULTS.with_figures(Origin.LEARNED, host_s_per_step=0.01)
    StepFigures(calibration=calibration.to_json(), interval=(0.9, 1.1)).write(folder)
    return folder


def test_a_plan_of_a_fit_names_it_and_tells_what_is_learned(meshwright: Run, fitted: Path) -> None:
    found = meshwright(*WORDS, "--cost-model", str(fitted), "--json").document["plan"]

    assert found["provenance"]["cost_model"].startswith("learned in fit ")
    assert {"host": 1.0} == found["prediction"]["sources"]
    assert pytest.approx(0.01) == found["prediction"]["breakdown"]["host"]
    assert ["learned", "analytic"] == found["prediction"]["source"]


def test_explain_prices_as_the_plan_was_priced(meshwright: Run, fitted: Path) -> None:
    made = meshwright(*WORDS, "--cost-model", "analytic", "-o", "plan.json")
    plain = meshwright("explain", "plan.json", "--json").document
    other = meshwright("explain", "plan.json", "--cost-model", str(fitted), "--json").document

    assert 0 == made.status
    assert {"analytic"} == set(plain["sources"].values())
    assert "learned" == other["sources"]["host"]
    assert "analytic" == other["sources"]["compute"]


def test_a_folder_without_a_fit_is_refused(meshwright: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    answer = meshwright(*WORDS, "--cost-model", str(tmp_path / "empty"))
    missing = meshwright(*WORDS, "--cost-model", "none-such")

    assert [1, 1] == [answer.status, missing.status]
    assert "holds no learned cost model" in answer.lines_of_error[0]
    assert "is no folder" in missing.lines_of_error[0]
