"""JSON from outside, read strictly; JSON of our own, written so that a person can diff it.

Every file another program or a person may have written goes through ``load_json`` and
``convert``: what they let through is UTF-8, of bounded size and depth, free of duplicate keys, of
NaN and infinities and of integers beyond 64 bits, and of exactly the types asked for. All else is
one error of one line that holds the path of the key (``$.mesh.tp``).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from meshwright.errors import BadRequest, PlannerError

__all__ = [
    "MAX_DEPTH",
    "MAX_FILE_BYTES",
    "FieldError",
    "JsonValue",
    "check_schema_version",
    "convert",
    "dump_json",
    "key_path",
    "load_json",
    "one_line",
    "read_source",
    "write_bytes_atomically",
    "write_text_atomically",
]

MAX_FILE_BYTES = 16 * 2**20
MAX_DEPTH = 64

JsonValue = dict[str, "JsonValue"] | list["JsonValue"] | str | int | float | bool | None

T = TypeVar("T")

_MAX_MESSAGE_CHARACTERS = 400
_MAX_KEYS_TRIED = 1000
_MAX_INTEGER_CHARACTERS = 20
"""Of any 64-bit integer, sign included; ``int`` of millions of digits takes minutes."""

# Whole strings are one token, so that brackets inside them do not count; possessive, so that an
# unterminated string costs one pass.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MSGSPEC_MESSAGE = re.compile(r"(?P<text>.*?)(?: - at `(?P<path>\$.*)`)?", re.DOTALL)
_UNKNOWN_KEY = re.compile(r"Object contains unknown field `(?P<key>.*)`", re.DOTALL)
_MISSING_KEY = re.compile(r"Object missing required field `(?P<key>.*)`", re.DOTALL)


class FieldError(ValueError):
    """What ``__post_init__`` raises about one field; ``convert`` adds the path of the object."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key = key
        self.problem = problem


def check_schema_version(found: int, known: int) -> None:
    """For the ``__post_init__`` of what files hold.

    Raises:
        FieldError: the file was written in another form than the one known.
    """
    if found != known:
        raise FieldError("schema_version", f"is {found}, this Meshwright reads {known}")


class _Refused:
    """Stands in the parsed tree for something JSON or we do not allow, until its path is known."""

    def __init__(self, problem: str, key: str | None = None) -> None:
        self.problem = problem
        self.key = key


def one_line(text: str) -> str:
    """``text`` with control characters escaped and a bounded length, fit for an error message."""
    line = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text[: 2 * _MAX_MESSAGE_CHARACTERS]
    )
    if len(line) > _MAX_MESSAGE_CHARACTERS:
        return line[:_MAX_MESSAGE_CHARACTERS] + "..."
    return line


def key_path(parent: str, key: str | int) -> str:
    """Path of ``key`` in the object or array at ``parent``: ``$.stages[0]``, ``$["a b"]``."""
    if isinstance(key, int):
        return f"{parent}[{key}]"
    if _PLAIN_KEY.fullmatch(key):
        return f"{parent}.{key}"
    return f"{parent}[{json.dumps(key[:80])}]"


