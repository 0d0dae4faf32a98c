"""What no plan can undercut."""

from __future__ import annotations

import math
from dataclasses import replace

from meshwright.cost.roofline import Roofline
from meshwright.cost.table import Split
from meshwright.cost.training_kernels import PLAIN
from meshwright.plans.plan import AXIS_NAMES, Recompute
from meshwright.space.search import SearchContext
from meshwright.space.uniform import UniformChoice, price

__all__ = ["time_lower_bound_s"]


def time_lower_bound_s(context: SearchContext) -> float:
    """Every operator's time on a device, perfectly shared among all, without anything else.

    No sharding makes the devices together compute or move less than one of them would alone with
    the whole batch at once; communication, launches, pipelines and the optimizer only add to it. On
    one device it is the plan that does nothing but the step at once.

    A learned price may be lower for two halves of an operator than for the whole, as the halves may
    fit a cache. What it never undercuts is the arithmetic at the data sheet's peak, which then is
    the bound.
    """
    model = context.model
    rooflines = model.pricer.rooflines
    is_proportional = all(_least(found) == found for found in rooflines.values())
    if context.cluster.num_devices == 1 and is_proportional:
        return price(context, UniformChoice(), simulate=False).time_s
    table = model.whole_table(1)
    split = Split(
        axis_sizes=tuple((axis, 1) for axis in AXIS_NAMES), num_microbatches=1, num_stages=1
    )
    policies = (Recompute.NONE,) * table.num_segments
    prices = model.pricer.prices
    steps_per_s = 0.0
    for host in context.cluster.hosts:
        least = _least(rooflines[host.device.name])
        times = table.segment_times(split, policies, roofline=least, prices=prices)
        alone_s = float(times.forward_s.sum() + times.backward_s.sum())
        steps_per_s += host.num_devices / alone_s if alone_s else 0.0
    return 1 / steps_per_s if steps_per_s else 0.0


def _least(roofline: Roofline) -> Roofline:
    """What prices no part of an operator below its share of the whole, and nothing too high."""
    plain = replace(roofline, kernels=PLAIN)
    if roofline.learned is None:
        return plain
    peak = roofline.peak_flop_per_s
    return replace(plain, learned=None, flop_per_s=peak, cast_speedup=1.0, bytes_per_s=math.inf)
