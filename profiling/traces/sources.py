"""Bytes of trace files of outsiders: plain, gzip, tar and gzipped tar, as a stream of members.

Nothing is written to disk and nothing is held but one piece: archives are walked, not extracted.
What a file may cost is bounded: ``max_bytes`` of decompressed data in all, and a ratio of
decompression that honest traces (10 to 40 times) never reach.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from meshwright.errors import BadRequest
from meshwright.strict_json import one_line
from meshwright.units import MIB, format_bytes

__all__ = ["DEFAULT_MAX_BYTES", "Member", "Source", "open_members", "open_source", "printable"]

DEFAULT_MAX_BYTES = 16 * 2**30
_MAX_RATIO = 200
_RATIO_COUNTS_FROM_BYTES = 64 * MIB
_COMPRESSED_PIECE_BYTES = 256 * 2**10
_MAX_MEMBERS = 4096
_MAX_NAME_CHARACTERS = 120
_BLOCK = 512
_MAX_HEADER_BYTES = MIB
"""Of one extended header of a tar member (long names, extended attributes)."""


class _Readable(Protocol):
    def read(self, num_bytes: int) -> bytes:
        """At most ``num_bytes``; empty only at the end."""


def printable(path: str | os.PathLike[str]) -> str:
    """The last part of a path, without control characters and of bounded length."""
    name = one_line(PurePosixPath(os.fspath(path)).name)
    if len(name) > _MAX_NAME_CHARACTERS:
        name = f"{name[: _MAX_NAME_CHARACTERS - 3]}..."
    return name


class _Raw:
    """The file as it lies on disk, hashed as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_read_bytes = 0
        self.digest = hashlib.sha256()

    def read(self, num_bytes: int) -> bytes:
        data = self._file.read(num_bytes)
        self.num_read_bytes += len(data)
        self.digest.update(data)
        return data


class _Gunzip:
    """One or more gzip members after one another, decompressed piece by piece."""

    def __init__(self, raw: _Readable) -> None:
        self._raw = raw
        self._rest = b""
        self._inflate = zlib.decompressobj(wbits=31)
        self._started = False

    def read(self, num_bytes: int) -> bytes:
        while True:
            if self._inflate.eof:
                self._inflate, self._started = zlib.decompressobj(wbits=31), False
            if not self._rest:
                self._rest = self._raw.read(_COMPRESSED_PIECE_BYTES)
            if not self._started:
                self._rest = self._rest.lstrip(b"\0")  # padding between members is legal
                if not self._rest:
                    return b""
            ended = not self._rest
            self._started = True
            data = self._inflate.decompress(self._rest, num_bytes)
            self._rest = self._inflate.unused_data or self._inflate.unconsumed_tail
            if data:
                return data
            if ended and not self._inflate.eof:
                raise EOFError("it ends inside its compressed data")


class _Limited:
    """A stream that refuses to give more than it may."""

    def __init__(self, inner: _Readable, raw: _Raw, *, max_bytes: int) -> None:
        self._inner = inner
        self._raw = raw
        self._max_bytes = max_bytes
        self.num_bytes = 0

    def read(self, num_bytes: int) -> bytes:
        data = self._inner.read(num_bytes)
        self.num_bytes += len(data)
        if self.num_bytes > self._max_bytes:
            raise ValueError(
                f"holds more than {format_bytes(self._max_bytes)}; raise --max-bytes if it is right"
            )
        if self.num_bytes > max(_RATIO_COUNTS_FROM_BYTES, _MAX_RATIO * self._raw.num_read_bytes):
            raise ValueError(
                f"decompresses to over {_MAX_RATIO} times its size, as no honest trace does; "
                "decompress it yourself if it is right"
            )
        return data


class Member:
    """One file: the whole of a plain one, or one entry of an archive. Read once, in order."""

    def __init__(self, stream: _Readable, *, name: str, left_bytes: int | None) -> None:
        self.name = name
        """Fit to print; the last part of its path only."""
        self._stream = stream
        self._left_bytes = left_bytes
        self._pushed_back = b""

    def read(self, num_bytes: int) -> bytes:
        """At most ``num_bytes``, 1 or more; empty only at the end.

        Raises:
            BadRequest: the file is damaged, cut short, or larger than allowed.
        """
        if self._pushed_back:
            data, self._pushed_back = (
                self._pushed_back[:num_bytes],
                self._pushed_back[num_bytes:],
            )
            return data
        with _as_bad_request(self.name):
            if self._left_bytes is None:
                return self._stream.read(num_bytes)
            if not self._left_bytes:
                return b""
            data = self._stream.read(min(num_bytes, self._left_bytes))
            if not data:
                raise EOFError("the archive ends inside this file")
            self._left_bytes -= len(data)
            return data

    def head(self, num_bytes: int) -> bytes:
        """The next ``num_bytes``, fewer at the end, which stay to be read."""
        pieces = [self._pushed_back]
        self._pushed_back = b""
        missing = num_bytes - len(pieces[0])
        while missing > 0 and (data := self.read(missing)):
            pieces.append(data)
            missing -= len(data)
        self._pushed_back = b"".join(pieces)
        return self._pushed_back[:num_bytes]

    def skip(self) -> None:
        """Read to the end."""
        while self.read(MIB):
            pass


