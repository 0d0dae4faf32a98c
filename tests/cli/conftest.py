"""Runs the command line inside this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from meshwright.cli.main import main


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one command line did."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout; fails where there is anything else."""
        return json.loads(self.out)

    @property
    def lines_of_error(self) -> list[str]:
        """Lines of stderr that are not progress."""
        return [line for line in self.err.splitlines() if line.startswith("meshwright:")]


Run = Callable[..., Answer]


@pytest.fixture
def meshwright(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Run:
    """Runs ``meshwright WORDS`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONWARNINGS", "TORCH_CPP_LOG_LEVEL", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "ignore" if name == "PYTHONWARNINGS" else "error")

    def run(*words: str | Path) -> Answer:
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Answer(status=status, out=captured.out, err=captured.err)

    return run


@pytest.fixture(scope="session")
def instances_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where trainings keep their instances, so that each is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(meshwright: Run, instances_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``meshwright train`` on three tiny instances."""
    from meshwright.agents import syllabus
    from tests.cli.small_training import SETS, SMALL

    monkeypatch.setattr(syllabus, "_of_frozen", lambda name, count: SETS[name][:count])

    def run(*words: str | Path) -> Answer:
        return meshwright("train", "--cache", instances_cache, *SMALL, *words)

    return run


@pytest.fixture(scope="session")
def plan_text_of_tiny_mlp() -> str:
    """A plan of a small model on all of ``cpu:4``, as text."""
    from meshwright.api import plan_reference
    from meshwright.plans import JobSpec, plan_text

    job = JobSpec(global_batch=16)
    planned = plan_reference("tiny-mlp", cluster="cpu:4", job=job, fix=["dp=4"])
    return plan_text(planned.result.plan)


@pytest.fixture
def plan_file(tmp_path: Path, plan_text_of_tiny_mlp: str) -> Path:
    """The same in a file."""
    path = tmp_path / "plan.json"
    path.write_text(plan_text_of_tiny_mlp)
    return path
