"""Claim: planning takes seconds and little memory, capture included, without a GPU.

    python -m benchmarks.planning [--runs 3] -o FILE

Every run is a process of its own, from start to printed plan; time and peak memory are the
operating system's account of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.heading import heading

CASES = (
    ("gpt2", "8xa100-80gb", 64, "bf16", "O1"),
    ("gpt2", "8xa100-80gb", 64, "bf16", "O2"),
    ("llama3-8b", "64xh100", 256, "bf16", "O1"),
    ("mixtral-8x7b", "64xh100", 256, "bf16", "O1"),
    ("t5-11b", "64xa100-80gb", 256, "bf16", "O1"),
    ("gpt3-175b", "1024xh100", 1536, "bf16", "O1"),
    ("gpt3-175b", "1024xh100", 1536, "bf16", "O2"),
    ("llama3-405b", "16384xh100", 2048, "bf16", "O2"),
    *(
        ("llama3-8b", f"{count}xh100", max(count, 64), "bf16", "O1")
        for count in (8, 32, 128, 512, 2048, 16384)
    ),
    *((f"llama3-8b?num_layers={depth}", "64xh100", 256, "bf16", "O1") for depth in (8, 16, 64)),
)
"""Model, cluster, global batch, precision, level; the last rows vary devices, then depth."""


def planned(model: str, cluster: str, batch: int, precision: str, level: str) -> dict[str, Any]:
    """One planning process: wall and CPU seconds, peak resident bytes, and what it chose."""
    command = [sys.executable, "-m", "meshwright.cli", "plan", model, "--cluster", cluster]
    command += ["--global-batch", str(batch), "--precision", precision, f"-{level}", "--json"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    document = json.loads(text)
    return {
        "wall_s": time.perf_counter() - start,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "evaluations": document["search"]["evaluations"],
        "fits": document["predicted"]["fits"],
        "mesh": document["plan"]["mesh"],
    }


def main() -> None:
    """Plan every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("-o", "--output", default="benchmarks/results/planning.json")
    options = parser.parse_args()
    rows = []
    for model, cluster, batch, precision, level in CASES:
        if options.models and model not in options.models:
            continue
        runs = [planned(model, cluster, batch, precision, level) for _ in range(options.runs)]
        walls = sorted(run["wall_s"] for run in runs)
        rows.append(
            {
                "model": model,
                "cluster": cluster,
                "global_batch": batch,
                "precision": precision,
                "level": level,
                "n": options.runs,
                "wall_median_s": statistics.median(walls),
                "wall_min_s": walls[0],
                "wall_max_s": walls[-1],
                "cpu_median_s": statistics.median(run["cpu_s"] for run in runs),
                "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
                **{key: runs[0][key] for key in ("evaluations", "fits", "mesh")},
            }
        )
        print(
            f"{model:14} on {cluster:14} {level} {rows[-1]['wall_median_s']:6.1f} s "
            f"[{walls[0]:.1f}, {walls[-1]:.1f}]  {rows[-1]['peak_rss_bytes'] / 2**30:.2f} GiB"
        )
    document = {
        **heading("seconds and memory from command to printed plan"),
        "rows": rows,
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
