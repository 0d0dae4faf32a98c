"""Arrays read piece by piece are what a JSON reader of the whole file finds."""

from __future__ import annotations

import io
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import BadRequest
from meshwright.profiling.traces import json_array
from meshwright.profiling.traces.json_array import ArrayStream
from meshwright.profiling.traces.sources import Member


class _Item(msgspec.Struct):
    name: str = ""
    args: msgspec.Raw = msgspec.Raw(b"null")


class _Pieces:
    """A stream that gives at most so many bytes at once."""

    def __init__(self, data: bytes, num_bytes: int) -> None:
        self._file = io.BytesIO(data)
        self._num_bytes = num_bytes

    def read(self, num_bytes: int) -> bytes:
        return self._file.read(min(num_bytes, self._num_bytes))


def _stream(data: bytes, *, piece: int = 10**9, bare: bool = True) -> ArrayStream[_Item]:
    member = Member(_Pieces(data, piece), name="trace.json", left_bytes=None)
    return ArrayStream(member, key="events", item=_Item, may_be_bare=bare)


def _items(data: bytes, *, piece: int = 10**9) -> list[dict[str, Any]]:
    stream = _stream(data, piece=piece)
    return [
        {
            "name": one.name,
            "args": json.loads(bytes(one.args).decode("utf-8", "replace"), strict=False),
        }
        for batch in stream.batches()
        for one in batch
    ]


# What may stand in a name and confuse a reader that does not know where strings end.
_TEXT = st.text(st.sampled_from('a}{],[": \\\n\té\u2028😀'), max_size=12)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_EVENTS = st.lists(st.fixed_dictionaries({"name": _TEXT, "args": _VALUES}), max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    events=_EVENTS,
    head=st.dictionaries(_TEXT, _VALUES, max_size=2),
    tail=st.dictionaries(_TEXT.map(lambda text: f"t{text}"), _VALUES, max_size=2),
    indent=st.sampled_from((None, 0, 2)),
    piece=st.integers(1, 200),
    bare=st.booleans(),
)
def test_pieces_give_what_the_whole_gives(
    events: list[dict[str, Any]],
    head: dict[str, Any],
    tail: dict[str, Any],
    indent: int | None,
    piece: int,
    bare: bool,
) -> None:
    whole: Any = events if bare else {**head, "events": events, **tail}
    data = json.dumps(whole, indent=indent, ensure_ascii=False).encode()

    stream = _stream(data, piece=piece)
    found = [
        {"name": one.name, "args": json.loads(bytes(one.args))}
        for batch in stream.batches()
        for one in batch
    ]

    assert json.loads(data) == (
        found
        if bare
        else {
            "events": found,
            **{key: json.loads(bytes(raw)) for key, raw in stream.keys.items()},
        }
    )


@settings(max_examples=150, deadline=None)
@given(
    events=_EVENTS,
    place=st.integers(0, 10_000),
    byte=st.sampled_from(b'{}[],:"\\ 0\x00\xff'),
    piece=st.integers(1, 200),
)
def test_a_damaged_byte_gives_an_error_or_other_json_never_wrong_events(
    events: list[dict[str, Any]], place: int, byte: int, piece: int
) -> None:
    """Where a strict reader of the whole refuses the file, so do we."""
    data = bytearray(json.dumps({"events": events, "end": 1}).encode())
    data[place % len(data)] = byte
    try:
        found = _items(bytes(data), piece=piece)
    except BadRequest as error:
        found, said = None, str(error)
        assert "\n" not in said
    # What stands in strings nobody uses is not checked: control characters, bytes of no character.
    if found is not None:
        whole = json.loads(data.decode("utf-8", "replace"), strict=False)
        assert len(whole["events"]) == len(found)


@pytest.mark.parametrize("cut", range(1, 60, 3))
def test_a_file_cut_short_is_refused(cut: int) -> None:
    data = json.dumps({"a": 1, "events": [{"name": "x"}, {"name": "y", "args": [{}, {}]}]}).encode()

    with pytest.raises(BadRequest, match=r"trace\.json: .*(cut short|no JSON)"):
        _items(data[:-cut])


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "holds no list of events"),
        (b"\x00\x01", "holds no list of events"),
        (b'{"a": 1}', "holds no list of events"),
        (b'{"events": {}}', "holds no list of events"),
        (b'{"a": "\\"events\\": ["}', "holds no list of events"),
        (b'{"events": [1, 2]}', "no JSON among events|among events: Expected"),
        (b'{"events": [{"name": 1}]}', "among events: Expected `str`, got `int`"),
        (b'{"events": [{"name": "x"} {"name": "y"}]}', "no JSON among events"),
        (b'{"events": [{"name": "x"}]} {}', "no JSON"),
        (b'{"events": [{"name": "x"}], "events": []}', "holds events twice"),
        (b'[{"name": "x"}] []', "something follows events"),
        (b'{"events": [{"name": "\xff"}]}', "no JSON among events"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data: bytes, problem: str) -> None:
    with pytest.raises(BadRequest, match=problem) as caught:
        _items(data)

    assert "\n" not in str(caught.value)


def test_only_the_top_level_key_counts() -> None:
    data = b'{"meta": {"events": [{"name": "wrong"}]}, "events": [{"name": "right"}]}'

    assert [{"name": "right", "args": None}] == _items(data)


def test_an_item_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "_MAX_ITEM_BYTES", 1000)
    monkeypatch.setattr(json_array, "_PIECE_BYTES", 100)
    data = json.dumps({"events": [{"name": "x" * 5000}]}).encode()

    with pytest.raises(BadRequest, match="one of its events is larger than 1000 B"):
        _items(data)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting_is_refused(opening: bytes) -> None:
    data = b'{"events": [{"args": ' + opening * 200_000

    with pytest.raises(BadRequest, match="nested deeper than 64"):
        _items(data)


def test_a_head_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "_MAX_HEAD_BYTES", 1000)
    monkeypatch.setattr(json_array, "_PIECE_BYTES", 100)

    with pytest.raises(BadRequest, match="holds no list of events"):
        _items(b'{"a": "' + b"x" * 10_000)
