"""What is held out of measurements, so that predictions are judged by what was not fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BoolArray", "Split"]

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What is fitted on, and what is judged by, of N measurements."""

    kind: str = ""
    """Of splits that are reported together: ``size``, ``system``..."""
    name: str
    train: BoolArray
    """(N,)"""
    test: BoolArray
    """(N,); a measurement may be in neither."""
