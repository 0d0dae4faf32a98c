"""Records in one call: whoever measures gives the figures, the rest is filled in here."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from meshwright import __version__
from meshwright.records.kinds import Kind
from meshwright.records.record import (
    Machine,
    Record,
    Scalar,
    Software,
    Timing,
    describe_machine,
    describe_software,
    utc_now,
)

__all__ = ["make_record", "record_of_timing", "writer_name"]


def writer_name(verb: str) -> str:
    """``Record.writer`` of a verb: ``"meshwright 0.1.0 profile ops"``."""
    return f"meshwright {__version__} {verb}"


def make_record(
    *,
    kind: Kind,
    name: str,
    device: str,
    verb: str,
    method: str,
    unit: str,
    median: float,
    p10: float | None = None,
    p90: float | None = None,
    num_repeats: int = 1,
    samples: Sequence[float] = (),
    extra: Mapping[str, Scalar] | None = None,
    source: str = "",
    machine: Machine | None = None,
    software: Software | None = None,
    measured_utc: str | None = None,
) -> Record:
    """A Record of one figure.

    Args:
        kind: Kind of measurement; ``KINDS`` has its units and the keys of ``extra``.
        name: Which operator, collective, model...
        device: What it ran on, by the catalog's name.
        verb: What wrote it: ``"profile ops"``.
        method: How it was measured, in words.
        unit: Of the figures.
        median: The figure; of several repeats their median.
        p10: First decile; the median where there is only one figure.
        p90: Last decile, likewise.
        num_repeats: How many repeats the figures are of.
        samples: Every repeat, where they were kept.
        extra: What identifies the measurement; keys whose value is None are left out.
        source: Where an imported figure stood; empty where it was measured here.
        machine: What it ran on; None means this host.
        software: What ran; None means this process.
        measured_utc: When, ISO 8601; None means now, empty means not known.

    Raises:
        FieldError: a figure, the unit or a key has no sense for the kind.
    """
    return Record(
        kind=str(kind),
        name=name,
        device=device,
        writer=writer_name(verb),
        source=source,
        machine=_this_machine() if machine is None else machine,
        software=_this_software() if software is None else software,
        method=method,
        num_repeats=num_repeats,
        median=float(median),
        p10=float(median if p10 is None else p10),
        p90=float(median if p90 is None else p90),
        unit=unit,
        samples=tuple(map(float, samples)),
        measured_utc=utc_now() if measured_utc is None else measured_utc,
        extra={key: value for key, value in (extra or {}).items() if value is not None},
    )


def record_of_timing(
    timing: Timing,
    *,
    kind: Kind,
    name: str,
    device: str,
    verb: str,
    method: str,
    extra: Mapping[str, Scalar] | None = None,
    source: str = "",
    machine: Machine | None = None,
    software: Software | None = None,
    measured_utc: str | None = None,
) -> Record:
    """A Record, in seconds, of what the Timer measured, with every repeat; see ``make_record``."""
    return make_record(
        kind=kind,
        name=name,
        device=device,
        verb=verb,
        method=method,
        unit="s",
        median=timing.median_s,
        p10=timing.p10_s,
        p90=timing.p90_s,
        num_repeats=timing.num_repeats,
        samples=timing.times_s,
        extra=extra,
        source=source,
        machine=machine,
        software=software,
        measured_utc=measured_utc,
    )


@functools.cache
def _this_machine() -> Machine:
    return describe_machine()


@functools.cache
def _this_software() -> Software:
    return describe_software()
