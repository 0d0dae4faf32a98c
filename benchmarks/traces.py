"""Claims: real traces tell where the time went; large ones import fast, in little memory.

    python -m benchmarks.traces --traces FOLDER [--large-bytes 2000000000] \
        -o benchmarks/results/traces.json

FOLDER holds an INDEX.csv (``file, events, kernels, nccl_kernels``) and the traces it lists. Each is
imported in a process of its own; speeds are decompressed bytes by CPU seconds of that one process,
analysis included, the start of Python not. The large trace is made up by the tests' own maker.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tests.profiling.traces.large_import import import_in_a_process, write_large_trace

_SHARES = ("compute_s", "communication_s", "overlap_s", "idle_s")


def profile_row(folder: Path, name: str) -> dict[str, Any]:
    """One file: what its ranks did, and what importing it took."""
    found = import_in_a_process(folder / name)
    ranks = [rank for one in found["summaries"] for rank in one.get("ranks", ())]
    graphs = [one for one in found["summaries"] if "num_nodes" in one]
    row: dict[str, Any] = {"file": name, "records": found["num_records"]}
    if ranks:
        num_bytes = sum(rank["num_bytes"] for rank in ranks)
        row |= {
            "decompressed_bytes": num_bytes,
            "bytes_per_cpu_s": num_bytes / found["cpu_s"],
            "events": sum(rank["num_events"] for rank in ranks),
            "kernels": sum(one["num_kernels"] for rank in ranks for one in rank["devices"]),
            "collectives": sum(c["num_calls"] for rank in ranks for c in rank["collectives"]),
            "ranks": [_rank_row(rank) for rank in ranks],
        }
        row["set"] = next((one["set"] for one in found["summaries"] if "set" in one), None)
    for one in graphs:
        keys = ("file", "num_nodes", "num_operators", "num_communication", "num_data_edges")
        row.setdefault("graphs", []).append({key: one[key] for key in keys})
    return row


def _rank_row(rank: dict[str, Any]) -> dict[str, Any]:
    devices = []
    for device in rank["devices"]:
        steps = device["iterations"]
        span_s = sum(step["span_s"] for step in steps)
        sums = {key: sum(step[key] for step in steps) for key in _SHARES}
        whole_s = sums["compute_s"] + sums["communication_s"] - sums["overlap_s"] + sums["idle_s"]
        devices.append(
            {
                "device": device["device"],
                "name": device["name"],
                "median_step_s": statistics.median(step["span_s"] for step in steps),
                **{f"{key.removesuffix('_s')}_fraction": sums[key] / span_s for key in _SHARES},
                "largest_error_of_the_sum_s": abs(whole_s - span_s),
            }
        )
    return {
        "rank": rank["rank"],
        "iterations": rank["num_iterations"],
        "iterations_by": rank["iterations_by"],
        "unassigned_fraction": rank["operators"]["unassigned_s"]
        / (rank["operators"]["device_s"] or 1.0),
        "devices": devices,
        "collective_sizes": sorted(
            {(one["name"], one["bytes"], one["num_calls"]) for one in rank["collectives"]},
            key=str,
        ),
    }


def large_row(num_bytes: int) -> dict[str, Any]:
    """Speed and memory of a made-up trace of ``num_bytes``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.json"
        size = write_large_trace(path, num_bytes)
        found = import_in_a_process(path)
    (rank,) = found["summaries"][0]["ranks"]
    return {
        "bytes": size,
        "events": rank["num_events"],
        "iterations": rank["num_iterations"],
        "cpu_s": found["cpu_s"],
        "wall_s": found["wall_s"],
        "bytes_per_cpu_s": size / found["cpu_s"],
        "peak_rss_bytes": found["peak_rss_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--large-bytes", type=lambda text: int(float(text)), default=2_000_000_000)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    with (options.traces / "INDEX.csv").open(encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    result: dict[str, Any] = {
        "made_by": "python -m benchmarks.traces --traces FOLDER "
        f"--large-bytes {options.large_bytes} -o FILE",
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "msgspec": msgspec.__version__,
        },
    }
    if options.large_bytes:
        result["large"] = large_row(options.large_bytes)
        print(json.dumps(result["large"]))
    result["files"] = []
    for entry in listed:
        row = profile_row(options.traces, entry["file"])
        if "events" in row:
            row["index_agrees"] = all(
                int(entry[key]) == row[mine]
                for key, mine in (
                    ("events", "events"),
                    ("kernels", "kernels"),
                    ("nccl_kernels", "collectives"),
                )
            )
        result["files"].append(row)
        print(row["file"], row.get("events"), row.get("bytes_per_cpu_s"), flush=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
