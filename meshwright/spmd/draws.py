"""Random operators under sharding.

Ranks that hold the same samples draw alike, ranks that hold others draw differently: the runtime
seeds each rank by its place along the axes of the batch. So a random operator must be cut along
every axis that cuts the batch, and along no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from meshwright.errors import PlanRefused
from meshwright.graph.opgraph import Op
from meshwright.spmd.layout import BATCH_AXES, MICRO

__all__ = ["check_draws"]


def check_draws(op: Op, axes: Iterable[str], axis_sizes: Mapping[str, int]) -> None:
    """Refuse a random operator cut along ``axes`` where ranks would not draw as they must.

    Raises:
        PlanRefused: naming the operator and what to do.
    """
    cut = set(axes)
    cut_the_batch = {axis for axis in (*BATCH_AXES, MICRO) if axis_sizes[axis] > 1}
    if cut != cut_the_batch:
        raise PlanRefused(
            f"operator {op.target} in {op.module_path or 'the model'} draws random numbers and "
            f"would be cut along {', '.join(sorted(cut)) or 'nothing'} where the batch is cut "
            f"along {', '.join(sorted(cut_the_batch)) or 'nothing'}; set dropout to 0, or use "
            "data parallelism and pipelines only"
        )
