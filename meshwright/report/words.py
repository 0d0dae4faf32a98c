"""Plans and predictions in words."""

from __future__ import annotations

from meshwright.cost.pricing import MemoryMargin
from meshwright.plans import (
    AXIS_NAMES,
    ParallelPlan,
    Prediction,
    Recompute,
    ScheduleName,
    SegmentPlan,
)
from meshwright.units import format_bytes, format_seconds

__all__ = [
    "cause_words",
    "correction_words",
    "memory_margin_words",
    "mesh_words",
    "prediction_words",
    "schedule_words",
    "shard_words",
    "source_of",
]

_AXIS_WORDS = {
    "pp": "pipeline",
    "dp_replicate": "data",
    "dp_shard": "sharded data",
    "cp": "context",
    "ep": "expert",
    "tp": "tensor",
}

_ZERO_WORDS = {
    1: "optimizer state",
    2: "optimizer state and gradients",
    3: "optimizer state, gradients and parameters",
}

_CAUSE_WORDS = {
    "compute": "arithmetic and memory traffic of operators",
    "launch": "dispatch of operators, where not hidden",
    "tp_communication": "collectives between operators",
    "zero_gather": "gathering of ZeRO-3 parameters, where not hidden",
    "dp_communication": "reduction of gradients, where not hidden",
    "optimizer": "optimizer",
    "pipeline_transfer": "transfers between pipeline stages",
    "clipping": "clipping of gradients",
    "bubble": "waiting of pipeline stages",
    "host": "the framework's work on the host, where not hidden",
    "data_loading": "waiting for data",
    "stragglers": "waiting for the slowest device",
    "step_correction": "what measured steps take beyond the sum of their parts",
    "parameters": "parameters",
    "inputs": "inputs and buffers",
    "accumulators": "gradients summed over micro-batches",
    "gradients": "gradients",
    "activations": "activations kept for the backward pass",
    "gathered_parameters": "gathered ZeRO-3 parameters",
    "transient": "temporary values of operators",
    "communication": "buffers of collectives and transfers",
    "optimizer_step": "temporary values of the optimizer",
    "allocator": "held unused by the allocator",
}


def cause_words(cause: str) -> str:
    """A cause of time or memory in words; one we have no words for as it is."""
    return _CAUSE_WORDS.get(cause, cause.replace("_", " "))


def source_of(prediction: Prediction, cause: str) -> str:
    """Where the figure of a cause comes from, mostly, in the words of ``cost.base.Source``.

    ``"out of distribution"``: it would be learned, were it not unlike all that was learned from.
    """
    share = prediction.sources.get(cause)
    if share is None:
        return "analytic"
    return "learned" if share >= 0.5 else "out of distribution"


def mesh_words(plan: ParallelPlan) -> str:
    """The mesh: ``"pipeline 8 x data 16 x tensor 8"``; ``"one device"`` for a mesh of one."""
    sizes = {"pp": plan.mesh.pp, **dict(zip(AXIS_NAMES, plan.mesh.stage_shape, strict=True))}
    parts = [f"{_AXIS_WORDS[axis]} {size}" for axis, size in sizes.items() if size > 1]
    return " x ".join(parts) or "one device"


_SCHEDULE_WORDS = {
    ScheduleName.GPIPE: "GPipe",
    ScheduleName.ONE_F_ONE_B: "1F1B",
    ScheduleName.INTERLEAVED: "interleaved 1F1B",
    ScheduleName.ZB_H1: "zero-bubble",
}


def schedule_words(plan: ParallelPlan) -> str:
    """How micro-batches run: ``"8 micro-batches, 1F1B"``."""
    count = plan.num_microbatches
    text = "one micro-batch" if count == 1 else f"{count} micro-batches"
    if plan.mesh.pp == 1:
        return text
    text = f"{text}, {_SCHEDULE_WORDS[plan.schedule]}"
    if plan.schedule is ScheduleName.INTERLEAVED:
        text = f"{text} with {len(plan.stages) // plan.mesh.pp} stages each"
    return f"{text}, {len(plan.token_slices)} token slices" if plan.token_slices else text


def shard_words(plan: ParallelPlan, segment: SegmentPlan) -> str:
    """What one class of segments does with each axis of the mesh, its ZeRO stage and recompute."""
    sizes = dict(zip(AXIS_NAMES, plan.mesh.stage_shape, strict=True))
    ways: dict[tuple[str, ...], int] = {}
    for axis, labels in segment.shard.items():
        if sizes[axis] > 1 and labels:
            ways[tuple(labels)] = ways.get(tuple(labels), 1) * sizes[axis]
    parts = [f"{', else '.join(labels)} over {count} devices" for labels, count in ways.items()]
    idle = [axis for axis, size in sizes.items() if size > 1 and not segment.shard.get(axis)]
    parts += [f"replicated along {axis}" for axis in idle]
    if segment.zero_stage:
        held = _ZERO_WORDS[segment.zero_stage]
        parts.append(f"{held} cut over {sizes['dp_shard']} (ZeRO {segment.zero_stage})")
    if segment.recompute is Recompute.FULL:
        parts.append("everything recomputed in the backward pass")
    elif segment.recompute is Recompute.SELECTIVE:
        parts.append("cheap operators recomputed in the backward pass")
    if segment.offload:
        parts.append("optimizer state in the host's memory")
    if segment.operators:
        count = len(segment.operators)
        parts.append(f"{count} operator{'s' if count > 1 else ''} sharded in another way")
    return "; ".join(parts) or "whole on one device"


def prediction_words(prediction: Prediction) -> str:
    """Step time with its interval, memory and rates in one line."""
    low_s, high_s = prediction.step_time_interval_s
    source = " and ".join(prediction.source) or "unknown"
    rate = (
        f"{prediction.samples_per_s:,.4g} samples/s"
        if prediction.tokens_per_s is None
        else f"{prediction.tokens_per_s:,.4g} tokens/s"
    )
    return (
        f"{format_seconds(prediction.step_time_s)} a step "
        f"({format_seconds(low_s)} to {format_seconds(high_s)}, {source}), "
        f"{format_bytes(prediction.peak_memory_bytes)} of "
        f"{format_bytes(prediction.memory_capacity_bytes)}, {rate}, "
        f"{prediction.mfu:.1%} of the peak"
    )


def correction_words(prediction: Prediction) -> str:
    """How measured steps correct the time: ``"Learned step correction x0.97, trust 0.80."``.

    Empty where none was asked.
    """
    more_s = prediction.breakdown.get("step_correction")
    if more_s is None:
        return ""
    parts_s = prediction.step_time_s - more_s
    factor = prediction.step_time_s / parts_s if parts_s else 1.0
    trust = prediction.sources.get("step_correction", 0.0)
    why = "" if trust else ": no step like it was measured"
    return f"Learned step correction x{factor:.3g}, trust {trust:.2f}{why}."


def memory_margin_words(prediction: Prediction, margin: MemoryMargin) -> str:
    """How high the peak may be by measured ones: ``"Memory, learned: ..."``."""
    most_bytes = prediction.peak_memory_bytes * (1 + margin.margin)
    room = format_bytes(prediction.memory_capacity_bytes)
    fits = (
        "which fits too"
        if most_bytes <= prediction.memory_capacity_bytes
        else f"more than {room}: it may run out of memory"
    )
    return (
        f"Memory, learned: in {margin.level:.0%} of configurations at most {margin.margin:.1%} "
        f"above the prediction ({margin.runs} runs, {margin.configurations} configurations of "
        f"{', '.join(margin.sources)}), {format_bytes(int(most_bytes))}, {fits}."
    )
