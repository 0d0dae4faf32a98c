"""The tree keeps the habits of the house; ``test_rules.py`` shows that each rule can fail."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.house import rules
from tests.house.tree import (
    ROOT,
    ROOT_FOLDERS,
    committed_files,
    module_name,
    package_files,
    packages_in_tree,
    project_settings,
    python_files,
)

Rule = Callable[[str], list[str]]

TORCH_FREE_ROOMS = (
    "cluster",
    "cost",
    "errors",
    "graph",
    "plans",
    "records",
    "solvers",
    "spmd",
    "strict_json",
    "tracking",
    "units",
)
ROOMS_THAT_PRINT = (Path("meshwright/cli"), Path("meshwright/report"))


def check_rule(rule: Rule, paths: tuple[Path, ...]) -> None:
    """Fail with every violation of ``rule`` in ``paths``, one a line."""
    found = [
        f"{path}: {line}"
        for path in paths
        for line in rule((ROOT / path).read_text(encoding="utf-8"))
    ]

    assert [] == found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "rule",
    [
        rules.global_statements,
        rules.long_functions,
        rules.missing_exports,
        rules.undocumented_names,
        rules.unitless_names,
    ],
)
def test_packages_keep(rule: Rule) -> None:
    check_rule(rule, package_files())


@pytest.mark.parametrize(
    "rule",
    [
        rules.marks_of_unfinished_work,
        rules.too_many_lines,
        rules.top_level_room_imports,
    ],
)
def test_all_python_keeps(rule: Rule) -> None:
    check_rule(rule, python_files())


def test_only_cli_and_report_print() -> None:
    quiet = tuple(
        path
        for path in package_files()
        if not any(path.is_relative_to(room) for room in ROOMS_THAT_PRINT)
    )

    check_rule(rules.calls_of_print, quiet)


def test_every_test_asserts_something() -> None:
    tests = tuple(path for path in python_files() if path.name.startswith("test_"))

    assert Path("tests/house/test_house.py") in tests
    check_rule(rules.tests_without_assertion, tests)


def test_no_committed_file_names_a_path_of_a_machine() -> None:
    found = []
    for path in committed_files():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path}: {line}" for line in rules.machine_paths(text)]

    assert [] == found, "\n" + "\n".join(found)


def test_every_module_is_importable() -> None:
    modules = [module_name(path) for path in package_files()]

    assert "meshwright.env" in modules
    assert modules == [importlib.import_module(name).__name__ for name in modules]


def test_every_package_has_an_init() -> None:
    folders = {path.parent for path in package_files()}
    without = sorted(
        str(folder) for folder in folders if not (ROOT / folder / "__init__.py").exists()
    )

    assert [] == without


def test_pyproject_lists_exactly_the_packages_of_the_tree() -> None:
    listed = project_settings()["tool"]["setuptools"]["packages"]

    assert packages_in_tree() == listed


def test_root_folders_are_mapped_and_linked_relatively() -> None:
    mapping = project_settings()["tool"]["setuptools"]["package-dir"]
    links = {name: os.readlink(ROOT / "meshwright" / name) for name in ROOT_FOLDERS}

    assert {name: f"../{name}" for name in ROOT_FOLDERS} == links
    assert {f"meshwright.{name}": name for name in ROOT_FOLDERS} == {
        name: folder for name, folder in mapping.items() if name != "meshwright"
    }


def import_without_torch(modules: list[str]) -> subprocess.CompletedProcess[str]:
    """Import ``modules`` in a process of its own in which there is no torch."""
    program = (
        "import importlib, sys\n"
        "sys.modules['torch'] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *modules], capture_output=True, text=True, check=False
    )


def test_planning_core_imports_without_torch() -> None:
    modules = [
        name
        for name in map(module_name, package_files())
        if name == "meshwright" or name.split(".")[1] in TORCH_FREE_ROOMS
    ]
    result = import_without_torch(modules)

    assert "meshwright.spmd.program" in modules
    assert "" == result.stderr
    assert 0 == result.returncode


def test_import_without_torch_fails_for_what_needs_torch(tmp_path: Path) -> None:
    result = import_without_torch(["torch"])

    assert 1 == result.returncode
    assert "ModuleNotFoundError: import of torch halted" in result.stderr


def test_import_of_the_package_is_light() -> None:
    program = "import sys, meshwright; print('torch' in sys.modules or 'numpy' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert "False" == result.stdout.strip()
