"""The gate itself: ``.ci/run`` stops at the first failure and ends with pytest's closing line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.tree import ROOT, ROOT_FOLDERS, package_files

CLOSING_LINE = "===== 3 passed, 1 skipped in 0.01s ====="

STAND_IN_FOR_MAKE = f"""#!/bin/sh
echo "$1" >> "$CALLS"
[ "$1" = "$FAILING" ] && exit 2
[ "$1" = test ] && echo "{CLOSING_LINE}"
exit 0
"""


def run_gate(folder: Path, *, failing: str) -> tuple[int, list[str], list[str]]:
    """Exit status, targets made and lines printed, where the target ``failing`` fails."""
    make = folder / "make"
    make.write_text(STAND_IN_FOR_MAKE)
    make.chmod(0o755)
    calls = folder / "calls"
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(calls),
        "FAILING": failing,
    }
    result = subprocess.run(
        ["bash", ".ci/run"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return result.returncode, calls.read_text().split(), result.stdout.splitlines()


def test_gate_makes_everything_and_ends_with_the_closing_line(tmp_path: Path) -> None:
    status, targets, lines = run_gate(tmp_path, failing="")

    assert 0 == status
    assert ["setup", "lint", "test", "doctest", "examples"] == targets
    assert CLOSING_LINE == lines[-1]


@pytest.mark.parametrize(
    ("failing", "targets_made"),
    [
        ("setup", ["setup"]),
        ("lint", ["setup", "lint"]),
        ("test", ["setup", "lint", "test"]),
        ("doctest", ["setup", "lint", "test", "doctest"]),
        ("examples", ["setup", "lint", "test", "doctest", "examples"]),
    ],
)
def test_gate_stops_at_the_first_failure(
    tmp_path: Path, failing: str, targets_made: list[str]
) -> None:
    status, targets, lines = run_gate(tmp_path, failing=failing)

    assert 0 != status
    assert targets_made == targets
    assert not any("all checks passed" in line for line in lines)


def tool(name: str) -> str:
    """Path of a development tool, or fail saying what to do."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    assert found is not None, f"{name} is missing; run `make setup`"
    return found


@pytest.mark.parametrize("module", ["agents", "env", "gnn_cost", "profiling", "runtime"])
def test_ruff_bans_the_folder_names_as_imports(module: str) -> None:
    source = f'"""Doc."""\n\nfrom __future__ import annotations\n\nimport {module}\n'
    result = subprocess.run(
        [tool("ruff"), "check", "--stdin-filename", "meshwright/cost/planted.py", "-"],
        cwd=ROOT,
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )

    assert 1 == result.returncode
    assert "TID251" in result.stdout


PLANTED_IMPORTS = {
    "meshwright/graph/planted.py": "meshwright.cost",
    "meshwright/solvers/planted.py": "meshwright.runtime",
    "gnn_cost/planted.py": "meshwright.profiling",
    "env/planted.py": "meshwright.gnn_cost",
    "meshwright/spmd/planted.py": "torch",
}


def lint_imports_of_empty_rooms(folder: Path, planted: dict[str, str]) -> tuple[int, str]:
    """Exit status and output, without white space, for the tree with its modules emptied."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    for path in package_files():
        for file in (path, path.parent / "__init__.py"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
    for name in ROOT_FOLDERS:
        (folder / "meshwright" / name).symlink_to(f"../{name}")
    for planted_in, imported in planted.items():
        (folder / planted_in).write_text(f"import {imported}\n")
    result = subprocess.run(
        [tool("lint-imports"), "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, "".join(result.stdout.split())


def test_contracts_catch_planted_imports(tmp_path: Path) -> None:
    status, output = lint_imports_of_empty_rooms(tmp_path, PLANTED_IMPORTS)

    assert 1 == status
    for path, imported in PLANTED_IMPORTS.items():
        importer = path.removesuffix(".py").replace("/", ".")
        importer = importer if importer.startswith("meshwright") else f"meshwright.{importer}"
        assert f"{importer}->{imported}(l.1)" in output


def test_contracts_pass_where_rooms_import_downwards(tmp_path: Path) -> None:
    planted = {"meshwright/cost/planted.py": "meshwright.plans", "runtime/planted.py": "torch"}
    status, output = lint_imports_of_empty_rooms(tmp_path, planted)

    assert 0 == status, output
    assert "0broken." in output
