"""Parsing, help, versions, and what becomes of errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import meshwright as package
from meshwright.cli import clusters as clusters_verb
from tests.cli.conftest import Run

VERBS = (
    "plan",
    "explain",
    "validate",
    "run",
    "models",
    "clusters",
    "doctor",
    "demo",
    "profile",
    "bench",
    "fit",
    "train",
)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_shows_an_example_and_json(meshwright: Run, verb: str) -> None:
    answer = meshwright(verb, "--help")

    assert 0 == answer.status
    assert f"Example: meshwright {verb}" in answer.out
    assert "--json" in answer.out


def test_help_lists_every_verb(meshwright: Run) -> None:
    answer = meshwright("--help")

    assert 0 == answer.status
    assert [] == [verb for verb in VERBS if f"\n  {verb} " not in answer.out]


def test_version(meshwright: Run) -> None:
    assert f"meshwright {package.__version__}\n" == meshwright("--version").out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("frobnicate",), "frobnicate"),
        (("plan",), "MODEL"),
        (("plan", "gpt2", "--global-batch", "8"), "--cluster"),
        (("plan", "gpt2", "--cluster", "cpu:2"), "--global-batch"),
        (("plan", "gpt2", "--cluster", "cpu:2", "--global-batch", "many"), "--global-batch"),
        (
            ("plan", "gpt2", "--cluster", "cpu:2", "--global-batch", "8", "--precision", "fp7"),
            "fp7",
        ),
        (("clusters", "--nonsense"), "--nonsense"),
    ],
)
def test_usage_errors_are_one_line_and_status_1(
    meshwright: Run, words: tuple[str, ...], part: str
) -> None:
    answer = meshwright(*words)

    assert 1 == answer.status
    assert "" == answer.out
    assert 1 == len(answer.err.splitlines())
    assert part in answer.err
    assert "--help" in answer.err


def test_our_own_mistake_is_one_line_with_the_traceback_in_a_file(
    meshwright: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("planted\nsecond line")

    monkeypatch.setattr(clusters_verb, "output_for", fail)
    answer = meshwright("clusters")

    assert 3 == answer.status
    assert 1 == len(answer.err.splitlines())
    assert "internal error: RuntimeError: planted" in answer.err
    path = Path(answer.err.split("the traceback is in ")[1].split(";")[0])
    assert "in fail" in path.read_text()
    path.unlink()


def test_debug_prints_the_traceback(meshwright: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(clusters_verb, "output_for", fail)
    answer = meshwright("clusters", "--debug")
    Path(answer.err.split("the traceback is in ")[1].split(";")[0]).unlink()

    assert 3 == answer.status
    assert "Traceback (most recent call last)" in answer.err


def test_help_and_clusters_import_no_torch() -> None:
    program = (
        "import sys\n"
        "from meshwright.cli.main import main\n"
        "main(['--help']); main(['clusters', '8xh100']); main(['plan', '--help'])\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert 0 == result.returncode, result.stderr


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m meshwright.cli clusters --json | head -n 1"
    result = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert "{\n" == result.stdout
    assert "" == result.stderr
