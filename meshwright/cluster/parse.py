"""What the user gives for ``--cluster``: a shorthand or the path of a file."""

from __future__ import annotations

from pathlib import Path

from meshwright.cluster.files import CLUSTER_SUFFIXES, read_cluster_file
from meshwright.cluster.model import Cluster
from meshwright.cluster.shorthand import parse_shorthand

__all__ = ["parse_cluster"]


def parse_cluster(text: str) -> Cluster:
    """The cluster that ``text`` names: ``8xh100``, ``cpu:4``, ``rack.toml``...

    Text that ends in a suffix of a cluster file or holds a directory separator is a path; all else
    is shorthand.

    Raises:
        BadClusterFile: it can be read as neither; one line that says what to do.
    """
    if text.lower().endswith(CLUSTER_SUFFIXES) or "/" in text or "\\" in text:
        return read_cluster_file(Path(text))
    return parse_shorthand(text)
