"""The operators of a plan's step as a graph, and how the step's time is made of theirs.

::

    step_time_s = sum over rows of weight * t(row) + rest_s

Rows are the kinds of operators of the plan's table, those that the busiest device group does not
run with weight 0: so a row has the neighbors it has when plans are priced. A row's weight is how
often that group runs it in one step (micro-batches, recompute), stretched by the bubble: all stages
get slower together, and what waits in a pipeline waits so much longer. With ``stretch`` off the
weights are plain numbers of runs, and the bubble is in ``rest_s``.

``rest_s`` is all else: collectives, launches the device waits for, the optimizer, transfers. It is
what the core says at its current prices. Where the host's launches or hidden communication bound a
step, ``rest_s`` would fall as operators get slower, and a graph says too much of them:
``launch_s`` tells how far.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.cluster.model import Device
from meshwright.cost.choice import Choice
from meshwright.cost.columns import FloatArray
from meshwright.cost.corrected import busiest_group, has_one_graph, runs_of_kinds
from meshwright.cost.model import StepCostModel, choice_of
from meshwright.cost.table import CostTable
from meshwright.cost.work import OperatorWork
from meshwright.errors import PlanRefused
from meshwright.plans.plan import ParallelPlan

__all__ = ["StepGraph", "graph_of_choice", "step_graph"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepGraph:
    """See the module docstring; N rows."""

    work: OperatorWork
    weight: FloatArray
    """(N,)"""
    time_s: FloatArray
    """(N,) of each row, as the core prices it now."""
    rest_s: float
    launch_s: float
    """Part of ``rest_s`` in which the device waits for launches."""
    device: Device
    """That runs the rows."""

    @property
    def operators_s(self) -> float:
        """Sum of weight times time."""
        return float(self.weight @ self.time_s)


def step_graph(model: StepCostModel, plan: ParallelPlan, *, stretch: bool = True) -> StepGraph:
    """The graph of ``plan`` as ``model`` prices it.

    Args:
        model: for the plan's model, cluster and job.
        plan: what was or shall be run.
        stretch: let weights carry the bubble.

    Raises:
        PlanRefused: the graph cannot be sharded so, or the plan's stages have meshes or shares of
            the batch of their own, or slices of the sequence: no one set of operators stands for
            its step.
    """
    choice = choice_of(plan, model.segment_classes)
    return graph_of_choice(model, model.table_of_plan(plan), choice, stretch=stretch)


def graph_of_choice(
    model: StepCostModel, table: CostTable, choice: Choice, *, stretch: bool = True
) -> StepGraph:
    """As ``step_graph``, for a choice priced with ``table``.

    Raises:
        PlanRefused: as ``step_graph``.
    """
    if not has_one_graph(choice):
        raise PlanRefused(
            "$.stages: a step with unlike stages or token slices has no one graph of operators; "
            "use a plan with one mesh for all stages"
        )
    cost = model.pricer.price(table, choice)
    busiest, device = busiest_group(model.pricer, table, choice)
    roofline = model.pricer.rooflines[device.name]
    runs = runs_of_kinds(table, choice, busiest)
    work, rows = table.operator_work(choice.split, roofline)
    times = table.times_of_kinds(choice.split, roofline, model.pricer.prices)
    time_s = times.device_s[rows]
    waiting = {cause: cost.breakdown_s[cause] for cause in ("bubble", "pipeline_transfer")}
    own = cost.time_s - sum(waiting.values())
    factor = 1 + waiting["bubble"] / own if stretch and own > 0 else 1.0
    weight = runs[rows] * factor
    return StepGraph(
        work=work,
        weight=weight,
        time_s=time_s,
        rest_s=cost.time_s - float(weight @ time_s),
        launch_s=cost.breakdown_s["launch"] * factor,
        device=device,
    )
