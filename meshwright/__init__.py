"""Meshwright: a PyTorch model written for one device becomes a training job for a whole cluster.

Public names are imported when they are first used, so that ``import meshwright`` costs
milliseconds and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshwright.api import ParallelModel, annotate, parallelize, plan
    from meshwright.plans import (
        JobSpec,
        OptimizerSpec,
        ParallelPlan,
        Precision,
        read_plan,
        write_plan,
    )

__all__ = [
    "JobSpec",
    "OptimizerSpec",
    "ParallelModel",
    "ParallelPlan",
    "Precision",
    "__version__",
    "annotate",
    "parallelize",
    "plan",
    "read_plan",
    "write_plan",
]

__version__ = "0.1.0"

_MODULE_OF = {
    name: "meshwright.api"
    if name in ("ParallelModel", "annotate", "parallelize", "plan")
    else "meshwright.plans"
    for name in __all__
    if name != "__version__"
}


def __getattr__(name: str) -> object:
    """The public function called ``name``, from the module that holds it (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
