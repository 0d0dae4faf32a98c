"""What a user wrote at modules of a model about how they are to be sharded.

The words stay on the module, as an attribute, until the model is planned; what they mean is the
business of the solvers' pins.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

__all__ = ["annotations_of", "set_annotation"]

_ATTRIBUTE = "_meshwright_placement"


def set_annotation(module: nn.Module, placement: Mapping[str, str]) -> None:
    """Add ``placement``, key to value, to what the module says already."""
    known: dict[str, str] = getattr(module, _ATTRIBUTE, {})
    setattr(module, _ATTRIBUTE, {**known, **placement})


def annotations_of(model: nn.Module) -> tuple[str, ...]:
    """All of a model as ``PATH:KEY=VALUE``, in the order of its modules; the model's path is ``*``.

    A module used under several paths stands under the first.
    """
    return tuple(
        f"{_pattern(path)}:{key}={value}"
        for path, module in model.named_modules()
        for key, value in getattr(module, _ATTRIBUTE, {}).items()
    )


def _pattern(path: str) -> str:
    """A pattern of paths that only ``path`` matches."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in path) or "*"
