"""Claim: one command makes the pretrained planner again, bit for bit, in two hours on two cores.

    OMP_NUM_THREADS=1 python -m benchmarks.planner_training --runs FOLDER [--cache FOLDER] [-o FILE]

Runs what the card of the package's planner says, in a fresh folder, and compares weights. With a
cache that is empty or new the time is all of it, instances and captured models included; else
``instances_before`` of the ``instances`` were there, and only the rest were made, as for every
repeat after the first; such a row has no ``within_bar``. Bits are equal on
equal machines and versions of torch; what the card says of these is told too.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.heading import heading
from benchmarks.planner_instances import write
from meshwright.agents.planner import PRETRAINED
from meshwright.agents.syllabus import general_syllabus
from meshwright.env.maker import Maker
from meshwright.solvers.reference import rule_time_s

BAR_S = 7200.0


def made_before(cache: Path) -> tuple[int, int]:
    """How many of the instances the cache has, and how many there are."""
    maker = Maker(cache=cache, reference=rule_time_s)
    syllabus = general_syllabus()
    specs = {*syllabus.train, *syllabus.validation}
    return sum(maker.is_made(spec) for spec in specs), len(specs)


def timed(command: list[str], folder: Path) -> dict[str, Any]:
    """One run of ``command`` into ``folder``: seconds, and what its card says.

    ``largest_process_bytes`` is of the largest single process so far, of runs before this one too.
    """
    shutil.rmtree(folder, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start_s = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall_s = time.monotonic() - start_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    card = json.loads((folder / PRETRAINED.name).with_suffix(".json").read_text("utf-8"))
    return {
        "wall_s": wall_s,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "largest_process_bytes": after.ru_maxrss * 1024,
        "sha256": card["sha256"],
        "validation": card["validation"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--cache", type=Path, help="of instances; a new one by default")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    card = json.loads(PRETRAINED.with_suffix(".json").read_text("utf-8"))
    cache = options.cache or options.runs / "cache"
    rows = []
    for number in range(options.repeats):
        folder = options.runs / f"run-{number}"
        program = Path(sys.executable).parent / "meshwright"
        words = shlex.split(card["reproduce"])[1:]
        command = [str(program), *words, "-o", str(folder), "--cache", str(cache)]
        count, total = made_before(cache)
        row = {"instances": total, "instances_before": count, **timed(command, folder)}
        rows.append({**row, "within_bar": row["wall_s"] <= BAR_S if count == 0 else None})
    document = heading(
        "one command makes the pretrained planner again, bit for bit, within two hours",
        reproduce=card["reproduce"],
        package={"sha256": card["sha256"], "software": card["software"]},
        equal_bits=all(row["sha256"] == card["sha256"] for row in rows),
        rows=rows,
    )
    write(document, options.output)


if __name__ == "__main__":
    main()
