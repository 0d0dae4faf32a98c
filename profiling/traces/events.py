"""Events of a profiler's trace, decoded with the fields the analyses use."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import msgspec
from msgspec import Meta, field

from meshwright.profiling.traces.json_array import ArrayStream
from meshwright.profiling.traces.sources import Member

__all__ = ["Arguments", "Event", "event_stream"]

_Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Number = _Integer | float | str | None
_NOTHING = msgspec.Raw(b"")


class Arguments(msgspec.Struct, gc=False):
    """The arguments of an event that we use; None where it has none."""

    external_id: _Number = field(default=None, name="External id")
    correlation: _Number = None
    stream: _Number = None
    device: _Number = None
    input_dims: msgspec.Raw = field(default=_NOTHING, name="Input Dims")
    input_types: msgspec.Raw = field(default=_NOTHING, name="Input type")
    collective: _Number = field(default=None, name="Collective name")
    dtype: _Number = None
    elements_in: _Number = field(default=None, name="In msg nelems")
    elements_out: _Number = field(default=None, name="Out msg nelems")
    group_size: _Number = field(default=None, name="Group size")
    group_name: _Number = field(default=None, name="Process Group Name")
    group_ranks: _Number = field(default=None, name="Process Group Ranks")
    sequence: _Number = field(default=None, name="Seq")
    total_allocated: _Number = field(default=None, name="Total Allocated")
    device_type: _Number = field(default=None, name="Device Type")
    device_id: _Number = field(default=None, name="Device Id")


class Event(msgspec.Struct, gc=False):
    """One event of a Chrome trace; times in microseconds, as they stand in the file."""

    ph: str = ""
    cat: str | None = None
    name: str = ""
    pid: _Number = None
    tid: _Number = None
    ts: _Integer | float | None = None
    dur: _Integer | float | None = None
    args: Arguments | None = None


def event_stream(member: Member) -> ArrayStream[Event]:
    """The events of a Chrome trace: an object with ``traceEvents``, or their array alone.

    A field of another type than usual is left out of its event; the others stay.
    """
    return ArrayStream(member, key="traceEvents", item=Event, loose=_event, may_be_bare=True)


def _event(plain: dict[str, Any]) -> Event:
    arguments = plain.pop("args", None)
    event = _kept(plain, Event)
    if isinstance(arguments, dict):
        raw = {
            key: msgspec.Raw(msgspec.json.encode(arguments.pop(key)))
            for key in ("Input Dims", "Input type")
            if key in arguments
        }
        event.args = _kept(arguments, Arguments)
        event.args.input_dims = raw.get("Input Dims", _NOTHING)
        event.args.input_types = raw.get("Input type", _NOTHING)
    return event


def _kept(plain: dict[str, Any], type_: type[Any]) -> Any:
    """A ``type_`` of those entries that have the types it wants."""
    try:
        return msgspec.convert(plain, type_)
    except msgspec.ValidationError:
        kept = type_()
    fields = dict(zip(type_.__struct_encode_fields__, type_.__struct_fields__, strict=True))
    for key in fields.keys() & plain.keys():
        with contextlib.suppress(msgspec.ValidationError):
            one = msgspec.convert({key: plain[key]}, type_)
            setattr(kept, fields[key], getattr(one, fields[key]))
    return kept
