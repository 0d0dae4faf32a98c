"""Every operator family, by name."""

from __future__ import annotations

from meshwright.profiling.operators.attention import ATTENTION
from meshwright.profiling.operators.family import Family
from meshwright.profiling.operators.images import IMAGES
from meshwright.profiling.operators.lookups import LOOKUPS
from meshwright.profiling.operators.matrices import MATRICES
from meshwright.profiling.operators.moving import MOVING
from meshwright.profiling.operators.rows import ROWS
from meshwright.profiling.operators.updates import UPDATES

__all__ = ["DIM_NAMES", "FAMILIES"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (*MATRICES, *ATTENTION, *ROWS, *LOOKUPS, *IMAGES, *MOVING, *UPDATES)
}

DIM_NAMES: dict[str, tuple[str, ...]] = {name: family.dims for name, family in FAMILIES.items()}
"""For each operator the keys of Records that describe its sizes."""
