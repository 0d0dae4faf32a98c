"""What the documents name exists, and what they show runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.tree import ROOT, committed_files

CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*(/|\.(py|md|toml|lock))")
TARGET = re.compile(r"\bmake ([a-z]+)\b")
PYTHON_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def documents() -> tuple[Path, ...]:
    """Every Markdown file."""
    return tuple(path for path in committed_files() if path.suffix == ".md")


def missing_paths(text: str) -> list[str]:
    """Paths in backticks that are not in the tree; the package's own may leave out its name."""
    named = [word for word in CODE.findall(text) if "/" in word and PATH.fullmatch(word)]
    return [
        word
        for word in named
        if not any((folder / word).exists() for folder in (ROOT, ROOT / "meshwright"))
    ]


def missing_targets(text: str) -> list[str]:
    """Words after ``make`` in code that are no target of the Makefile."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    return [
        name
        for code in (*CODE.findall(text), *blocks)
        for name in TARGET.findall(code)
        if name not in targets
    ]


@pytest.mark.parametrize("path", documents(), ids=str)
def test_paths_and_targets_in_documents_exist(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")

    assert [] == missing_paths(text)
    assert [] == missing_targets(text)


def test_a_planted_path_or_target_is_found() -> None:
    text = "see `meshwright/nowhere/` and `tests/` and `plans/plan.py`; `make tea`, `make test`"

    assert ["meshwright/nowhere/"] == missing_paths(text)
    assert ["tea"] == missing_targets(text)


def test_first_example_of_the_readme_runs(tmp_path: Path) -> None:
    """The module is saved under the name in its first line; the program that follows is run."""
    module, program = PYTHON_BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    name = module.splitlines()[0].removeprefix("# ")
    (tmp_path / name).write_text(module)
    (tmp_path / "program.py").write_text(program + "\nprint(plan.mesh.num_devices)\n")
    result = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert 0 == result.returncode, result.stderr
    assert 1 <= int(result.stdout.split()[-1]) <= 4
