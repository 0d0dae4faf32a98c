"""What pyproject.toml declares is what the code imports, and the lock fits it."""

from __future__ import annotations

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.house.rules import imported_distributions
from tests.house.tree import ROOT, package_files, project_settings

NEEDED_BY_TESTS = {"dev", "hf"}


def declared(*, extras: bool) -> dict[str, Requirement]:
    """Requirements by canonical name: the plain ones, or those of all extras."""
    project = project_settings()["project"]
    texts = list(project["dependencies"])
    if extras:
        texts = [text for group in project["optional-dependencies"].values() for text in group]
    return {canonicalize_name(Requirement(text).name): Requirement(text) for text in texts}


def locked() -> dict[str, str]:
    """Version by name of every line of the lock."""
    lines = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name: version for name, version in pairs}


def test_every_import_is_declared() -> None:
    known = {**declared(extras=False), **declared(extras=True)}
    undeclared = {
        f"{path} imports {name}"
        for path in package_files()
        for name in imported_distributions((ROOT / path).read_text(encoding="utf-8"))
        if name not in known
    }

    assert set() == undeclared


def test_every_dependency_is_imported() -> None:
    imported = {
        name
        for path in package_files()
        for name in imported_distributions((ROOT / path).read_text(encoding="utf-8"))
    }

    assert set() == set(declared(extras=False)) - imported


def test_lock_is_exact_and_within_the_declared_ranges() -> None:
    project = project_settings()["project"]
    texts = list(project["dependencies"])
    for extra in NEEDED_BY_TESTS:
        texts += project["optional-dependencies"][extra]
    versions = locked()
    outside = [
        text
        for text in texts
        if versions.get(canonicalize_name(Requirement(text).name)) is None
        or not Requirement(text).specifier.contains(
            versions[canonicalize_name(Requirement(text).name)]
        )
    ]

    assert [] == outside
    assert [] == [name for name, version in versions.items() if Version(version).local]
