"""Write ``requirements-dev.lock``: the exact versions installed in this environment.

Run by ``make lock``. Only what the dependencies and the ``dev`` and ``hf`` extras of pyproject.toml
need, directly or through one another, is written; a local version suffix (``+cpu``) is left out so
that any package index can serve the file.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCKED_EXTRAS = ("dev", "hf")

ACCELERATOR_PREFIXES = ("cuda-", "nvidia-", "triton")
"""torch's build for GPUs asks for these, exactly and by itself; its build for CPUs does not."""

HEADER = """\
# Exact versions for development, written by `make lock` from an environment that passed `.ci/run`.
# torch stands still on purpose: capture and runtime call parts of it that are private or still
# moving (functional collectives, fake process groups, virtual ranks). Raise it in a change of its
# own, with the equivalence tests green.
"""


def closure(requirements: list[str]) -> dict[str, str]:
    """Name and public version of everything installed that ``requirements`` lead to."""
    versions: dict[str, str] = {}
    pending = [(Requirement(text), "") for text in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        if name.startswith(ACCELERATOR_PREFIXES):
            continue
        distribution = metadata.distribution(name)
        versions[name] = Version(distribution.version).public
        for text in distribution.requires or []:
            pending += [(Requirement(text), extra) for extra in ("", *requirement.extras)]
    return versions


def main() -> None:
    """Write the lock file beside pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in LOCKED_EXTRAS:
        wanted += project["optional-dependencies"][extra]
    lines = [f"{name}=={version}" for name, version in sorted(closure(wanted).items())]
    (ROOT / "requirements-dev.lock").write_text(HEADER + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