def read_source(
    source: str | os.PathLike[str], *, error: type[PlannerError], what: str
) -> tuple[bytes, str]:
    """Bytes of a JSON document and the name to call it by in messages.

    ``source`` is the document itself where it is a ``str`` that starts with ``{`` or holds a line
    break, else the path of a file. ``what`` says what kind of file was wanted (``"plan"``).

    Raises:
        error: the file cannot be read or is larger than ``MAX_FILE_BYTES``.
    """
    if isinstance(source, str) and (source.lstrip()[:1] in ("{", "[") or "\n" in source):
        # A lone surrogate has no UTF-8 form; passed on, ``load_json`` refuses it.
        return source.encode("utf-8", "surrogatepass"), f"{what} text"
    name = one_line(os.fspath(source))
    try:
        with open(source, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise error(f"{name}: no such {what} file; check the path") from None
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise error(f"{name}: cannot read the {what} file: {one_line(reason)}") from exc
    return data, name


def load_json(data: bytes | str, *, error: type[PlannerError], name: str) -> JsonValue:
    """The value of one JSON document, read as the module docstring says.

    ``name`` begins the message of the error.

    Raises:
        error: anything else than strict JSON.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    if len(data) > MAX_FILE_BYTES:
        raise error(f"{name}: larger than {MAX_FILE_BYTES // 2**20} MiB; this is not such a file")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise error(
            f"{name}: byte {exc.start} is not valid UTF-8; save the file as UTF-8"
        ) from None
    depth_problem = _depth_problem(text)
    if depth_problem:
        raise error(f"{name}: {depth_problem}")
    try:
        value: Any = json.loads(
            text,
            object_pairs_hook=_unique_pairs,
            parse_constant=_refused_constant,
            parse_float=_finite_float,
            parse_int=_small_int,
        )
    except json.JSONDecodeError as exc:
        raise error(
            f"{name}: not JSON: {one_line(exc.msg)} at line {exc.lineno}, column {exc.colno}"
        ) from None
    refused = _first_refused(value, "$")
    if refused:
        raise error(f"{name}: {refused[0]}: {refused[1]}")
    checked: JsonValue = value
    return checked


def _depth_problem(text: str) -> str | None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        char = match.group()[0]
        if char in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                line = text.count("\n", 0, match.start()) + 1
                return f"nested deeper than {MAX_DEPTH} levels at line {line}"
        elif char in "]}":
            depth -= 1
    return None


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Refused:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return _Refused("the key stands twice; remove one", key)
        seen.add(key)
    raise AssertionError("fewer keys than pairs, yet none twice")


def _refused_constant(name: str) -> _Refused:
    return _Refused(f"{name} is not a number JSON allows; give a finite one")


def _finite_float(text: str) -> float | _Refused:
    value = float(text)
    if math.isfinite(value):
        return value
    return _Refused(f"{one_line(text[:40])} is too large for a float; give a finite number")


def _small_int(text: str) -> int | _Refused:
    if len(text) <= _MAX_INTEGER_CHARACTERS and -(2**63) <= int(text) < 2**63:
        return int(text)
    return _Refused(f"integer {text[:24]} is out of the 64-bit range")


def _first_refused(value: Any, path: str) -> tuple[str, str] | None:
    """Path and problem of the first thing in the tree that strict JSON does not hold."""
    children: list[tuple[str | int, Any]] = []
    if isinstance(value, _Refused):
        at = path if value.key is None else key_path(path, value.key)
        return at, value.problem
    if isinstance(value, str) and not _is_unicode(value):
        return path, "the string holds half a surrogate pair, which is not Unicode text"
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    for key, child in children:
        if isinstance(key, str) and not _is_unicode(key):
            return key_path(path, key), "the key holds half a surrogate pair"
        found = _first_refused(child, key_path(path, key)) if _may_hold_refused(child) else None
        if found:
            return found
    return None


def _may_hold_refused(value: Any) -> bool:
    return isinstance(value, (dict, list, str, _Refused))


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def convert(value: JsonValue, type_: type[T], *, error: type[PlannerError], name: str) -> T:
    """``value`` as a ``type_`` (a ``msgspec.Struct``), no type being turned into another.

    Only an integer may stand for a float. Consumes ``value``: it may be changed where the
    conversion fails.

    Raises:
        error: a key is unknown, missing, or of the wrong type or value.
    """
    try:
        return msgspec.convert(value, type_, strict=True)
    except msgspec.ValidationError as exc:
        _raise_with_path(value, type_, exc, error=error, name=name)


def _raise_with_path(
    value: Any, type_: Any, exc: msgspec.ValidationError, *, error: type[PlannerError], name: str
) -> NoReturn:
    message = _MSGSPEC_MESSAGE.fullmatch(str(exc))
    assert message is not None
    text, path = message["text"], message["path"] or "$"
    path = _without_ellipsis(value, type_, path, str(exc))
    cause = exc.__cause__
    if isinstance(cause, FieldError):
        path, text = f"{path}.{cause.key}", cause.problem
    elif unknown := _UNKNOWN_KEY.fullmatch(text):
        path, text = key_path(path, unknown["key"]), "unknown key; remove it or mend its name"
    elif missing := _MISSING_KEY.fullmatch(text):
        path, text = key_path(path, missing["key"]), "the key is missing; add it"
    else:
        text = text[:1].lower() + text[1:].replace("`", "")
        found = _at(value, path)
        if " got " not in text and "'" not in text and isinstance(found, (int, float, str)):
            text += f", got {json.dumps(found)}"
    raise error(one_line(f"{name}: {path}: {text}")) from None


def _without_ellipsis(value: Any, type_: Any, path: str, message: str) -> str:
    """``path`` with the keys of free-form objects, which msgspec writes ``[...]``, spelled out.

    Found by leaving one key at a time in the object and converting again.
    """
    before, *rest = path.split("[...]")
    for after in rest:
        target = _at(value, before)
        entries = dict(target) if isinstance(target, dict) else {}
        for key, child in itertools.islice(entries.items(), _MAX_KEYS_TRIED):
            target.clear()
            target[key] = child
            if _conversion_message(value, type_) == message:
                before = key_path(before, key) + after
                break
        else:
            return path
    return before


def _conversion_message(value: Any, type_: Any) -> str:
    try:
        msgspec.convert(value, type_, strict=True)
    except msgspec.ValidationError as exc:
        return str(exc)
    return ""


def _at(value: Any, path: str) -> Any:
    """What stands at ``path`` (of the forms ``key_path`` writes) in ``value``; None if nothing."""
    for part in re.finditer(r'\.([A-Za-z_]\w*)|\[(\d+)\]|\[("(?:[^"\\]|\\.)*")\]', path):
        plain, index, quoted = part.groups()
        key: Any = plain if plain else int(index) if index else json.loads(quoted)
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def dump_json(value: object) -> str:
    """``value`` (a ``msgspec.Struct``) as text: two spaces of indent, a newline at the end.

    Keys of structs stand in the order of their fields, keys of free-form objects sorted, so equal
    values give equal text.
    """
    plain = msgspec.to_builtins(value, order="deterministic")
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def write_text_atomically(text: str, path: str | os.PathLike[str]) -> None:
    """Write ``text`` to ``path`` so that a reader finds the old file or the new one, never half.

    Raises:
        BadRequest: the file cannot be written.
    """
    write_bytes_atomically(text.encode("utf-8"), path)


def write_bytes_atomically(data: bytes, path: str | os.PathLike[str]) -> None:
    """``write_text_atomically`` for a file that is not text.

    Raises:
        BadRequest: the file cannot be written.
    """
    try:
        # A link stays a link: what it points to is replaced.
        _replace(Path(os.path.realpath(path)), data)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise BadRequest(
            f"{one_line(os.fspath(path))}: cannot write the file: {one_line(reason)}"
        ) from exc


def _replace(target: Path, data: bytes) -> None:
    mode = target.stat().st_mode if target.exists() else None
    if mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        target.write_bytes(data)  # a pipe or a terminal cannot be replaced
        return
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(stat.S_IMODE(mode))
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
