"""The wheel and the sdist hold the whole package and work without the source tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.house.tree import ROOT, ROOT_FOLDERS, committed_files, module_name, package_files


def call(command: Sequence[str | Path], *, cwd: Path) -> str:
    """Standard output of ``command``, which sees nothing of this process's Python settings."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 == result.returncode, result.stderr
    return result.stdout


def build_wheel(source: Path, target: Path) -> Path:
    """The wheel made from ``source``, with what is installed here and without a network."""
    call(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--no-index", "--wheel-dir", target, source),
        ],
        cwd=target,
    )
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as a fresh clone would be, so that building leaves nothing behind."""
    folder = tmp_path_factory.mktemp("source")
    for path in committed_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    for link in (ROOT / "meshwright").iterdir():
        if link.is_symlink():
            (folder / "meshwright" / link.name).symlink_to(os.readlink(link))
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the tree."""
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Binaries of a new environment with the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("empty")
    call([sys.executable, "-m", "venv", "--without-pip", folder], cwd=folder)
    binaries = folder / "bin"
    call(
        [
            *(sys.executable, "-m", "pip", "--python", binaries / "python", "install"),
            *("--quiet", "--no-deps", "--no-index", wheel),
        ],
        cwd=folder,
    )
    (library,) = folder.glob("lib/python*/site-packages")
    (library / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return binaries


def modules_in(names: Sequence[str]) -> set[str]:
    """Python files of the package among archive members."""
    return {name for name in names if name.startswith("meshwright/") and name.endswith(".py")}


def package_data() -> set[str]:
    """Where the tree's other files, such as catalogs and schemas, belong in a wheel."""
    rooms = [path for path in committed_files() if path.parts[0] in ("meshwright", *ROOT_FOLDERS)]
    return {
        str(path if path.parts[0] == "meshwright" else Path("meshwright") / path)
        for path in rooms
        if path.suffix != ".py"
    }


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    expected = {
        str(path if path.parts[0] == "meshwright" else Path("meshwright") / path)
        for path in package_files()
    }
    names = zipfile.ZipFile(wheel).namelist()

    assert expected == modules_in(names)
    assert len(set(names)) == len(names)
    assert package_data() == {
        name for name in names if name.startswith("meshwright/") and not name.endswith(".py")
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_from_sdist_equals_wheel_from_tree(source: Path, wheel: Path, tmp_path: Path) -> None:
    backend = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    call([sys.executable, "-c", backend, tmp_path], cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        members.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    rebuilt_in = tmp_path / "rebuilt"
    rebuilt_in.mkdir()
    rebuilt = build_wheel(unpacked, rebuilt_in)

    assert sorted(zipfile.ZipFile(wheel).namelist()) == sorted(zipfile.ZipFile(rebuilt).namelist())


def test_every_module_imports_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    program = (
        "import importlib, json, sys\n"
        "print(json.dumps([importlib.import_module(name).__file__ for name in sys.argv[1:]]))\n"
    )
    modules = [module_name(path) for path in package_files() if path.name != "__main__.py"]
    files = json.loads(call([installed / "python", "-c", program, *modules], cwd=tmp_path))

    assert "meshwright.env" in modules
    assert [] == [file for file in files if not file.startswith(str(installed.parent))]


def test_doctor_answers_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    answer = json.loads(call([installed / "meshwright", "doctor", "--json"], cwd=tmp_path))

    assert {} != answer
