"""Claim: the record store loses nothing that was stored, returns nothing wrong, and is quick.

    OMP_NUM_THREADS=1 python -m benchmarks.record_store

Survival: 50 writers killed with SIGKILL while they append, join and compact; four writers at once
beside a reader; one bit flipped in every byte of a file, the file cut at every eighth. Times are
wall times, beside those of the processor, for others use the machine and its disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.heading import heading
from meshwright.records import Kind, Record, RecordStore, make_record, timing_of
from tests.records.writers import batch


def record(number: int) -> Record:
    return make_record(
        kind=Kind.OPERATOR,
        name=("linear", "bmm", "layer_norm", "softmax")[number % 4],
        device="cpu",
        verb="benchmark",
        method="made up",
        unit="s",
        median=number * 1e-6,
        num_repeats=10,
        samples=[number * 1e-6] * 10,
        extra={
            "direction": "fwd",
            "dtype": "bf16" if number % 8 < 4 else "fp32",
            "m": number,
            "n": 2 * number,
            "k": 64,
            "flops": 256.0 * number * number,
        },
    )


def timed(action: Callable[[], object]) -> dict[str, float]:
    """Wall and processor seconds of one call."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    action()
    return {
        "wall_s": round(time.perf_counter() - wall_s, 4),
        "cpu_s": round(time.process_time() - cpu_s, 4),
    }


def single_appends(folder: Path, count: int) -> dict[str, Any]:
    store = RecordStore(folder)
    store.append([record(0)])
    runs = [timed(lambda number=number: store.append([record(number)])) for number in range(count)]
    joined = len(list(folder.glob("*.parquet")))
    rows: dict[str, Any] = {"n": count, "files_left": joined}
    for clock in ("wall_s", "cpu_s"):
        spread = timing_of([run[clock] for run in runs])
        rows[clock] = {
            "median": spread.median_s,
            "p10": spread.p10_s,
            "p90": spread.p90_s,
            "mean_with_joining": sum(spread.times_s) / count,
        }
    return rows


def bulk(folder: Path, count: int) -> dict[str, Any]:
    store = RecordStore(folder)
    records = [record(number) for number in range(count)]
    rows: dict[str, Any] = {"n": count, "append": timed(lambda: store.append(records))}
    rows["bytes"] = sum(path.stat().st_size for path in folder.glob("*.parquet"))
    rows["read"] = timed(store.read)
    rows["verify"] = timed(store.verify)
    rows["query of one in eight"] = timed(lambda: store.query(name="bmm", dtype="bf16"))
    rows["query of nothing, by the index"] = timed(lambda: store.query(name="conv2d"))
    for number in range(0, count, count // 400):
        RecordStore(folder).append(records[number : number + 1])
    rows["compact 400 small files beside it"] = timed(store.compact)
    found, problems = store.read()
    rows["whole afterwards"] = not problems and found[:count] == records
    return rows


def writers(mode: str, folder: Path, *numbers: int) -> dict[str, Any]:
    """What processes of ``tests.records.writers`` were told, and what is found of it."""
    words = [sys.executable, "-m", "tests.records.writers", mode, str(folder), *map(str, numbers)]
    answer = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    found, problems = RecordStore(folder).read()
    by_append: dict[tuple[int, int], list[Record]] = {}
    for item in found:
        key = int(item.name.split()[1]), int(str(item.extra["m"]))
        by_append.setdefault(key, []).append(item)
    told = {(writer, number) for writer, said in enumerate(answer["stored"]) for number in said}
    return {
        "writers": len(answer["stored"]),
        "appends_told_stored": len(told),
        "of_these_lost": len(told - set(by_append)),
        "appends_whole_but_not_told": len(set(by_append) - told),
        "appends_half_or_wrong": sum(batch(*key) != items for key, items in by_append.items()),
        "problems": len(problems) + len(answer.get("wrong", [])),
        **{key: answer[key] for key in ("num_reads",) if key in answer},
    }


def damage(folder: Path, num_records: int) -> dict[str, Any]:
    """A flip in every byte, and every eighth length, of one file of ``num_records``."""
    store = RecordStore(folder)
    committed = [record(number) for number in range(num_records)]
    store.append(committed)
    (path,) = folder.glob("*.parquet")
    whole = path.read_bytes()
    kept: dict[str, list[int]] = {"flips": [], "cuts": []}
    wrong = unnoticed = 0
    for at in range(len(whole)):
        flipped = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        forms = [("flips", flipped)] + [("cuts", whole[:at])] * (at % 8 == 0)
        for name, data in forms:
            path.write_bytes(data)
            found, problems = store.read()
            wrong += sum(item not in committed for item in found)
            unnoticed += not problems
            kept[name].append(len(found))
    flips = kept["flips"]
    return {
        "records": num_records,
        "bytes": len(whole),
        "flips": len(flips),
        "cuts": len(kept["cuts"]),
        "wrong_records_returned": wrong,
        "damage_not_noticed": unnoticed,
        "flips_that_cost_nothing": sum(number == num_records for number in flips),
        "flips_that_cost_one_record": sum(number == num_records - 1 for number in flips),
        "flips_that_cost_all": sum(number == 0 for number in flips),
        "cuts_that_cost_nothing": sum(number == num_records for number in kept["cuts"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("-o", "--output", default="benchmarks/results/record_store.json")
    options = parser.parse_args()
    document: dict[str, Any] = heading(
        "the record store loses nothing stored, returns nothing wrong, and is quick"
    )
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        for title, measure in (
            ("append of one record", lambda: single_appends(folder / "single", 1000)),
            ("bulk", lambda: bulk(folder / "bulk", options.records)),
            ("writers killed", lambda: writers("killed", folder / "killed", 50, 7)),
            ("writers at once", lambda: writers("together", folder / "together", 4, 100)),
            ("damage", lambda: damage(folder / "damage", 16)),
        ):
            document[title] = measure()
            print(json.dumps({title: document[title]}), flush=True)
    Path(options.output).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
