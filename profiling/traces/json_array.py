"""An array of objects in a JSON file that need not fit the memory, decoded piece by piece.

The text of the array is cut where one object ends and the next begins. Where that is cannot be seen
from a few bytes (`}, {` may stand inside a string or a nested list), so a candidate is tried: what
stands before it, put in brackets, must be JSON. Whether it is depends only on the state of a JSON
reader at the cut, and the closing bracket is right in one state only: between two objects. A wrong
cut therefore never decodes. Where the last candidates fail, one exact scan finds the cut.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, TypeVar

import msgspec

from meshwright.errors import BadRequest
from meshwright.profiling.traces.sources import Member
from meshwright.strict_json import one_line
from meshwright.units import MIB, format_bytes

__all__ = ["ArrayStream"]

T = TypeVar("T")

_PIECE_BYTES: Final = 4 * MIB
_MAX_ITEM_BYTES: Final = 16 * MIB
_MAX_HEAD_BYTES: Final = 16 * MIB
"""Of what stands before the array, and after it."""
_MAX_DEPTH: Final = 64
_MAX_TRIES: Final = 3
_MAX_BRACES_TRIED: Final = 10_000
_MAX_KEYS_TRIED: Final = 20

_ARRAY_START = re.compile(rb"\s*\[")
_BETWEEN = re.compile(rb"\}\s*,\s*\{")
_BEFORE_END = re.compile(rb"\}\s*\]")
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|[\[{]|[\]}]', re.DOTALL)
_AFTER_ITEM = re.compile(rb"\s*([,\]])")

_KEYS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ANYTHING = msgspec.json.Decoder()
_NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class ArrayStream(Generic[T]):
    """The objects of one array, in batches, and what else the file says."""

    def __init__(
        self,
        member: Member,
        *,
        key: str,
        item: type[T],
        loose: Callable[[dict[str, Any]], T] | None = None,
        may_be_bare: bool = False,
    ) -> None:
        """The array under the top-level ``key`` of ``member``.

        Args:
            member: The file, read once.
            key: Of the array.
            item: What its objects are.
            loose: Makes an item of an object that has not quite the types ``item`` wants; None
                refuses the file.
            may_be_bare: Whether the file may be the array alone.
        """
        self.name = member.name
        self.keys: dict[str, msgspec.Raw] = {}
        """Top-level keys other than the array; complete after the last batch."""
        self.num_bytes = 0
        """Read so far."""
        self._member = member
        self._key = key
        self._array_key = re.compile(rb'"' + key.encode() + rb'"\s*:\s*\[')
        self._items = msgspec.json.Decoder(list[item])  # type: ignore[valid-type]
        self._make_loose = loose
        self._may_be_bare = may_be_bare

    def batches(self) -> Iterator[list[T]]:
        """The items in the order of the file, some thousands at a time.

        Raises:
            BadRequest: the file is cut short or no trace, or one item is too large or too deep.
        """
        before, text = self._until_array()
        ended = between = False
        while True:
            if between:
                found = _AFTER_ITEM.match(text)
                if found and found[1] == b"]":
                    break
                if found:
                    text, between = text[found.end() :], False
                elif ended or text.strip():
                    raise self._bad(f"no JSON among {self._key}; make it again")
            if not between:
                cut, items = self._leading_items(text, ended=ended)
                if items:
                    yield items
                if cut is not None:
                    text, between = text[cut:], True
                    continue
                if ended:
                    raise self._bad(
                        f"ends inside its list of {self._key}; it was cut short, make it again"
                    )
                if len(text) > _MAX_ITEM_BYTES:
                    raise self._bad(
                        f"one of its {self._key} is larger than {format_bytes(_MAX_ITEM_BYTES)}"
                    )
            piece = self._read()
            ended = not piece
            text += piece
        self._finish(before, text[text.index(b"]") + 1 :])

    def _read(self) -> bytes:
        data = self._member.read(_PIECE_BYTES)
        self.num_bytes += len(data)
        return data

    def _bad(self, problem: str) -> BadRequest:
        return BadRequest(f"{self.name}: {one_line(problem)}")

    def _until_array(self) -> tuple[bytes, bytes]:
        """What stands before the first item's place, its bracket included, and what follows."""
        text = b""
        while piece := self._read():
            text += piece
            plain = _ARRAY_START.match(text)
            if plain and self._may_be_bare:
                return text[: plain.end()], text[plain.end() :]
            for found in itertools.islice(self._array_key.finditer(text), _MAX_KEYS_TRIED):
                head = text[: found.end()]
                if self._is_json(head + b"]}"):
                    return head, text[found.end() :]
            if len(text) > _MAX_HEAD_BYTES or not text.lstrip().startswith(b"{"):
                break
        raise self._bad(f"holds no list of {self._key}; it is cut short or no such trace")

    def _is_json(self, text: bytes) -> bool:
        try:
            _KEYS.decode(text)
        except _NOT_JSON:
            return False
        return True

    def _finish(self, before: bytes, after: bytes) -> None:
        """Read to the end of the file; the keys around the array."""
        while piece := self._read():
            after += piece
            if len(after) > _MAX_HEAD_BYTES:
                raise self._bad(f"over {format_bytes(_MAX_HEAD_BYTES)} follow {self._key}")
        if before.strip() == b"[":
            if after.strip():
                raise self._bad(f"something follows {self._key}; it is damaged, make it again")
            return
        rest = after.lstrip()
        rest = rest[1:] if rest.startswith(b",") else rest
        try:
            self.keys = _KEYS.decode(before + b"]}")
            follow = _KEYS.decode(b"{" + rest)
        except _NOT_JSON as exc:
            raise self._bad(
                f"what follows {self._key} is no JSON ({exc}); was it cut short?"
            ) from exc
        if self._key in follow:
            raise self._bad(f"holds {self._key} twice")
        del self.keys[self._key]
        self.keys |= follow

    def _leading_items(self, text: bytes, *, ended: bool) -> tuple[int | None, list[T]]:
        """Where the last whole item of ``text`` ends, and the items up to there.

        None where no item of ``text`` is known to be whole.
        """
        pattern = _BEFORE_END if ended else _BETWEEN
        end = len(text)
        for _ in range(_MAX_TRIES):
            cut = _last_cut(text, pattern, end)
            if cut is None:
                break
            try:
                return cut, self._decoded(text[:cut])
            except _NOT_JSON:
                end = cut - 1
        cut, closed = self._scan(text)
        if cut is None:
            return (0, []) if closed else (None, [])
        if not closed and ended:
            return None, []
        try:
            return cut, self._decoded(text[:cut])
        except _NOT_JSON as exc:
            raise self._bad(f"no JSON among {self._key}: {exc}; make it again") from exc

    def _decoded(self, text: bytes) -> list[T]:
        """The items in ``text``.

        Raises:
            msgspec.MsgspecError: it is no JSON; or one of the others of ``_NOT_JSON``.
            BadRequest: it is JSON, but an item is not what it should be.
        """
        text = b"[" + text + b"]"
        try:
            return self._items.decode(text)
        except msgspec.ValidationError as exc:
            plain = _ANYTHING.decode(text)  # what follows the wrong type may be no JSON
            if self._make_loose is None or not all(isinstance(one, dict) for one in plain):
                raise self._bad(f"among {self._key}: {exc}") from exc
            return [self._make_loose(one) for one in plain]

    def _scan(self, text: bytes) -> tuple[int | None, bool]:
        """End of the last whole item, and whether the array ends after it, by every bracket."""
        depth, last = 0, None
        for token in _TOKEN.finditer(text):
            symbol = text[token.start()]
            if symbol in b"{[":
                depth += 1
                if depth > _MAX_DEPTH:
                    raise self._bad(f"one of its {self._key} is nested deeper than {_MAX_DEPTH}")
            elif symbol in b"}]":
                if not depth:
                    if symbol != ord("]") or text[last or 0 : token.start()].strip():
                        raise self._bad(f"no JSON among {self._key}; make it again")
                    return last, True
                depth -= 1
                if not depth:
                    last = token.end()
        return last, False


def _last_cut(text: bytes, pattern: re.Pattern[bytes], end: int) -> int | None:
    """After the last closing brace before ``end`` where ``pattern`` matches."""
    start = max(0, end - _MAX_ITEM_BYTES)
    for _ in range(_MAX_BRACES_TRIED):
        position = text.rfind(b"}", start, end)
        if position < 0:
            break
        if pattern.match(text, position):
            return position + 1
        end = position
    return None
