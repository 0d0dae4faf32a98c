"""One rank's profiler trace as columns: what the analyses need of some millions of events.

Some 40 bytes are kept of an event, so that a trace of gigabytes takes a fraction of its size.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshwright.errors import BadRequest
from meshwright.profiling.traces.events import Arguments, Event, event_stream
from meshwright.profiling.traces.json_array import ArrayStream
from meshwright.profiling.traces.sources import Member
from meshwright.units import MIB, format_bytes

__all__ = [
    "COPY",
    "FILL",
    "KERNEL",
    "DeviceWork",
    "Integers",
    "Launches",
    "RankTrace",
    "Spans",
    "read_rank_trace",
]

Integers = NDArray[np.int64]
_Value = int | float | str | None

KERNEL: Final = 0
COPY: Final = 1
FILL: Final = 2
"""What a device did: the values of ``DeviceWork.kind``."""

_MAX_NAMES_BYTES: Final = 128 * MIB
_MAX_KEPT: Final = 20_000_000
"""Events, of 57 bytes at most; a profiler's file of 6 GB has as many."""
_MAX_COLLECTIVES: Final = 500_000
_MAX_US: Final = 2.0**52
_PARAMETERS_OF_COLLECTIVE: Final = "record_param_comms"

# Where the events of a category go: operators, annotations, launches, then device work by kind.
# The capitals are those of PyTorch before 1.13.
_BINS: dict[str | None, int] = {
    "cpu_op": 0,
    "operator": 0,
    "Operator": 0,
    "user_annotation": 1,
    "cuda_runtime": 2,
    "cuda_driver": 2,
    "hip_runtime": 2,
    "Runtime": 2,
    "kernel": 3 + KERNEL,
    "Kernel": 3 + KERNEL,
    "gpu_memcpy": 3 + COPY,
    "Memcpy": 3 + COPY,
    "gpu_memset": 3 + FILL,
    "Memset": 3 + FILL,
}
_NO_ARGUMENTS: Final = Arguments()
_BETWEEN: Final = b"\0"
"""Between the dimensions and the types of a shape; JSON holds no such byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Operators or annotations of the host, as columns; times in ns from the trace's zero."""

    start_ns: Integers
    end_ns: Integers
    thread: Integers
    name: Integers
    """Number of ``RankTrace.names``."""
    shape: Integers
    """Number of ``RankTrace.shapes``."""
    external_id: Integers
    """-1 where there is none."""

    def __len__(self) -> int:
        return len(self.start_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """Calls of the device's runtime that put work into a stream."""

    start_ns: Integers
    thread: Integers
    correlation: Integers


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWork:
    """Kernels, copies and fills."""

    start_ns: Integers
    end_ns: Integers
    device: Integers
    stream: Integers
    name: Integers
    kind: Integers
    correlation: Integers
    external_id: Integers
    """-1 where there is none, as for ``correlation``."""

    def __len__(self) -> int:
        return len(self.start_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTrace:
    """What the profiler saw of one rank."""

    file_name: str
    zero_us: float
    """What the file calls the time that is 0 ns here."""
    num_bytes: int
    num_events: int
    num_dropped: int
    """Events without a time, or with one that makes no sense."""
    num_negative: int
    """Events that end before they begin (of -1 us where they never ended); they count as 0 long."""
    num_begin_end: int
    """Events that say begin and end apart; they are not read."""
    names: tuple[str, ...]
    shapes: tuple[tuple[bytes, bytes], ...]
    """JSON of the dimensions and of the types of an operator's inputs; empty where not said."""
    threads: tuple[tuple[_Value, _Value], ...]
    operators: Spans
    annotations: Spans
    launches: Launches
    work: DeviceWork
    collectives: dict[int, Arguments]
    """Arguments of operators, by index, that describe a collective."""
    kernel_collectives: dict[int, Arguments]
    """The same of device work that says so itself."""
    peak_memory_bytes: dict[int, int]
    """Largest total allocated, by device; empty where memory was not profiled."""
    keys: dict[str, Any]
    """Top-level keys of the file that the analyses use, decoded."""

    @property
    def rank(self) -> int | None:
        """Global rank; None where the file does not say."""
        value = self.distributed.get("rank")
        return value if isinstance(value, int) and 0 <= value < 2**31 else None

    @property
    def distributed(self) -> dict[str, Any]:
        """``distributedInfo``: backend, rank, world_size, pg_config; empty where not said."""
        found = self.keys.get("distributedInfo")
        return found if isinstance(found, dict) else {}

    def device_name(self, device: int) -> str:
        """As the driver calls it; empty where the file does not say."""
        found = self.keys.get("deviceProperties")
        for entry in found if isinstance(found, list) else ():
            if isinstance(entry, dict) and entry.get("id") == device:
                name = entry.get("name")
                return name if isinstance(name, str) else ""
        return ""


class _Numbers(dict[Any, int]):
    """Things by the order they were first asked for; the memory they may take is bounded."""

    def __init__(self, trace_name: str) -> None:
        super().__init__()
        self._trace_name = trace_name
        self._num_bytes = 0

    def __missing__(self, key: Any) -> int:
        self._num_bytes += 200 + (len(key) if isinstance(key, str | bytes) else 0)
        self._num_bytes += sum(len(str(part)) for part in key) if isinstance(key, tuple) else 0
        if self._num_bytes > _MAX_NAMES_BYTES:
            raise BadRequest(
                f"{self._trace_name}: over {format_bytes(_MAX_NAMES_BYTES)} of different names and "
                "shapes; that is no trace of a program"
            )
        number = self[key] = len(self)
        return number


class _Builder:
    """Takes events, gives the columns.

    A batch is sorted by category first, then each column takes all its values in one comprehension:
    twice as fast as event by event, and this is where an import spends its time.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.names, self.shapes, self.threads = _Numbers(name), _Numbers(name), _Numbers(name)
        self.spans = (_columns("ddiiiq"), _columns("ddiiiq"))
        self.launches = _columns("diq")
        self.work = _columns("ddqqibqq")
        self.collectives: dict[int, Arguments] = {}
        self.kernel_collectives: dict[int, Arguments] = {}
        self.peaks: dict[int, int] = {}
        self.num_events = self.num_dropped = self.num_begin_end = 0
        self._sorted: tuple[list[Event], ...] = ([], [], [], [], [], [])
        self._bins = {category: self._sorted[which] for category, which in _BINS.items()}

    def add(self, events: list[Event]) -> None:
        """Keep what is needed of ``events``."""
        self.num_events += len(events)
        bins = self._bins
        for event in events:
            if event.ph == "X":
                part = bins.get(event.cat)
                if part is None:
                    continue
                start_us = event.ts
                if start_us is None or event.dur is None or not -_MAX_US < start_us < _MAX_US:
                    self.num_dropped += 1
                else:
                    part.append(event)
            elif event.ph in ("B", "E"):
                self.num_begin_end += 1
            elif event.name == "[memory]" and event.args is not None:
                self._add_memory(event.args)
        operators, annotations, launches, *device = self._sorted
        self._add_spans(operators, 0)
        self._add_spans(annotations, 1)
        self._add_launches(launches)
        for kind, work in enumerate(device):
            self._add_work(work, kind)
        for part in self._sorted:
            part.clear()
        kept = sum(len(one[0]) for one in (*self.spans, self.launches, self.work))
        collectives = len(self.collectives) + len(self.kernel_collectives)
        if kept > _MAX_KEPT or collectives > _MAX_COLLECTIVES:
            raise BadRequest(
                f"{self._name}: more than {_MAX_KEPT:,} events or {_MAX_COLLECTIVES:,} "
                "collectives; profile fewer steps"
            )

    def _add_spans(self, events: list[Event], which: int) -> None:
        start, duration, thread, name, shape, external = self.spans[which]
        arguments = [event.args or _NO_ARGUMENTS for event in events]
        if which == 0:
            for place, event in enumerate(events, start=len(start)):
                if event.name == _PARAMETERS_OF_COLLECTIVE and event.args is not None:
                    self.collectives[place] = _without_raw(event.args)
        names, shapes, threads = self.names, self.shapes, self.threads
        start.extend([event.ts for event in events])
        duration.extend([event.dur for event in events])
        thread.extend([threads[event.pid, event.tid] for event in events])
        name.extend([names[event.name] for event in events])
        shape.extend(
            [shapes[_BETWEEN.join((one.input_dims, one.input_types))] for one in arguments]
        )
        external.extend(
            [one.external_id if type(one.external_id) is int else -1 for one in arguments]
        )

    def _add_launches(self, events: list[Event]) -> None:
        known = [
            event
            for event in events
            if event.args is not None and type(event.args.correlation) is int
        ]
        start, thread, correlation = self.launches
        threads = self.threads
        start.extend([event.ts for event in known])
        thread.extend([threads[event.pid, event.tid] for event in known])
        correlation.extend([event.args.correlation for event in known if event.args is not None])

    def _add_work(self, events: list[Event], kind: int) -> None:
        start, duration, device, stream, name, kinds, correlation, external = self.work
        arguments = [event.args or _NO_ARGUMENTS for event in events]
        for place, one in enumerate(arguments, start=len(start)):
            if one.collective is not None:
                self.kernel_collectives[place] = _without_raw(one)
        names = self.names
        start.extend([event.ts for event in events])
        duration.extend([event.dur for event in events])
        pairs = list(zip(events, arguments, strict=True))
        devices = [event.pid if one.device is None else one.device for event, one in pairs]
        streams = [event.tid if one.stream is None else one.stream for event, one in pairs]
        device.extend([one if type(one) is int else _whole(one) for one in devices])
        stream.extend([one if type(one) is int else _whole(one) for one in streams])
        name.extend([names[event.name] for event in events])
        kinds.extend([kind] * len(events))
        numbers = [one.correlation for one in arguments]
        correlation.extend([one if type(one) is int else _whole(one) for one in numbers])
        numbers = [one.external_id for one in arguments]
        external.extend([one if type(one) is int else _whole(one) for one in numbers])

    def _add_memory(self, arguments: Arguments) -> None:
        total = arguments.total_allocated
        if isinstance(total, int) and arguments.device_type == 1:  # c10::DeviceType::CUDA
            device = _whole(arguments.device_id)
            self.peaks[device] = max(total, self.peaks.get(device, 0))

    def trace(self, stream: ArrayStream[Event]) -> RankTrace:
        starts = [column[0] for column in (*self.spans, self.launches, self.work) if column[0]]
        zero_us = float(np.floor(min(min(column) for column in starts))) if starts else 0.0
        operators, annotations = (
            Spans(
                **_times(columns[0], columns[1], zero_us),
                **_integers(("thread", "name", "shape", "external_id"), columns[2:]),
            )
            for columns in self.spans
        )
        launch_times = _times(self.launches[0], None, zero_us)
        work_keys = ("device", "stream", "name", "kind", "correlation", "external_id")
        return RankTrace(
            file_name=stream.name,
            zero_us=zero_us,
            num_bytes=stream.num_bytes,
            num_events=self.num_events,
            num_dropped=self.num_dropped,
            num_negative=sum(map(_num_negative, (*(one[1] for one in self.spans), self.work[1]))),
            num_begin_end=self.num_begin_end,
            names=tuple(self.names),
            shapes=tuple((dims, types) for dims, _, types in map(_parted, self.shapes)),
            threads=tuple(self.threads),
            operators=operators,
            annotations=annotations,
            launches=Launches(
                **launch_times, **_integers(("thread", "correlation"), self.launches[1:])
            ),
            work=DeviceWork(
                **_times(self.work[0], self.work[1], zero_us),
                **_integers(work_keys, self.work[2:]),
            ),
            collectives=self.collectives,
            kernel_collectives=self.kernel_collectives,
            peak_memory_bytes=self.peaks,
            keys=_decoded(stream.keys),
        )


def read_rank_trace(member: Member) -> RankTrace:
    """The profiler trace in ``member``, read once from its beginning to its end.

    Raises:
        BadRequest: it is damaged, cut short, empty, or no profiler trace.
    """
    stream = event_stream(member)
    builder = _Builder(member.name)
    for batch in stream.batches():
        builder.add(batch)
    if not builder.num_events:
        raise BadRequest(f"{member.name}: holds no event; did the profiler run any step?")
    return builder.trace(stream)


def _num_negative(length_us: array[float]) -> int:
    return int((np.frombuffer(length_us, dtype=np.float64) < 0).sum()) if length_us else 0


def _columns(codes: str) -> list[array[Any]]:
    return [array(code) for code in codes]


def _parted(shape: bytes) -> tuple[bytes, bytes, bytes]:
    return shape.partition(_BETWEEN)


def _whole(value: _Value) -> int:
    if type(value) is int:
        return value
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdigit() and len(value) < 19 else None
    return int(value) if isinstance(value, int) else -1


def _without_raw(arguments: Arguments) -> Arguments:
    """The same, without views that would keep the text of the file in memory."""
    return msgspec.structs.replace(
        arguments,
        input_dims=msgspec.Raw(bytes(arguments.input_dims)),
        input_types=msgspec.Raw(bytes(arguments.input_types)),
    )


def _times(start: array[float], length: array[float] | None, zero_us: float) -> dict[str, Any]:
    """Start and end in whole nanoseconds.

    What stands in the file is a double of microseconds; the difference to ``zero_us`` is exact
    (both lie on the double's grid), so no nanosecond is lost that the file holds.
    """
    start_us = np.frombuffer(start, dtype=np.float64) if start else np.empty(0)
    start_ns = np.rint((start_us - zero_us) * 1e3).astype(np.int64)
    if length is None:
        return {"start_ns": start_ns}
    length_us = np.frombuffer(length, dtype=np.float64) if length else np.empty(0)
    length_us = np.clip(length_us, 0, _MAX_US)  # profilers write -1 for what never ended
    return {"start_ns": start_ns, "end_ns": start_ns + np.rint(length_us * 1e3).astype(np.int64)}


def _integers(keys: tuple[str, ...], columns: list[array[Any]]) -> dict[str, Any]:
    """The columns as arrays that share their memory."""
    return {
        key: np.frombuffer(column, dtype=column.typecode) if column else np.empty(0, np.int64)
        for key, column in zip(keys, columns, strict=True)
    }


def _decoded(keys: dict[str, msgspec.Raw]) -> dict[str, Any]:
    wanted = (
        "deviceProperties",
        "distributedInfo",
        "baseTimeNanoseconds",
        "cuda_runtime_version",
        "cuda_driver_version",
    )
    return {key: msgspec.json.decode(keys[key]) for key in wanted if key in keys}
