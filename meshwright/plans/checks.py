"""What a plan must satisfy beyond the types of its fields.

``check_structure`` needs the plan alone, ``check_plan`` also what the plan is for: the cluster's
devices and the graph's segments and parameters. A plan that contradicts itself is a
``BadPlanFile``; one that contradicts its graph or cluster is ``PlanRefused``. Whether it fits the
memory is the cost model's business, whether the runtime carries it the lowering's.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

from meshwright.errors import BadPlanFile, PlanRefused
from meshwright.plans.plan import AXIS_NAMES, ParallelPlan, SegmentPlan

__all__ = ["check_plan", "check_structure"]


def check_plan(
    plan: ParallelPlan,
    *,
    num_devices: int,
    num_segments: int,
    segment_classes: Sequence[int],
    parameter_segments: Mapping[str, Collection[int]] | None = None,
    graph_sha256: str | None = None,
    known_labels: Collection[str] | None = None,
) -> None:
    """Check ``plan`` against its cluster and its graph, and against itself.

    Args:
        plan: The plan.
        num_devices: Devices of the cluster.
        num_segments: Segments of the graph.
        segment_classes: Class of each segment, in order.
        parameter_segments: For every parameter the segments that read it; without it, parameters
            are not checked.
        graph_sha256: Hash of the graph's canonical form; without it, not compared.
        known_labels: Labels of the graph's dimension classes; without it, not compared.

    Raises:
        BadPlanFile: the plan contradicts itself.
        PlanRefused: the plan is not for this cluster or graph.
    """
    assert len(segment_classes) == num_segments, "one class for each segment"
    check_structure(plan)
    _check_graph(plan, num_segments=num_segments, graph_sha256=graph_sha256)
    _check_devices_exist(plan, num_devices=num_devices)
    _check_classes(plan, segment_classes)
    _check_parameters(parameter_segments or {}, num_segments=num_segments)
    if known_labels is not None:
        _check_labels(plan, known_labels)


def check_structure(plan: ParallelPlan) -> None:
    """Check that ``plan`` agrees with itself.

    Stages number ``pp``, follow one another over all segments and hold disjoint devices, as many
    as the mesh says; one SegmentPlan for each class, in order; ZeRO has an axis to shard over; the
    batch divides.

    Raises:
        BadPlanFile: it does not.
    """
    _check_stages(plan)
    _check_stage_devices(plan)
    for index, segment in enumerate(plan.segments):
        _check_segment(plan, index, segment)
    if not plan.segments:
        raise BadPlanFile("$.segments: empty; give one entry for each segment class")
    _check_batch(plan)


def _check_stages(plan: ParallelPlan) -> None:
    if len(plan.stages) != plan.mesh.pp:
        raise BadPlanFile(
            f"$.stages: {len(plan.stages)} stages but mesh.pp is {plan.mesh.pp}; make them equal"
        )
    expected = 0
    for index, stage in enumerate(plan.stages):
        if stage.first_segment != expected:
            raise BadPlanFile(
                f"$.stages[{index}].first_segment: must be {expected}, got {stage.first_segment}; "
                "stages follow one another without gap or overlap"
            )
        expected = stage.last_segment + 1
    if expected != plan.model.num_segments:
        raise BadPlanFile(
            f"$.stages[{len(plan.stages) - 1}].last_segment: must be "
            f"{plan.model.num_segments - 1}, the last of model.num_segments, got {expected - 1}"
        )


def _check_stage_devices(plan: ParallelPlan) -> None:
    per_stage = plan.mesh.num_devices_per_stage
    for index, stage in enumerate(plan.stages):
        if stage.num_devices != per_stage:
            sizes = " x ".join(
                f"{axis} {size}"
                for axis, size in zip(AXIS_NAMES, plan.mesh.stage_shape, strict=True)
                if size > 1
            )
            raise BadPlanFile(
                f"$.stages[{index}].num_devices: must be {per_stage}, the mesh of a stage "
                f"({sizes or 'all axes 1'}), got {stage.num_devices}"
            )
    by_device = sorted(range(len(plan.stages)), key=lambda i: plan.stages[i].first_device)
    for before, after in itertools.pairwise(by_device):
        if plan.stages[after].first_device < plan.stages[before].devices.stop:
            raise BadPlanFile(
                f"$.stages[{after}].first_device: device {plan.stages[after].first_device} "
                f"already belongs to stage {before}; give each stage devices of its own"
            )


def _check_segment(plan: ParallelPlan, index: int, segment: SegmentPlan) -> None:
    if segment.segment_class != index:
        raise BadPlanFile(
            f"$.segments[{index}].segment_class: must be {index}, got {segment.segment_class}; "
            "list every class once, in order"
        )
    if segment.zero_stage > 0 and plan.mesh.dp_shard == 1:
        raise BadPlanFile(
            f"$.segments[{index}].zero_stage: {segment.zero_stage} needs mesh.dp_shard > 1; "
            "use 0 or shard over more devices"
        )


def _check_batch(plan: ParallelPlan) -> None:
    ways = plan.mesh.data_parallel * plan.num_microbatches
    if plan.job.global_batch % ways:
        raise BadPlanFile(
            f"$.job.global_batch: {plan.job.global_batch} is not divisible by {ways} "
            f"(data parallel {plan.mesh.data_parallel} x {plan.num_microbatches} micro-batches)"
        )


def _check_graph(plan: ParallelPlan, *, num_segments: int, graph_sha256: str | None) -> None:
    if graph_sha256 is not None and plan.model.graph_sha256 != graph_sha256:
        raise PlanRefused(
            f"$.model.graph_sha256: the plan is for another program ({plan.model.reference}: "
            f"{plan.model.graph_sha256[:12]}, this one: {graph_sha256[:12]}); plan this one"
        )
    if plan.model.num_segments != num_segments:
        raise PlanRefused(
            f"$.model.num_segments: {plan.model.num_segments} but the graph has {num_segments}; "
            "make the plan again for this model"
        )


def _check_devices_exist(plan: ParallelPlan, *, num_devices: int) -> None:
    for index, stage in enumerate(plan.stages):
        if stage.devices.stop > num_devices:
            raise PlanRefused(
                f"$.stages[{index}].first_device: the stage needs device "
                f"{stage.devices.stop - 1} but the cluster has {num_devices} devices, numbered "
                "from 0; use a larger cluster or plan for this one"
            )


def _check_classes(plan: ParallelPlan, segment_classes: Sequence[int]) -> None:
    planned = range(len(plan.segments))
    for segment, segment_class in enumerate(segment_classes):
        if segment_class not in planned:
            raise PlanRefused(
                f"$.segments: no entry for class {segment_class} (segment {segment}); add it"
            )
    unused = sorted(set(planned) - set(segment_classes))
    if unused:
        raise PlanRefused(
            f"$.segments[{unused[0]}]: the graph has no segment of class {unused[0]}; remove it "
            "or make the plan again for this model"
        )


def _check_parameters(
    parameter_segments: Mapping[str, Collection[int]], *, num_segments: int
) -> None:
    for name, segments in parameter_segments.items():
        if not segments:
            raise PlanRefused(
                f"$.stages: parameter {name} is placed on no stage because no segment reads it; "
                "remove it from the model or set requires_grad=False"
            )
        outside = [segment for segment in segments if not 0 <= segment < num_segments]
        assert not outside, f"parameter {name} in segments {outside} of {num_segments}"


def _check_labels(plan: ParallelPlan, known_labels: Collection[str]) -> None:
    for index, segment in enumerate(plan.segments):
        for axis, labels in segment.shard.items():
            for position, label in enumerate(labels):
                if label not in known_labels:
                    known = ", ".join(sorted(known_labels))
                    raise PlanRefused(
                        f"$.segments[{index}].shard.{axis}[{position}]: the graph has no dimension "
                        f"class {label!r}; it has {known}"
                    )
