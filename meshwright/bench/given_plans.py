"""The plan a row was run with, exactly as given, on the segments of a graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from meshwright import __version__
from meshwright.bench.clusters import num_devices_of
from meshwright.bench.runs import MeasuredRun
from meshwright.bench.sizes import experts_of
from meshwright.bench.software import Software
from meshwright.bench.stage_cuts import starts_of
from meshwright.bench.words import schedule_of, virtual_of
from meshwright.errors import BadRequest
from meshwright.graph.dimensions import BATCH, EXPERTS, RING, SEQUENCE
from meshwright.graph.segments import Segmentation
from meshwright.plans.plan import (
    CommunicationOptions,
    GraphReference,
    JobSpec,
    Mesh,
    ParallelPlan,
    Provenance,
    ScheduleName,
    SegmentPlan,
    Stage,
)

__all__ = ["Degrees", "degrees_of", "given_plan", "shards_of"]

_TENSOR_KINDS = ("heads", "vocab", "inner")
_EXPERT_TENSOR = re.compile(r"(?i)(?:\betp|_etp|expert[-_ ]tensor[-_ ]parallel\w*)[-_ =:]*(\d+)")
_MANY_EXPERTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """How a run splits its batch and its model; none missing."""

    dp: int
    tp: int
    pp: int
    cp: int
    ep: int
    """Over ranks of ``dp``."""
    expert_axes: tuple[str, ...] = ()
    """``cp`` and ``tp`` where all of their ranks hold different experts too."""
    virtual: int
    micro_batch: float
    """Samples; no whole number where ranks take turns at the last micro-batch."""
    num_microbatches: int

    @property
    def per_stage(self) -> int:
        """Devices of a stage."""
        return self.dp * self.tp * self.cp

    @property
    def inner_sizes(self) -> dict[str, int]:
        """Of the mesh axes inside a layer."""
        return {"cp": self.cp, "ep": self.ep, "tp": self.tp}


def degrees_of(run: MeasuredRun) -> tuple[Degrees, tuple[str, ...]]:
    """The degrees of ``run``, and what was assumed.

    Raises:
        BadRequest: the devices, the batch or the product of degrees do not agree, or are not told.
    """
    said: list[str] = []
    gpus = num_devices_of(run)
    tp, pp, cp = run.tp or 1, run.pp or 1, run.cp or 1
    inner = tp * pp * cp
    if gpus % inner:
        raise BadRequest(f"tp {tp} x pp {pp} x cp {cp} does not divide {gpus} gpus")
    dp = gpus // inner
    if run.dp is not None and run.dp != dp:
        raise BadRequest(f"dp {run.dp} x tp {tp} x pp {pp} x cp {cp} is not {gpus} gpus")
    if run.global_batch is None:
        raise BadRequest("global_batch is not told")
    ep, expert_axes = _expert_axes(run, dp, said)
    micro = run.micro_batch
    if micro is None:
        micro = 1 if pp > 1 else max(run.global_batch // dp, 1)
        said.append(f"micro_batch not told: {micro}")
    count = max(-(-run.global_batch // (dp * micro)), 1)
    mean = run.global_batch / dp / count
    if mean != micro:
        said.append(
            f"global_batch {run.global_batch} is no multiple of dp {dp} x micro_batch {micro}: "
            f"{count} micro-batches of {mean:.4g} samples on average"
        )
    virtual = run.virtual_stages or virtual_of(run) or 1
    if virtual == 1 and run.virtual_stages is None and _is_interleaved(run):
        # Even with or without embedding and head.
        virtual = 2 if run.layers and run.layers % (2 * pp) in (0, 2 * pp - 2) else 1
        said.append(f"virtual stages not told: {virtual}")
    found = Degrees(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        expert_axes=expert_axes,
        virtual=virtual if pp > 1 else 1,
        micro_batch=mean,
        num_microbatches=count,
    )
    return found, tuple(said)


def _expert_axes(run: MeasuredRun, dp: int, said: list[str]) -> tuple[int, tuple[str, ...]]:
    """Ranks of ``dp`` that experts are spread over, and the other axes that cut them.

    With expert tensor parallelism 1 every expert is whole on its rank, and the group that shares
    the experts takes in ``tp`` first, as Megatron-Core and torchtitan lay it out; otherwise ``tp``
    cuts every expert. Then it takes ranks of ``dp``, or where these do not fit those of ``cp``.

    Raises:
        BadRequest: nobody tells how many experts there are.
    """
    asked, experts, tp, cp = run.ep or 1, experts_of(run), run.tp or 1, run.cp or 1
    if not experts:
        if asked > 1:
            said.append(f"ep {asked} of a model without experts: 1")
        return 1, ()
    ep = gcd(asked, experts)
    if ep != asked:
        said.append(f"ep {asked} does not divide {experts} experts: {ep}")
    axes = []
    if ep > 1 and tp > 1 and _are_experts_whole(run, dp, ep, said) and ep % tp == 0:
        axes.append("tp")
        ep //= tp
    if dp % ep and ep % cp == 0 and (ep == cp or tp == 1):
        axes.append("cp")
        ep //= cp
    if dp % ep:
        said.append(f"ep {asked} over dp {dp}, tp {tp}, cp {cp}: over {gcd(ep, dp)} ranks of dp")
    return gcd(ep, dp), tuple(axes)


def _are_experts_whole(run: MeasuredRun, dp: int, ep: int, said: list[str]) -> bool:
    """Whether ``tp`` does not cut them: as told; else where they would not fit, or are many.

    No recipe cuts many small experts further.
    """
    match = _EXPERT_TENSOR.search(f"{run.notes or ''} {run.framework or ''} {run.model_name or ''}")
    if match is not None:
        return match.group(1) == "1"
    are_whole = dp % ep > 0 or experts_of(run) >= _MANY_EXPERTS
    said.append(f"expert tensor parallelism not told: {1 if are_whole else run.tp}")
    return are_whole


def shards_of(
    segmentation: Segmentation,
    labels: Sequence[Mapping[str, int]],
    degrees: Degrees,
    *,
    sequence_parallel: bool,
    sizes: Mapping[int, int],
) -> list[dict[str, list[str]]]:
    """For each segment class, mesh axis to labels.

    Args:
        segmentation: of the graph.
        labels: of each segment, label to class.
        degrees: of the run.
        sequence_parallel: what lies between tensor-parallel products is cut along the sequence.
        sizes: of each dimension class.
    """
    found = []
    for segment in segmentation.representatives():
        names = labels[segment.index]
        batch = [BATCH] if BATCH in names else []
        experts = [label for label in names if _kind(label) == EXPERTS]
        over_context = experts if "cp" in degrees.expert_axes else []
        sequence = [SEQUENCE] if SEQUENCE in names else []
        tensor = [label for kind in _TENSOR_KINDS for label in names if _kind(label) == kind]
        tensor = [label for label in tensor if sizes.get(names[label], 0) % degrees.tp == 0]
        wanted = {
            "dp_replicate": batch,
            "dp_shard": batch,
            "cp": [*over_context, *sequence, RING],
            "ep": [*experts, *batch],
            "tp": tensor + (sequence if sequence_parallel else []),
        }
        if experts and "tp" in degrees.expert_axes:
            wanted["tp"] = [*experts, *sequence]
        used = degrees.inner_sizes
        found.append({axis: wanted[axis] for axis in wanted if used.get(axis, 2) > 1})
    return found


def _kind(label: str) -> str:
    return label.rstrip("0123456789")


def given_plan(
    run: MeasuredRun,
    degrees: Degrees,
    software: Software,
    segmentation: Segmentation,
    shards: Sequence[dict[str, list[str]]],
    *,
    graph: GraphReference,
    job: JobSpec,
) -> tuple[ParallelPlan, tuple[str, ...]]:
    """The plan of ``run``, and what was assumed.

    Raises:
        BadRequest: there are more stages than layers.
    """
    said: list[str] = []
    schedule, virtual = _schedule(run, degrees, said)
    starts, of_cuts = starts_of(run, segmentation, degrees.pp, virtual)
    ends = (*starts[1:], len(segmentation.segments))
    data = degrees.dp // degrees.ep
    sharing = data * degrees.cp if software.shards_over_context else data
    shards_data = software.zero_stage > 0
    segments = [
        SegmentPlan(
            segment_class=segment.segment_class,
            name=segment.name,
            shard={
                axis: names
                for axis, names in shard.items()
                if axis not in ("dp_replicate", "dp_shard") or (axis == "dp_shard") == shards_data
            },
            zero_stage=software.zero_stage if sharing > 1 else 0,
            recompute=software.recompute,
        )
        for segment, shard in zip(segmentation.representatives(), shards, strict=True)
    ]
    plan = ParallelPlan(
        model=graph,
        cluster=f"{run.gpus or ''}x{run.gpu}",
        job=job,
        mesh=Mesh(
            pp=degrees.pp,
            dp_replicate=1 if shards_data else data,
            dp_shard=data if shards_data else 1,
            **degrees.inner_sizes,
        ),
        num_microbatches=degrees.num_microbatches,
        schedule=schedule,
        communication=CommunicationOptions(
            bucket_bytes=_bucket_bytes(run, software, graph, degrees.tp)
        ),
        stages=[
            Stage(
                first_segment=start,
                last_segment=end - 1,
                first_device=stage % degrees.pp * degrees.per_stage,
                num_devices=degrees.per_stage,
            )
            for stage, (start, end) in enumerate(zip(starts, ends, strict=True))
        ],
        segments=segments,
        provenance=Provenance(meshwright_version=__version__, solver="given", level="manual"),
    )
    return plan, (*said, *of_cuts)


def _bucket_bytes(run: MeasuredRun, software: Software, graph: GraphReference, tp: int) -> int:
    """What is reduced at a time: FSDP reduces what it wraps, a layer, whatever its size."""
    if not software.keeps_full_precision:
        return software.bucket_bytes
    layers = run.layers or graph.num_segments
    return max(int(graph.num_parameters / layers / tp) * software.gradient_bytes, 1)


def _is_interleaved(run: MeasuredRun) -> bool:
    return schedule_of(run)[0] is ScheduleName.INTERLEAVED


def _schedule(run: MeasuredRun, degrees: Degrees, said: list[str]) -> tuple[ScheduleName, int]:
    """The schedule and the stages of a device."""
    if degrees.pp == 1:
        return ScheduleName.ONE_F_ONE_B, 1
    told, assumed = schedule_of(run)
    if told is ScheduleName.ZB_H1:
        said += assumed
        return told, 1
    if degrees.virtual > 1:
        if degrees.num_microbatches % degrees.pp == 0:
            said += () if told or not run.schedule else assumed
            return ScheduleName.INTERLEAVED, degrees.virtual
        said.append("micro-batches do not divide by pp: 1F1B instead of interleaved")
    said += assumed
    return ScheduleName.GPIPE if told is ScheduleName.GPIPE else ScheduleName.ONE_F_ONE_B, 1
