"""What it costs that neighboring segments are sharded unequally.

For two shardings a and b a graph whose segments use them in turn shows every boundary a to b and,
begun with the other, b to a. What its collectives take longer than those of one sharding everywhere
is the price of the boundary: values are converted where they are read, so in the forward of the
segment after it and in the backward of the one before.

    forward(v, a, b)  = forward collectives of v (in turn) - those of v (b everywhere)
    backward(v, a, b) = backward collectives of v - 1 (in turn) - those of v - 1 (a everywhere)

What one boundary changes two boundaries away (a gather that is shared, a partial sum carried on) is
left out; plans are judged exactly at the end.
"""

from __future__ import annotations

from itertools import permutations
from weakref import WeakKeyDictionary

import numpy as np

from meshwright.cost.columns import FloatArray
from meshwright.cost.model import StepCostModel
from meshwright.cost.roofline import Roofline
from meshwright.cost.table import CostTable, SegmentTimes, Split
from meshwright.plans.plan import Recompute
from meshwright.space.decision import Sharding, Skeleton
from meshwright.space.search import SearchContext
from meshwright.spmd.layout import MICRO

__all__ = ["resharding_s", "table_of_shardings"]


def table_of_shardings(
    context: SearchContext, skeleton: Skeleton, shardings: tuple[Sharding, ...]
) -> CostTable:
    """The table of segments with a sharding each.

    Raises:
        PlanRefused: the graph cannot be sharded so.
    """
    tables = _TABLES.setdefault(context.model, {})
    if len(set(map(id, shardings))) > 1:
        return _new_table(context, skeleton, shardings)
    key = (skeleton.axis_sizes, skeleton.num_microbatches, shardings[0])
    if key not in tables:
        tables[key] = _new_table(context, skeleton, shardings)
    return tables[key]


_TABLES: WeakKeyDictionary[StepCostModel, dict[tuple[object, ...], CostTable]]
_TABLES = WeakKeyDictionary()
"""Where one sharding is used everywhere: these are asked for again and again."""


def _new_table(
    context: SearchContext, skeleton: Skeleton, shardings: tuple[Sharding, ...]
) -> CostTable:
    classes = context.model.segment_classes
    # By identity: to hash a sharding takes longer than to write it out.
    by_id = {id(sharding): sharding for sharding in shardings}
    given = list(zip(map(id, shardings), classes, strict=True))
    known = {}
    for way in dict.fromkeys(given):
        sharding, number = by_id[way[0]], way[1]
        operators = sharding.operators_of(number)
        known[way] = (
            sharding.labels_of(number),
            {int(op): labels for op, labels in operators.items()},
        )
    ways = [known[way] for way in given]
    sizes = {**skeleton.sizes, MICRO: skeleton.num_microbatches}
    has_exceptions = any(operators for _, operators in ways)
    return context.model.table_of_segments(
        [labels for labels, _ in ways],
        sizes,
        [operators for _, operators in ways] if has_exceptions else (),
    )


def resharding_s(
    context: SearchContext,
    skeleton: Skeleton,
    shardings: tuple[Sharding, ...],
    *,
    split: Split,
    roofline: Roofline,
) -> FloatArray:
    """(2, V, K, K) seconds of one micro-batch at the boundary before each segment.

    The first axis is forward and backward, the third the sharding before the boundary, the last the
    one after it. Nothing lies before the first segment.

    Raises:
        PlanRefused: the graph cannot be sharded so.
    """
    count = len(context.model.segment_classes)
    found = np.zeros((2, count, len(shardings), len(shardings)))
    policies = (Recompute.NONE,) * count

    def times(*used: Sharding) -> SegmentTimes:
        in_turn = tuple(used[segment % len(used)] for segment in range(count))
        return table_of_shardings(context, skeleton, in_turn).segment_times(
            split, policies, roofline=roofline, prices=context.model.pricer.prices
        )

    alone = [times(sharding) for sharding in shardings]
    for a, b in permutations(range(len(shardings)), 2):
        mixed = times(shardings[a], shardings[b])
        # Segments 0, 2... use a: the boundaries before 1, 3... go from a to b, the others back.
        for before, after, first in ((a, b, 1), (b, a, 2)):
            here = np.arange(first, count, 2)
            forward_s = mixed.forward_communication_s - alone[after].forward_communication_s
            backward_s = mixed.backward_communication_s - alone[before].backward_communication_s
            found[0, here, before, after] = forward_s[here]
            found[1, here, before, after] = backward_s[here - 1]
    return found
