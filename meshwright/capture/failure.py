"""What torch says when it cannot trace a module, said in one line that helps."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType

import torch

from meshwright.errors import CaptureFailed

__all__ = ["as_capture_failed", "calling_line", "quiet_on_failure", "quiet_torch", "source_line"]

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_OWN_FOLDER = Path(__file__).parent
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@lru_cache(maxsize=4096)
def source_line(stack_trace: str) -> str:
    """``file.py:line`` of the innermost frame outside torch in a formatted stack; may be empty."""
    frames = [
        f"{Path(path).name}:{line}" for path, line in _FRAME.findall(stack_trace) if _is_users(path)
    ]
    return frames[-1] if frames else ""


def _is_users(path: str) -> bool:
    """Whether a source file is neither torch's nor one of this folder (the zoo is a user)."""
    return not path.startswith((_TORCH_FOLDER, "<")) and Path(path).parent != _OWN_FOLDER


@lru_cache(maxsize=4096)
def _users_file(path: str) -> str:
    """Its name if a source file is the user's, else nothing."""
    return Path(path).name if _is_users(path) else ""


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Keeps torch's warnings and log lines off the user's screen while it traces."""
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "torch"]
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


@contextmanager
def quiet_on_failure() -> Iterator[None]:
    """Drops what is written to stderr if the block fails: export prints the whole graph there."""
    written = io.StringIO()
    with contextlib.redirect_stderr(written):
        yield
    sys.stderr.write(written.getvalue())


def as_capture_failed(error: Exception, *, where: str = "") -> CaptureFailed:
    """The same failure as one line: what, which operator, which line of the user's model.

    ``where`` is that line if the caller knows it; else the error's traceback is searched.
    """
    where = where or _user_line(error)
    name = _operator(error)
    place = f" at {where}" if where else ""
    kind = type(error).__name__
    if "DataDependent" in kind or "data-dependent" in str(error).lower():
        return CaptureFailed(
            f"{name or 'aten.item.default'}{place} makes the program depend on data (a branch on "
            f"a tensor, .item(), .tolist()); use torch.where or a fixed choice instead"
        )
    if kind == "DynamicOutputShapeException":
        return CaptureFailed(
            f"{name or 'an operator'}{place} has a result whose shape depends on data; use a "
            f"fixed shape (a mask or torch.where instead of selecting elements)"
        )
    if kind == "UnsupportedOperatorException":
        return CaptureFailed(f"{name or 'an operator'}{place} has no rule for its result's shape")
    return CaptureFailed(f"{kind}{place}{f' in {name}' if name else ''}: {_first_line(error)}")


def calling_line() -> str:
    """``file.py:line`` of the user's innermost running frame."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = _users_file(frame.f_code.co_filename)
        if name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


def _user_line(error: Exception) -> str:
    """``file.py:line`` of the innermost frame that is neither torch's nor ours."""
    frames = [
        f"{Path(frame.filename).name}:{frame.lineno}"
        for cause in _chain(error)
        for frame in traceback.extract_tb(cause.__traceback__)
        if _is_users(frame.filename)
    ]
    return frames[-1] if frames else ""


def _operator(error: Exception) -> str:
    """The innermost ATen operator torch was running."""
    found = ""
    for cause in _chain(error):
        frame = cause.__traceback__
        while frame is not None:
            func = frame.tb_frame.f_locals.get("func")
            if isinstance(func, torch._ops.OpOverload):
                found = str(func)
            frame = frame.tb_next
    return found


def _chain(error: BaseException) -> list[BaseException]:
    """``error`` and what caused it, outermost first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no further message"
