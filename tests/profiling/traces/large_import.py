"""Imports one trace in a process of its own and prints what it cost, as JSON.

    python -m tests.profiling.traces.large_import FILE

Memory is the high-water mark of this process by the kernel's account (``VmHWM``, Linux).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from meshwright.profiling.traces.importing import import_traces
from tests.house.tree import ROOT
from tests.profiling.traces.made_traces import large_trace_pieces

__all__ = ["import_in_a_process", "write_large_trace"]


def write_large_trace(path: Path, num_bytes: int) -> int:
    """A made-up trace of at least ``num_bytes`` at ``path``; its size."""
    with path.open("w", encoding="utf-8") as file:
        for piece in large_trace_pieces(num_bytes):
            file.write(piece)
    return path.stat().st_size


def import_in_a_process(path: Path) -> dict[str, Any]:
    """What importing ``path`` took: seconds of CPU and of clock, peak bytes, and its summary."""
    command = [sys.executable, "-m", "tests.profiling.traces.large_import", str(path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel does not tell VmHWM")


def _main() -> None:
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    found = import_traces([Path(sys.argv[1])])
    cpu_s, wall_s = time.process_time() - begin_cpu_s, time.perf_counter() - begin_s
    print(
        json.dumps(
            {
                "cpu_s": cpu_s,
                "wall_s": wall_s,
                "peak_rss_bytes": _peak_bytes(),
                "num_records": sum(len(one.records) for one in found),
                "summaries": [one.summary for one in found],
            }
        )
    )


if __name__ == "__main__":
    _main()
