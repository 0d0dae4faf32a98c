"""What stands at the head of every result: claim, command, commit, machine, software."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from meshwright.records import describe_machine, describe_software, utc_now

__all__ = ["heading"]


def heading(claim: str, **more: Any) -> dict[str, Any]:
    """The head of a result, to which the figures are added.

    Args:
        claim: in one sentence.
        more: what else is needed to read the figures: n, method, planned-for cluster.
    """
    return {
        "claim": claim,
        "command": _command(),
        "commit": _commit(),
        "measured_utc": utc_now(),
        "machine": msgspec.to_builtins(describe_machine()),
        "software": msgspec.to_builtins(describe_software()),
        **more,
    }


def _command() -> str:
    """As typed; of absolute paths only the last name, for the others are this machine's."""
    script = Path(sys.argv[0])
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", f"benchmarks.{script.stem}", *words])


def _commit() -> str:
    """Of the working tree, with a plus sign where files differ from it; empty outside git."""
    root = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
