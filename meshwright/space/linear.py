"""Costs of a plan space made linear: seconds and bytes a segment adds whatever the others do.

What a stage hides of its communication, and how its gradients fill buckets, depends on the whole
stage; here every segment hides what it can by itself and buckets are full. Such sums guide the
searches; ``PlanSpace.evaluate`` judges what they find.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import FloatArray, IntArray
from meshwright.cost.offload import offload_time_s
from meshwright.cost.stage_work import beside_gathers, exposed_s
from meshwright.space.evaluate import PlanSpace
from meshwright.space.segment_costs import TIMES

__all__ = ["LinearCosts", "bucket_seconds", "linear_costs", "step_seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCosts:
    """Arrays of shape (V, S) unless said otherwise; one rank."""

    time_s: FloatArray
    """Forward and backward of one micro-batch, with what it exposes."""
    tail_s: FloatArray
    """Once a step."""
    fixed_bytes: FloatArray
    """Parameters, optimizer state and gradients."""
    kept_bytes: FloatArray
    """For one micro-batch in flight."""
    spare_bytes: FloatArray
    """While the segment is at work: transients and gathered parameters."""
    sharding_of: IntArray
    """(S,)"""
    resharding_s: FloatArray
    """(V, K, K) of one micro-batch, between the segment before and this one."""

    def step_s(self, num_microbatches: int) -> FloatArray:
        """(V, S) with the tail spread over the micro-batches."""
        return self.time_s + self.tail_s / num_microbatches

    def stage_bytes(self, in_flight: float) -> FloatArray:
        """(V, S) on a stage with so many micro-batches in flight."""
        return self.fixed_bytes + in_flight * self.kept_bytes


def linear_costs(space: PlanSpace) -> LinearCosts:
    """The linear costs of a space, on the slowest type of device it uses."""
    costs = space.costs
    slowest = int(np.argmin([roofline.flop_per_s for roofline in costs.rooflines]))
    hides = np.array(costs.rooflines[slowest].queue_runs_ahead)
    first = slowest * len(TIMES)
    amounts = costs.amounts
    times = np.moveaxis(amounts[:, :, first : first + len(TIMES)], 2, 0)

    def column(name: str) -> FloatArray:
        return np.asarray(amounts[:, :, costs.column(name)])

    often, once = bucket_seconds(space)
    time_s = times.sum(axis=0)

    calibration = space.context.model.pricer.calibration
    gathers = beside_gathers(calibration)

    def exposed(communication_s: FloatArray, beside_s: FloatArray) -> FloatArray:
        return exposed_s(communication_s, beside_s, hides, calibration)

    time_s += exposed_s(column("forward_gather_s"), times[0], hides, gathers)
    time_s += exposed_s(column("backward_gather_s"), times[1], hides, gathers)
    time_s += exposed(often, times[1])
    tail_s = exposed(once, times[1]) + step_seconds(space, slowest)
    gradients = column("gradients")
    spare = np.maximum(
        column("transient_forward") + 2 * column("gathered_forward"),
        column("transient_backward") + 2 * column("gathered_backward"),
    )
    count, num_shardings = len(amounts), len(costs.shardings)
    resharding = np.zeros((count, num_shardings, num_shardings))
    if costs.resharding is not None:
        resharding = costs.resharding.sum(axis=0)
    return LinearCosts(
        time_s=time_s,
        tail_s=tail_s,
        fixed_bytes=column("parameters") + column("optimizer") + gradients,
        kept_bytes=column("kept"),
        spare_bytes=spare,
        sharding_of=costs.sharding_of,
        resharding_s=resharding,
    )


def step_seconds(space: PlanSpace, roofline: int) -> FloatArray:
    """(V, S) seconds of stepping the optimizer and publishing parameters, once a step."""
    costs = space.costs
    found = costs.rooflines[roofline]

    def column(name: str) -> FloatArray:
        return np.asarray(costs.amounts[:, :, costs.column(name)])

    offload_s = offload_time_s(
        column("host_link"),
        column("host_step"),
        link_bytes_per_s=np.array(found.to_host_bytes_per_s),
    )
    return column("publish_s") + column("step_traffic") / found.bytes_per_s + offload_s


def bucket_seconds(space: PlanSpace) -> tuple[FloatArray, FloatArray]:
    """(V, S) seconds of reducing gradients in full buckets: in every micro-batch, and once."""
    costs, skeleton = space.costs, space.skeleton
    shape = costs.amounts.shape[:2]
    found = {False: np.zeros(shape), True: np.zeros(shape)}
    bucket_bytes = skeleton.communication.bucket_bytes
    for place, (is_often, kind, axes, _) in enumerate(costs.payloads):
        bucket_s = space.context.model.pricer.prices.time_s(
            kind,
            bucket_bytes,
            axes=axes,
            axis_sizes=skeleton.sizes,
            num_stages=skeleton.num_stages,
        )
        share = float(bucket_s) / bucket_bytes
        found[is_often] += costs.amounts[:, :, costs.first_payload + place] * share
    return found[True], found[False]
