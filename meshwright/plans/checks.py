"""What a plan must satisfy beyond the types of its fields.

``check_structure`` needs the plan alone, ``check_plan`` also what the plan is for: the cluster's
devices and the graph's segments and parameters. A plan that contradicts itself is a
``BadPlanFile``; one that contradicts its graph or cluster is ``PlanRefused``. Whether it fits the
memory is the cost model's business, whether the runtime carries it the lowering's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence

from meshwright.errors import BadPlanFile, PlanRefused
from meshwright.plans.plan import AXIS_NAMES, ParallelPlan, ScheduleName, Stage
from meshwright.strict_json import FieldError

__all__ = ["check_plan", "check_structure"]

_SHARE_ERROR = 1e-6
"""How far from 1 shares of the batch may sum: they are written as decimals."""


def check_plan(
    plan: ParallelPlan,
    *,
    num_devices: int,
    num_segments: int,
    segment_classes: Sequence[int],
    host_of_device: Sequence[int] | None = None,
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
        host_of_device: Host of each device, in order; without it, shares of the batch are not
            compared with the hosts.
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
    if host_of_device is not None:
        _check_shares(plan, host_of_device)
    _check_classes(plan, segment_classes)
    _check_parameters(parameter_segments or {}, num_segments=num_segments)
    if known_labels is not None:
        _check_labels(plan, known_labels)


def check_structure(plan: ParallelPlan) -> None:
    """Check that ``plan`` agrees with itself.

    Stages number ``pp`` (interleaved: a multiple), hold every segment once and disjoint devices, as
    many as their mesh says; entries of segments are listed by class and name no segment twice; ZeRO
    has an axis to shard over; the batch divides, and shares and slices make up the whole.

    Raises:
        BadPlanFile: it does not.
    """
    _check_stage_count(plan)
    _check_stage_segments(plan)
    for index, stage in enumerate(plan.stages):
        _check_stage(plan, index, stage)
    _check_stage_devices(plan)
    _check_entries(plan)
    _check_batch(plan)
    _check_slices(plan)


def _check_stage_count(plan: ParallelPlan) -> None:
    count, pp = len(plan.stages), plan.mesh.pp
    if plan.schedule is ScheduleName.INTERLEAVED:
        if not count or count % pp:
            raise BadPlanFile(
                f"$.stages: {count} stages but mesh.pp is {pp}; the interleaved schedule takes a "
                "multiple of it"
            )
    elif count != pp:
        raise BadPlanFile(f"$.stages: {count} stages but mesh.pp is {pp}; make them equal")


def _check_stage_segments(plan: ParallelPlan) -> None:
    """Every segment in exactly one stage."""
    count = plan.model.num_segments
    runs: list[tuple[int, int, int, str]] = []
    for index, stage in enumerate(plan.stages):
        own = f"$.stages[{index}].first_segment", f"$.stages[{index}].last_segment"
        paths = [own]
        for number in range(len(stage.branches)):
            path = f"$.stages[{index}].branches[{number}]"
            paths.append((f"{path}[0]", f"{path}[1]"))
        every = ((stage.first_segment, stage.last_segment), *stage.branches)
        for (first, last), (first_path, last_path) in zip(every, paths, strict=True):
            if last < first:
                raise BadPlanFile(f"{last_path}: is {last}, before the first, {first}")
            if last >= count:
                raise BadPlanFile(
                    f"{last_path}: must be at most {count - 1}, the last of model.num_segments, "
                    f"got {last}"
                )
            runs.append((first, last, index, first_path))
    runs.sort()
    expected, owner = 0, 0
    for first, last, index, path in runs:
        if first < expected:
            raise BadPlanFile(
                f"{path}: segment {first} already belongs to stage {owner}; put each segment in "
                "one stage"
            )
        if first > expected:
            break
        expected, owner = last + 1, index
    if expected < count:
        raise BadPlanFile(f"$.stages: segment {expected} of {count} is in no stage; add it to one")


def _check_stage(plan: ParallelPlan, index: int, stage: Stage) -> None:
    for axis in stage.mesh:
        if axis not in AXIS_NAMES:
            known = ", ".join(AXIS_NAMES)
            raise BadPlanFile(f"$.stages[{index}].mesh: has the unknown axis {axis!r}; use {known}")
    sizes = plan.stage_sizes(index)
    if stage.num_devices != math.prod(sizes.values()):
        text = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        raise BadPlanFile(
            f"$.stages[{index}].num_devices: must be {math.prod(sizes.values())}, the mesh of a "
            f"stage ({text or 'all axes 1'}), got {stage.num_devices}"
        )
    if stage.batch_shares and not math.isclose(sum(stage.batch_shares), 1.0, abs_tol=_SHARE_ERROR):
        raise BadPlanFile(
            f"$.stages[{index}].batch_shares: sum to {sum(stage.batch_shares):g}; make it 1"
        )
    if len(stage.batch_shares) > stage.num_devices:
        raise BadPlanFile(
            f"$.stages[{index}].batch_shares: {len(stage.batch_shares)} hosts but the stage has "
            f"{stage.num_devices} devices; give one share for each host of the stage"
        )


def _check_stage_devices(plan: ParallelPlan) -> None:
    groups = plan.stages[: plan.mesh.pp]
    for index, stage in enumerate(plan.stages):
        group = index % plan.mesh.pp
        if stage.devices != groups[group].devices:
            raise BadPlanFile(
                f"$.stages[{index}].first_device: the stage has devices "
                f"{stage.devices.start}-{stage.devices.stop - 1}; interleaved, it lies on those of "
                f"stage {group}, {groups[group].devices.start}-{groups[group].devices.stop - 1}"
            )
    by_device = sorted(range(len(groups)), key=lambda i: groups[i].first_device)
    for before, after in itertools.pairwise(by_device):
        if groups[after].first_device < groups[before].devices.stop:
            raise BadPlanFile(
                f"$.stages[{after}].first_device: device {groups[after].first_device} "
                f"already belongs to stage {before}; give each stage devices of its own"
            )


def _check_entries(plan: ParallelPlan) -> None:
    """Entries by class, without gap."""
    if not plan.segments:
        raise BadPlanFile("$.segments: empty; give one entry for each segment class")
    can_shard = any(plan.stage_sizes(i)["dp_shard"] > 1 for i in range(len(plan.stages)))
    allowed = {0}
    general: set[int] = set()
    for index, entry in enumerate(plan.segments):
        path = f"$.segments[{index}]"
        if entry.segment_class not in allowed:
            raise BadPlanFile(
                f"{path}.segment_class: must be {' or '.join(map(str, sorted(allowed)))}, got "
                f"{entry.segment_class}; list every class, in order"
            )
        allowed = {entry.segment_class, entry.segment_class + 1}
        if entry.at is None and entry.segment_class in general:
            raise BadPlanFile(
                f"{path}.segment_class: class {entry.segment_class} has two entries without at; "
                "say at which segments one of them holds"
            )
        if entry.at is None:
            general.add(entry.segment_class)
        if entry.zero_stage > 0 and not can_shard:
            raise BadPlanFile(
                f"{path}.zero_stage: {entry.zero_stage} needs mesh.dp_shard > 1; use 0 or shard "
                "over more devices"
            )
    _check_runs(plan)


def _check_runs(plan: ParallelPlan) -> None:
    """The runs of ``at`` exist, and no two entries of a class name the same segment."""
    count = plan.model.num_segments
    runs: list[tuple[int, int, int, str]] = []
    for index, entry in enumerate(plan.segments):
        if entry.at is not None and not entry.at:
            raise BadPlanFile(f"$.segments[{index}].at: empty; name segments, or use null for all")
        for number, (first, last) in enumerate(entry.at or ()):
            path = f"$.segments[{index}].at[{number}]"
            if last < first or last >= count:
                raise BadPlanFile(
                    f"{path}: {first} to {last} is no run of segments; they go from 0 to "
                    f"{count - 1}"
                )
            runs.append((entry.segment_class, first, last, path))
    for before, after in itertools.pairwise(sorted(runs)):
        if after[0] == before[0] and after[1] <= before[2]:
            raise BadPlanFile(
                f"{after[3]}: {before[3]} already names segment {after[1]} for class {after[0]}; "
                "name it once"
            )


def _check_batch(plan: ParallelPlan) -> None:
    for index, stage in enumerate(plan.stages):
        sizes = plan.stage_sizes(index)
        data_parallel = sizes["dp_replicate"] * sizes["dp_shard"] * sizes["ep"]
        ways = plan.num_microbatches * (1 if stage.batch_shares else data_parallel)
        if plan.job.global_batch % ways:
            where = f" on stage {index}" if stage.mesh else ""
            raise BadPlanFile(
                f"$.job.global_batch: {plan.job.global_batch} is not divisible by {ways} "
                f"(data parallel {data_parallel} x {plan.num_microbatches} micro-batches{where})"
            )


def _check_slices(plan: ParallelPlan) -> None:
    total = sum(plan.token_slices)
    if plan.token_slices and plan.job.seq_len is not None and total != plan.job.seq_len:
        raise BadPlanFile(
            f"$.token_slices: sum to {total} but job.seq_len is {plan.job.seq_len}; make them equal"
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


def _check_shares(plan: ParallelPlan, host_of_device: Sequence[int]) -> None:
    for index, stage in enumerate(plan.stages):
        num_hosts = len({host_of_device[device] for device in stage.devices})
        if stage.batch_shares and len(stage.batch_shares) != num_hosts:
            raise PlanRefused(
                f"$.stages[{index}].batch_shares: {len(stage.batch_shares)} shares but the stage "
                f"lies on {num_hosts} hosts; give one for each"
            )


def _check_classes(plan: ParallelPlan, segment_classes: Sequence[int]) -> None:
    for index, entry in enumerate(plan.segments):
        if entry.segment_class not in segment_classes:
            raise PlanRefused(
                f"$.segments[{index}]: the graph has no segment of class {entry.segment_class}; "
                "remove it or make the plan again for this model"
            )
        for number, (first, last) in enumerate(entry.at or ()):
            if entry.segment_class not in segment_classes[first : last + 1]:
                raise PlanRefused(
                    f"$.segments[{index}].at[{number}]: no segment from {first} to {last} is of "
                    f"class {entry.segment_class}; remove the run or name others"
                )
    try:
        plan.segment_plans(segment_classes)
    except FieldError as error:
        raise PlanRefused(f"$.{error.key}: {error.problem}") from None


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
    for index, entry in enumerate(plan.segments):
        shards = {"shard": entry.shard}
        shards |= {f"operators.{number}": own for number, own in entry.operators.items()}
        for field, shard in shards.items():
            for axis, labels in shard.items():
                for position, label in enumerate(labels):
                    if label not in known_labels:
                        raise PlanRefused(
                            f"$.segments[{index}].{field}.{axis}[{position}]: the graph has no "
                            f"dimension class {label!r}; it has {', '.join(sorted(known_labels))}"
                        )
