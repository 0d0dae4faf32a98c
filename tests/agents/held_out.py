"""Stored instances, small enough to lie beside the tests, that the planner was not trained on.

Its weights were chosen by the set they are of, so they say less than a test set's would. Of every
family in that set, ``validation`` (it has no ViT), the first ``OF_A_FAMILY`` instances that have at
least ``LEAST_ROWS`` rows in at most ``MOST_BYTES``, rows left out where need be (drawn by
``env.thinned`` from the instance's number). They are made again by

    python -m tests.agents.held_out CACHE

where CACHE is a folder of made instances of that set (what it lacks is made, which takes long).
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np

from meshwright.env.files import read_instance, write_instance
from meshwright.env.frozen import frozen_specs
from meshwright.env.graph import NUM_NODE_FEATURES
from meshwright.env.instance import Instance
from meshwright.env.maker import Maker
from meshwright.env.models import family_of
from meshwright.env.thinned import thinned
from meshwright.errors import BadRequest
from meshwright.solvers.reference import rule_time_s

FOLDER = Path(__file__).with_name("instances")
SET = "validation"
OF_A_FAMILY = 2
LEAST_ROWS = 10
MOST_BYTES = 35_000

_NUM_TRIES = 20
_COMMAND = "python -m tests.agents.held_out CACHE"


def stored(folder: Path = FOLDER) -> dict[str, Instance]:
    """The instances, by the names of their files.

    Raises:
        BadRequest: a file is of another version of features; the message says how to make it again.
    """
    found = {path.stem: _read(path) for path in sorted(folder.glob("*.safetensors"))}
    if not found:
        raise BadRequest(f"{folder}: no instances; make them: {_COMMAND}")
    return found


def _read(path: Path) -> Instance:
    how = f"make all again: {_COMMAND}"
    try:
        instance = read_instance(path)
    except BadRequest as error:
        raise BadRequest(f"{error}; {how}") from error
    width = instance.graph.node_features.shape[1]
    if width != NUM_NODE_FEATURES:
        raise BadRequest(
            f"{path}: {width} features of a node, not {NUM_NODE_FEATURES} as in this version; {how}"
        )
    return instance


def small(instance: Instance, seed: int) -> Instance | None:
    """``instance``, thinned until it is small enough; ``None`` where too few rows are left."""
    rng = np.random.default_rng(seed)
    for _ in range(_NUM_TRIES):
        found: Instance | None = instance
        while found is not None and len(found.rows) >= LEAST_ROWS:
            if stored_bytes(found) <= MOST_BYTES:
                return found
            found = thinned(found, rng)
    return None


def stored_bytes(instance: Instance) -> int:
    """Of its tables of times, which are nearly all of a file."""
    num_plans = instance.num_cuts * len(instance.variants) ** instance.num_groups
    return 4 * num_plans * len(instance.rows)


def make(cache: Path) -> None:
    """Write the files anew."""
    maker = Maker(cache=cache, reference=rule_time_s)
    done: Counter[str] = Counter()
    for number, spec in enumerate(frozen_specs(SET)):
        family = family_of(spec.model.reference)
        if done[family] == OF_A_FAMILY:
            continue
        instance = maker.make(spec)
        kept = None if instance is None else small(instance, number)
        if kept is not None:
            write_instance(kept, FOLDER / f"{SET}-{number}-{family}.safetensors")
            done[family] += 1


if __name__ == "__main__":
    for old in FOLDER.glob("*.safetensors"):
        old.unlink()
    make(Path(sys.argv[1]))
