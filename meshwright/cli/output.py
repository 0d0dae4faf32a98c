"""What a verb writes: one JSON document or text on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import msgspec
from rich.console import Console, RenderableType

from meshwright.strict_json import one_line

__all__ = ["Output", "output_for"]

_WIDTH_OF_A_FILE = 120


class Output:
    """Where a verb writes."""

    def __init__(self, *, as_json: bool, stdout: TextIO, stderr: TextIO) -> None:
        self.as_json = as_json
        self._stdout = stdout
        self._stderr = stderr
        self._console = Console(
            file=stdout,
            width=None if stdout.isatty() else _WIDTH_OF_A_FILE,
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=False,
        )

    def progress(self, text: str) -> None:
        """One line on stderr about what is being done."""
        self._stderr.write(f"{one_line(text)}\n")
        self._stderr.flush()

    def show(self, *parts: RenderableType) -> None:
        """Something for a person, on stdout; nothing with ``--json``."""
        if not self.as_json:
            for part in parts:
                self._console.print(part)

    def say(self, text: str = "") -> None:
        """One line for a person, on stdout, never broken; nothing with ``--json``."""
        if not self.as_json:
            self._console.print(text, soft_wrap=True)

    def document(self, value: Any) -> None:
        """The JSON document of the verb, on stdout; nothing without ``--json``.

        A NaN or an infinity would be no JSON, so there must be none.
        """
        if self.as_json:
            plain = msgspec.to_builtins(value, order="deterministic", str_keys=True)
            text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
            self._stdout.write(f"{text}\n")
            self._stdout.flush()


@contextlib.contextmanager
def output_for(*, as_json: bool) -> Iterator[Output]:
    """The output of one verb.

    With ``as_json`` whatever else writes to ``sys.stdout`` meanwhile, the user's model too, goes to
    stderr, so that the document stands alone.
    """
    output = Output(as_json=as_json, stdout=sys.stdout, stderr=sys.stderr)
    with contextlib.ExitStack() as stack:
        if as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield output
