"""Meshwright: a PyTorch model written for one device becomes a training job for a whole cluster.

``plan`` and ``parallelize`` are imported when they are first used, so that ``import meshwright``
costs milliseconds and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshwright.api import parallelize, plan

__all__ = ["__version__", "parallelize", "plan"]

__version__ = "0.1.0"

_MODULE_OF = {"parallelize": "meshwright.api", "plan": "meshwright.api"}


def __getattr__(name: str) -> object:
    """The public function called ``name``, from the module that holds it (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
