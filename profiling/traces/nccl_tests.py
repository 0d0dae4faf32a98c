"""Text that the programs of nccl-tests print (``all_reduce_perf``...), to Records.

One line holds size, count, type, operation and root, then time, two bandwidths and the number of
wrong results, first out of place, then in place; old versions print neither root nor operation of
some. A log may hold several tests after one another. Which collective one is of newer versions say;
of others the name of the file or a command line in the text must, or columns and bandwidths where
only one collective fits them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from meshwright.errors import BadRequest
from meshwright.profiling.traces.formats import (
    ImportOptions,
    TraceFormat,
    TraceImport,
    members_of,
)
from meshwright.profiling.traces.published import device_name, unknown_host, unknown_software
from meshwright.profiling.traces.sources import Member, open_source
from meshwright.profiling.traces.words import dtype_of
from meshwright.records import Kind, Record, make_record
from meshwright.strict_json import one_line
from meshwright.units import MIB

__all__ = ["import_nccl_tests"]

_MAX_TEXT_BYTES = 64 * MIB
_MAX_RANKS = 2**20

_NAMES = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoallv": "all_to_all",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "sendrecv": "send_recv",
    "hypercube": "hypercube",
    "gather": "gather",
    "scatter": "scatter",
    "reduce": "reduce",
}
"""By the names nccl-tests uses, the longer before those they contain."""

_LAUNCHER = re.compile(r"^(\[\d+,\d+\]<std(out|err)>:|\d+: )")  # mpirun --tag-output, srun -l
_PROGRAM = re.compile(rf"\b({'|'.join(_NAMES)})_perf\b")
_FILE_NAME = re.compile(rf"({'|'.join(_NAMES)})", re.IGNORECASE)
_OPTION = re.compile(r"\b(nThread|nGpus|warmup iters|agg iters|iters):?\s+(\d+)")
_RANK = re.compile(
    r"^#\s+Rank\s+(\d+)(?:\s+Group\s+(\d+))?\s+Pid\s+\d+\s+on\s+(\S+)\s+device\s+\d+\s+\[[^\]]*\]\s*(.*)$"
)
_COLUMN_NAMES = re.compile(r"#\s+size\s+count")
_SIZE = re.compile(r"-?\d+\s+\S")
_NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]*$")


@dataclass(slots=True, kw_only=True)
class _Test:
    """What one run of a program printed."""

    program: str = ""
    ranks: Counter[str]
    """By group."""
    hosts: Counter[str]
    devices: set[str]
    options: dict[str, int]
    lines: list[_Line]
    num_unread: int = 0
    """Lines that begin with a size and hold no result."""
    in_table: bool = False

    @classmethod
    def new(cls) -> _Test:
        return cls(ranks=Counter(), hosts=Counter(), devices=set(), options={}, lines=[])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    num_bytes: int
    dtype: str
    redop: str
    root: int | None
    timed: tuple[tuple[float, float, float, str], ...]
    """Microseconds, both bandwidths and the wrong results, out of place and in place."""


def import_nccl_tests(paths: Sequence[Path], options: ImportOptions) -> list[TraceImport]:
    """What outputs of nccl-tests tell: one import a test, one Record a size and placement.

    Raises:
        BadRequest: one is damaged, holds no results, or does not tell which collective it is of or
            among how many ranks.
    """
    found: list[TraceImport] = []
    for path in paths:
        with open_source(path, max_bytes=min(options.max_bytes, _MAX_TEXT_BYTES)) as source:
            left_out: list[str] = []
            read = [
                (member.name, _text(member))
                for member in members_of(source, TraceFormat.NCCL_TESTS, left_out)
            ]
            said = f"{source.name} sha256:{source.sha256()}"
        for name, text in read:
            found += _imports(name, text, said)
        if left_out:
            notes = tuple(f"left out of the archive: {item}" for item in left_out)
            found[-1] = replace(found[-1], lines=(*found[-1].lines, *notes))
    return found


def _text(member: Member) -> str:
    pieces = []
    while data := member.read(MIB):
        pieces.append(data)
    return b"".join(pieces).decode("utf-8", "replace")


def _imports(name: str, text: str, source: str) -> list[TraceImport]:
    tests = _tests(text)
    whole = [test for test in tests if test.lines]
    if not whole:
        raise BadRequest(f"{name}: holds no line of results; did the test end early?")
    begun = sum(bool(test.ranks or test.in_table) for test in tests if not test.lines)
    found: list[TraceImport] = []
    for test in whole:
        skipped: Counter[str] = Counter()
        if begun and test is whole[0]:
            skipped["tests without any result"] = begun
        found.append(_import(test, name, source, skipped))
    return found


def _tests(text: str) -> list[_Test]:
    """What each test printed; a new one begins where results or ranks stand before a head."""
    test = _Test.new()
    tests = [test]
    for raw in text.splitlines():
        line = _LAUNCHER.sub("", raw).rstrip()
        if line.startswith("#") or "_perf" in line:
            begins = "concluded" not in line and ("nThread" in line or _PROGRAM.search(line))
            if begins and (test.lines or test.ranks or test.in_table):
                test = _Test.new()
                tests.append(test)
            _read_header(line, test)
        elif (result := _result(line)) is not None:
            test.lines.append(result)
        elif (test.in_table or test.lines) and _SIZE.match(line.lstrip()):
            test.num_unread += 1
    return tests


def _import(test: _Test, name: str, source: str, skipped: Counter[str]) -> TraceImport:
    group_size = _group_size(test, name)
    collective = _collective(test, name, group_size)
    if test.num_unread:
        skipped["lines of a size without a result"] = test.num_unread
    records = tuple(_records(collective, group_size, test, source, skipped))
    left_out = [f"left out: {count} {reason}" for reason, count in skipped.items()]
    if not records:
        raise BadRequest(
            f"{name}: holds no usable result ({'; '.join(left_out)}); did the test end early?"
        )
    missing = ["the spread of the repeats", "when it was measured"]
    if not test.devices:
        missing.append("the devices")
    sizes = sorted({line.num_bytes for line in test.lines})
    summary = {
        "collective": collective,
        "group_size": group_size,
        "hosts": len(test.hosts) or None,
        "devices": sorted(test.devices),
        "num_sizes": len(sizes),
        "largest_busbw_bytes_per_s": _largest_busbw(test.lines) * 1e9,
        "left_out": dict(skipped),
    }
    said = [
        f"{collective} among {group_size} ranks on {len(test.hosts) or 'unknown'} hosts, "
        f"{len(sizes)} sizes from {sizes[0]} to {sizes[-1]} bytes, bus bandwidth up to "
        f"{_largest_busbw(test.lines):.4g} GB/s",
        *left_out,
    ]
    return TraceImport(
        format=TraceFormat.NCCL_TESTS,
        names=(name,),
        records=records,
        summary=summary,
        missing=tuple(missing),
        lines=tuple(said),
    )


def _read_header(line: str, header: _Test) -> None:
    program = _PROGRAM.search(line)
    if program and not header.lines:
        header.program = program[1]
    header.in_table |= bool(_COLUMN_NAMES.match(line))
    for key, value in _OPTION.findall(line):
        header.options.setdefault(key, int(value[:9]))
    rank = _RANK.match(line)
    if rank:
        header.ranks[rank[2] or "0"] += 1
        header.hosts[rank[3]] += 1
        header.devices.add(one_line(rank[4].strip()))


def _result(line: str) -> _Line | None:
    """A line of results; None where it is none."""
    words = line.split()
    if len(words) < 7 or not (words[0].isdigit() and words[1].isdigit()):
        return None
    if not _WORD.match(words[2]) or len(words[0]) > 18:
        return None
    rest = words[3:]
    redop = rest.pop(0) if _WORD.match(rest[0]) else "none"
    # Three columns and the wrong results, once or twice; before them the root in newer versions.
    root = int(rest.pop(0)) if len(rest) % 4 == 1 and re.fullmatch(r"-?\d{1,9}", rest[0]) else None
    if len(rest) not in (4, 8) or not all(_NUMBER.match(word) for word in rest[:3]):
        return None
    timed = []
    for at in range(0, len(rest), 4):
        if all(_NUMBER.match(word) for word in rest[at : at + 3]):
            time_us, algbw, busbw = map(float, rest[at : at + 3])
            timed.append((time_us, algbw, busbw, rest[at + 3]))
        else:
            timed.append((math.nan, math.nan, math.nan, rest[at + 3]))
    return _Line(
        num_bytes=int(words[0]), dtype=words[2], redop=redop, root=root, timed=tuple(timed)
    )


def _bus_factor(lines: Sequence[_Line]) -> float | None:
    """Bus over algorithm bandwidth, of the line where both are largest and so most exact."""
    pairs = [
        (algbw, busbw)
        for line in lines
        for _, algbw, busbw, _ in line.timed
        if math.isfinite(algbw) and algbw > 0 and busbw > 0
    ]
    if not pairs:
        return None
    algbw, busbw = max(pairs)
    return busbw / algbw if algbw >= 0.5 else None  # two decimals are printed


def _group_size(header: _Test, name: str) -> int:
    if header.ranks:
        sizes = set(header.ranks.values())
        if len(sizes) > 1:
            raise BadRequest(f"{name}: its groups have different numbers of ranks; split them")
        return sizes.pop()
    of_one_process = header.options.get("nThread", 0) * header.options.get("nGpus", 0)
    factor = _bus_factor(header.lines)
    fits = factor is None or any(
        abs(factor / expected - 1) < 0.03
        for expected in (
            1.0,
            2 * (of_one_process - 1) / max(of_one_process, 1),
            (of_one_process - 1) / max(of_one_process, 1),
        )
        if expected > 0
    )
    if not 1 <= of_one_process <= _MAX_RANKS or not fits:
        raise BadRequest(
            f"{name}: does not tell among how many ranks; keep the lines '#  Rank 0 ...' of the "
            "output"
        )
    return of_one_process


def _collective(header: _Test, name: str, group_size: int) -> str:
    lines = header.lines
    if header.program:
        return _NAMES[header.program]
    in_name = _FILE_NAME.search(re.sub(r"[-. ]", "_", name.rpartition(":")[2]))
    if in_name:
        return _NAMES[in_name[1].lower()]
    reduces = lines[0].redop not in ("none", "")
    has_root = (lines[0].root or -1) >= 0
    factor = _bus_factor(lines)
    by_factor = {
        "whole": (2 * (group_size - 1) / group_size, reduces and not has_root, "all_reduce"),
        "part": ((group_size - 1) / group_size, reduces and not has_root, "reduce_scatter"),
        "one": (1.0, reduces and has_root, "reduce"),
    }
    if factor is not None and group_size > 2:
        for expected, fits, collective in by_factor.values():
            if fits and abs(factor / expected - 1) < 0.03:
                return collective
    raise BadRequest(
        f"{name}: does not tell which collective it is of; put its name into that of the file, "
        "such as alltoall_perf.txt"
    )


def _records(
    collective: str,
    group_size: int,
    header: _Test,
    source: str,
    skipped: Counter[str],
) -> Iterator[Record]:
    gpu = header.devices.copy().pop() if len(header.devices) == 1 else ""
    iterations = header.options.get("iters", 1) or 1
    per_host = set(header.hosts.values())
    for line in header.lines:
        for in_place, (time_us, _, _, wrong) in enumerate(line.timed):
            if not math.isfinite(time_us) or time_us <= 0:
                skipped["results without a time"] += 1
            elif wrong.isdigit() and int(wrong[:9]) > 0:
                skipped["results that were wrong"] += 1
            elif line.num_bytes == 0:
                skipped["results of no bytes"] += 1
            elif group_size < 2 and collective != "send_recv":
                skipped["results of one rank alone"] += 1
            else:
                yield make_record(
                    kind=Kind.COLLECTIVE,
                    name=collective,
                    device=device_name(gpu),
                    verb="traces import",
                    source=source,
                    machine=unknown_host(sorted(header.devices)),
                    software=unknown_software(),
                    method="nccl-tests: mean over its iterations, of the slowest rank or the mean "
                    "of ranks as its option -a says; the spread is not printed",
                    unit="s",
                    median=time_us * 1e-6,
                    num_repeats=iterations,
                    measured_utc="",
                    extra={
                        "bytes": line.num_bytes,
                        "group_size": group_size,
                        "backend": "nccl",
                        "dtype": dtype_of(line.dtype),
                        "in_place": bool(in_place),
                        "num_calls": header.options.get("agg iters"),
                        "hosts": len(header.hosts) or None,
                        "ranks_per_host": per_host.copy().pop() if len(per_host) == 1 else None,
                    },
                )


def _largest_busbw(lines: Sequence[_Line]) -> float:
    return max((busbw for line in lines for _, _, busbw, _ in line.timed if busbw > 0), default=0.0)
