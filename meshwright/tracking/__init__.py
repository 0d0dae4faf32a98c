"""What an experiment was and gave: a local index that is the truth, and its mirror in W&B."""

from __future__ import annotations

from meshwright.tracking.hashes import DataSource, bytes_sha256, file_sha256, source_of
from meshwright.tracking.lineage import made, used
from meshwright.tracking.local import LocalTracker, read_lines
from meshwright.tracking.mirror import WandbMode, open_mirror, require_wandb
from meshwright.tracking.opening import open_tracker
from meshwright.tracking.tracker import Mirrored, Tracker

__all__ = [
    "DataSource",
    "LocalTracker",
    "Mirrored",
    "Tracker",
    "WandbMode",
    "bytes_sha256",
    "file_sha256",
    "made",
    "open_mirror",
    "open_tracker",
    "read_lines",
    "require_wandb",
    "source_of",
    "used",
]
