"""Profiler traces made up for tests: small ones event by event, large ones by the gigabyte."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAIN, AUTOGRAD = 11, 12
"""Threads of the host."""
PID = 10


class TraceMaker:
    """Collects events; times are microseconds, as in a real file."""

    def __init__(self, **keys: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.keys: dict[str, Any] = {"schemaVersion": 1, **keys}

    def op(
        self, name: str, ts: float, dur: float, *, thread: int = MAIN, **args: Any
    ) -> TraceMaker:
        """An operator of the host."""
        return self._add("cpu_op", name, PID, thread, ts, dur, args)

    def note(
        self, name: str, ts: float, dur: float, *, thread: int = MAIN, **args: Any
    ) -> TraceMaker:
        """An annotation of the host."""
        return self._add("user_annotation", name, PID, thread, ts, dur, args)

    def launch(self, correlation: int, ts: float, *, thread: int = MAIN) -> TraceMaker:
        """A call of the device's runtime."""
        args = {"correlation": correlation, "External id": correlation}
        return self._add("cuda_runtime", "cudaLaunchKernel", PID, thread, ts, 1, args)

    def kernel(
        self,
        name: str,
        ts: float,
        dur: float,
        *,
        correlation: int = 0,
        stream: int = 7,
        device: int = 0,
        category: str = "kernel",
        **args: Any,
    ) -> TraceMaker:
        """Work of the device."""
        args |= {"correlation": correlation, "stream": stream, "device": device}
        return self._add(category, name, device, stream, ts, dur, args)

    def _add(
        self, cat: str, name: str, pid: int, tid: int, ts: float, dur: float, args: dict[str, Any]
    ) -> TraceMaker:
        event = {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur}
        self.events.append({**event, "args": args})
        return self

    def text(self) -> bytes:
        """The file."""
        return json.dumps({**self.keys, "traceEvents": self.events}, indent=2).encode()

    def write(self, path: Path) -> Path:
        """The file at ``path``, compressed where its name says so."""
        data = self.text()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path


def _event(cat: str, name: str, pid: int, tid: int, ts: float, dur: float, args: str) -> str:
    return (
        f'  {{\n    "ph": "X", "cat": "{cat}", "name": "{name}", "pid": {pid}, "tid": {tid},\n'
        f'    "ts": {ts:.3f}, "dur": {dur:.3f},\n    "args": {{\n      {args}\n    }}\n  }}'
    )


def large_trace_pieces(num_bytes: int, *, first_ts: float = 4458676416788.066) -> Iterator[str]:
    """A trace of at least ``num_bytes`` as a profiler would write it, in pieces of some 100 KB.

    Each iteration of 10 ms has 100 linear operators, each with its launch, kernel and arrows, and
    one all-reduce of 4 MB that lasts 1 ms.
    """
    yield '{\n  "schemaVersion": 1,\n  "distributedInfo": {"rank": 0, "world_size": 1},\n'
    yield '  "displayTimeUnit": "ms",\n  "traceEvents": [\n'
    written = 0
    iteration = 0
    call = 0
    separator = ""
    while written < num_bytes:
        start = first_ts + iteration * 10_000
        mark = f"ProfilerStep#{iteration}"
        rows = [_event("user_annotation", mark, PID, MAIN, start, 9_990, '"a": 0')]
        for layer in range(100):
            call += 1
            at = start + 10 + layer * 80
            ids = f'"External id": {call}, "Record function id": {call}'
            dims = '"Input Dims": [[4096], [32, 1024], [1024, 4096], [], []]'
            types = '"Input type": ["float", "float", "float", "Scalar", "Scalar"]'
            rows += [
                _event("cpu_op", "aten::linear", PID, MAIN, at, 60, f"{ids}, {dims}, {types}"),
                _event("cpu_op", "aten::addmm", PID, MAIN, at + 5, 50, f"{ids}, {dims}, {types}"),
                _event(
                    "cuda_runtime", "cudaLaunchKernel", PID, MAIN, at + 20, 8.5,
                    f'{ids}, "cbid": 211, "correlation": {call}',
                ),
                f'  {{\n    "ph": "s", "id": {call}, "pid": {PID}, "tid": {MAIN},\n'
                f'    "ts": {at + 20:.3f}, "cat": "ac2g", "name": "ac2g"\n  }}',
                _event(
                    "kernel", "void cutlass::Kernel<cutlass_80_tensorop_s1688gemm>(Params)", 0, 7,
                    at + 40, 60,
                    f'{ids}, "device": 0, "context": 1, "stream": 7, "correlation": {call}, '
                    '"registers per thread": 168, "shared memory": 65536, "grid": [32, 8, 1], '
                    '"block": [256, 1, 1], "est. achieved occupancy %": 12',
                ),
            ]  # fmt: skip
        rows.append(
            _event(
                "kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevComm*)", 0, 20,
                start + 8_500, 1_000,
                f'"device": 0, "stream": 20, "correlation": {10**9 + iteration}, '
                '"Collective name": "allreduce", "dtype": "Float", "In msg nelems": 1048576, '
                '"Group size": 1, "Process Group Name": "0"',
            )
        )  # fmt: skip
        text = separator + ",\n".join(rows)
        separator = ",\n"
        written += len(text)
        iteration += 1
        yield text
    yield '\n  ],\n  "traceName": "made up"\n}\n'
