"""Where the files of this repository are."""

from __future__ import annotations

import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

__all__ = [
    "ROOT",
    "ROOT_FOLDERS",
    "committed_files",
    "module_name",
    "package_files",
    "packages_in_tree",
    "project_settings",
    "python_files",
]

ROOT = Path(__file__).resolve().parents[2]

ROOT_FOLDERS = ("agents", "env", "gnn_cost", "profiling", "runtime")
"""Folders at the root that are packages of meshwright."""


@cache
def committed_files() -> tuple[Path, ...]:
    """Files git tracks or would track, relative to the root; links are not followed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = sorted({Path(name) for name in listed.split("\0") if name})
    return tuple(path for path in paths if (ROOT / path).is_file())


def python_files() -> tuple[Path, ...]:
    """Every Python file: packages, tests, benchmarks, examples."""
    return tuple(path for path in committed_files() if path.suffix == ".py")


def package_files() -> tuple[Path, ...]:
    """The Python files that are installed."""
    return tuple(path for path in python_files() if path.parts[0] in ("meshwright", *ROOT_FOLDERS))


def module_name(path: Path) -> str:
    """Dotted name under which a package file is imported."""
    parts = path.with_suffix("").parts
    if parts[0] in ROOT_FOLDERS:
        parts = ("meshwright", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def packages_in_tree() -> list[str]:
    """Every folder with Python files, as an importable name."""
    return sorted({module_name(path.parent / "__init__.py") for path in package_files()})


@cache
def project_settings() -> dict[str, Any]:
    """What pyproject.toml says."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
