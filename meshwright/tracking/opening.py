"""A folder's local index and its mirror as one tracker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from meshwright.tracking.local import LocalTracker
from meshwright.tracking.mirror import WandbMode, open_mirror
from meshwright.tracking.tracker import Mirrored, Tracker

__all__ = ["open_tracker"]


def open_tracker(
    folder: Path,
    mode: WandbMode,
    *,
    project: str,
    group: str | None,
    complain: Callable[[str], None],
    job_type: str | None = None,
    best: Mapping[str, str] | None = None,
) -> tuple[Tracker, str]:
    """A tracker that cannot fail its caller, and the number of the run.

    Args:
        folder: of the run; W&B calls the run by its name.
        mode: of the mirror.
        project: of W&B.
        group: of runs that belong together.
        complain: told what failed, in one line.
        job_type: see ``open_mirror``.
        best: see ``open_mirror``.

    Raises:
        BadRequest: the folder cannot be written; or see ``require_wandb``.
    """
    local = LocalTracker(folder)
    mirror = open_mirror(
        mode,
        project=project,
        group=group,
        name=folder.name,
        run_id=local.run_id,
        attempt=local.attempt,
        folder=folder,
        complain=complain,
        job_type=job_type,
        best=best,
    )
    trackers: list[Tracker] = [local] if mirror is None else [local, mirror]
    return Mirrored(trackers, complain=complain), local.run_id
