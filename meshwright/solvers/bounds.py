"""What no plan can undercut."""

from __future__ import annotations

from meshwright.cost.table import Split
from meshwright.plans.plan import AXIS_NAMES, Recompute
from meshwright.solvers.base import SearchContext
from meshwright.solvers.space import UniformChoice, price

__all__ = ["time_lower_bound_s"]


def time_lower_bound_s(context: SearchContext) -> float:
    """Every operator's time on a device, perfectly shared among all, without anything else.

    No sharding makes the devices together compute or move less than one of them would alone with
    the whole batch at once; communication, launches, pipelines and the optimizer only add to it. On
    one device it is the plan that does nothing but the step at once.
    """
    model = context.model
    if context.cluster.num_devices == 1:
        return price(context, UniformChoice(), simulate=False).time_s
    table = model.whole_table(1)
    split = Split(
        axis_sizes=tuple((axis, 1) for axis in AXIS_NAMES), num_microbatches=1, num_stages=1
    )
    policies = (Recompute.NONE,) * table.num_segments
    steps_per_s = 0.0
    for host in context.cluster.hosts:
        roofline = model.pricer.rooflines[host.device.name]
        times = table.segment_times(split, policies, roofline=roofline, prices=model.pricer.prices)
        alone_s = float(times.forward_s.sum() + times.backward_s.sum())
        steps_per_s += host.num_devices / alone_s if alone_s else 0.0
    return 1 / steps_per_s if steps_per_s else 0.0