class Source:
    """A trace file of an outsider, open for one pass."""

    def __init__(self, file: BinaryIO, *, name: str, max_bytes: int) -> None:
        self.name = name
        self._raw = _Raw(file)
        self._max_bytes = max_bytes
        self._limited: _Limited | None = None

    @property
    def num_bytes(self) -> int:
        """Decompressed bytes read so far."""
        return self._limited.num_bytes if self._limited else 0

    def sha256(self) -> str:
        """Of the file as it lies on disk, in hexadecimal; reads what is left of it."""
        while self._raw.read(MIB):
            pass
        return self._raw.digest.hexdigest()

    def members(self) -> Iterator[Member]:
        """Its files in order; folders and AppleDouble companions are left out.

        What the caller leaves of one is skipped.

        Raises:
            BadRequest: it is damaged, too large, or an archive that holds links or devices.
        """
        with _as_bad_request(self.name):
            first = Member(self._raw, name=self.name, left_bytes=None)
            magic = first.head(4)
            if magic.startswith(b"PK\x03\x04"):
                raise ValueError("is a zip archive; unpack it and give what it holds")
            inner: _Readable = _Gunzip(first) if magic.startswith(b"\x1f\x8b") else first
            self._limited = _Limited(inner, self._raw, max_bytes=self._max_bytes)
        whole = Member(self._limited, name=self.name, left_bytes=None)
        block = whole.head(_BLOCK)
        if block[257:262] == b"ustar":
            yield from self._tar_members(whole)
        else:
            yield whole

    def _tar_members(self, archive: Member) -> Iterator[Member]:
        name, size_bytes = "", None
        for _ in range(_MAX_MEMBERS):
            header = _exactly(archive, _BLOCK)
            if not header.strip(b"\0"):
                archive.skip()
                return
            with _as_bad_request(self.name):
                kind, own_name, own_size_bytes = _tar_header(header)
            if kind in b"xgLK":
                if own_size_bytes > _MAX_HEADER_BYTES:
                    raise BadRequest(f"{self.name}: a header of {own_size_bytes} bytes; damaged?")
                text = _exactly(archive, own_size_bytes)
                _exactly(archive, -own_size_bytes % _BLOCK)
                if kind == b"L":
                    name = text.rstrip(b"\0").decode("utf-8", "replace")
                elif kind == b"x":
                    with _as_bad_request(self.name):
                        attributes = _pax_attributes(text)
                        name = attributes.get("path", name)
                        size_bytes = int(attributes["size"]) if "size" in attributes else None
                continue
            shown = printable(name or own_name)
            length_bytes = own_size_bytes if size_bytes is None else size_bytes
            name, size_bytes = "", None
            if kind not in b"05\x007":
                raise BadRequest(
                    f"{self.name}: {shown} is a link or a device; pack the files themselves"
                )
            member = Member(archive, name=f"{self.name}:{shown}", left_bytes=length_bytes)
            if kind != b"5" and not shown.startswith("._"):
                yield member
            member.skip()
            _exactly(archive, -length_bytes % _BLOCK)
        raise BadRequest(f"{self.name}: more than {_MAX_MEMBERS} files in one archive; split it")


def _exactly(member: Member, num_bytes: int) -> bytes:
    pieces = []
    while num_bytes > 0:
        data = member.read(num_bytes)
        if not data:
            raise BadRequest(f"{member.name}: the archive is cut short; copy it again")
        pieces.append(data)
        num_bytes -= len(data)
    return b"".join(pieces)


def _tar_header(block: bytes) -> tuple[bytes, str, int]:
    """Type, name and size of one header (POSIX.1-1988 ustar; GNU sizes beyond 8 GiB)."""
    if block[257:262] != b"ustar":
        raise ValueError("the archive is damaged: no header where one belongs")
    said = int(block[148:156].strip(b"\0 ") or b"0", 8)
    if said != sum(block) - sum(block[148:156]) + 8 * 0x20:
        raise ValueError("the archive is damaged: the checksum of a header does not match")
    size = block[124:136]
    if size[0] & 0x80:
        size_bytes = int.from_bytes(size[1:], "big")
    else:
        size_bytes = int(size.strip(b"\0 ") or b"0", 8)
    parts = (block[345:500] if block[257:263] == b"ustar\0" else b"", block[:100])
    name = "/".join(part.split(b"\0")[0].decode("utf-8", "replace") for part in parts if part)
    return block[156:157], name, size_bytes


def _pax_attributes(text: bytes) -> dict[str, str]:
    """``path`` and ``size`` of a pax header: lines of ``LENGTH KEY=VALUE``."""
    found: dict[str, str] = {}
    position = 0
    while position < len(text):
        digits = text[position : position + 8].split(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        line = text[position + len(digits) + 1 : position + length]
        if length <= len(digits) or not line.endswith(b"\n"):
            raise ValueError("the archive is damaged: an extended header makes no sense")
        key, _, value = line[:-1].partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "replace")
        position += length
    if not found.get("size", "0").isdigit() or len(found.get("size", "")) > 18:
        raise ValueError("the archive is damaged: the size of a file is no number")
    return found


@contextlib.contextmanager
def _as_bad_request(name: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, ValueError, zlib.error) as exc:
        said = one_line(str(exc))
        if isinstance(exc, EOFError):
            said = f"cut short: {said}; copy it again"
        elif isinstance(exc, zlib.error):
            said = f"damaged: {said}; copy it again"
        raise BadRequest(f"{name}: {said}") from exc


@contextlib.contextmanager
def open_source(
    path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES
) -> Iterator[Source]:
    """The file at ``path``, open for one pass over its members.

    Raises:
        BadRequest: there is no such regular file, or it cannot be read.
    """
    name = printable(path)
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise BadRequest(f"{name}: not a regular file; give a trace file or an archive of them")
        file = Path(path).open("rb")  # noqa: SIM115 - closed below
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise BadRequest(f"{name}: cannot read the file: {one_line(reason)}") from exc
    with file:
        yield Source(file, name=name, max_bytes=max_bytes)


def open_members(
    path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES
) -> Iterator[Member]:
    """The files of the file at ``path``, as ``Source.members`` gives them."""
    with open_source(path, max_bytes=max_bytes) as source:
        yield from source.members()
