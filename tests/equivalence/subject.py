"""A model, what plain PyTorch makes of it, and plans for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.capture import capture
from meshwright.capture.references import resolve_model
from meshwright.graph.opgraph import InputRole
from meshwright.plans.plan import (
    AXIS_NAMES,
    CommunicationOptions,
    GraphReference,
    JobSpec,
    Mesh,
    OptimizerSpec,
    ParallelPlan,
    Precision,
    Provenance,
    Recompute,
    ScheduleName,
    SegmentPlan,
    Stage,
)
from meshwright.runtime.mesh import layout_of
from meshwright.runtime.verify import Steps, compare, virtual_steps
from meshwright.runtime.virtual import VirtualCluster
from meshwright.spmd.prepared import PreparedGraph, lower_plan, prepare

NUM_STEPS = 3
BUCKET_BYTES = 1 << 14
"""Small, so that gradients of these models fill several buckets."""

TENSOR = ("heads", "heads2", "experts", "vocab", "inner")
SEQUENCE = (*TENSOR, "sequence")
BATCH = ("batch",)
EXPERTS = ("experts", "batch")


@dataclass(frozen=True)
class Recipe:
    """A plan for any model: labels a segment does not have are left out."""

    mesh: Mapping[str, int] = field(default_factory=dict)
    """Sizes of mesh axes, ``pp`` among them."""
    shard: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    micro: int = 1
    zero: int = 0
    recompute: Recompute = Recompute.NONE
    offload: bool = False
    schedule: ScheduleName = ScheduleName.ONE_F_ONE_B

    @property
    def num_devices(self) -> int:
        product = 1
        for size in self.mesh.values():
            product *= size
        return product


@dataclass(frozen=True)
class Subject:
    """A captured model with its batch and three steps of plain PyTorch."""

    reference: str
    prepared: PreparedGraph
    state: Mapping[str, Tensor]
    """Parameters, buffers and constants by name."""
    data: Mapping[str, Tensor]
    truth: Steps
    precision: Precision
    optimizer: OptimizerSpec


def eager_steps(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], optimizer: OptimizerSpec
) -> Steps:
    """``NUM_STEPS`` steps of the module itself with ``torch.optim.AdamW``."""
    stepper = torch.optim.AdamW(
        model.parameters(),
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
    )
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(NUM_STEPS):
        stepper.zero_grad()
        result = model(*args, **kwargs)
        loss = result if isinstance(result, Tensor) else result["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
        if step == 0:
            gradients = {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        stepper.step()
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    return Steps(losses=tuple(losses), gradients=gradients, parameters=parameters)


def subject_of(
    reference: str,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    precision: Precision = Precision.FP64,
    optimizer: OptimizerSpec | None = None,
) -> Subject:
    """Capture a module and step it; the module is trained afterwards."""
    optimizer = optimizer or OptimizerSpec()
    captured = capture(model, args, kwargs, name=reference)
    names = {item.name for item in captured.graph.inputs if item.role != InputRole.DATA}
    state = {
        name: tensor.detach().clone()
        for name, tensor in (*model.state_dict().items(), *model.named_buffers())
        if name in names
    }
    return Subject(
        reference=reference,
        prepared=prepare(captured.graph),
        state={**state, **captured.constants},
        data={name: tensor.clone() for name, tensor in captured.flatten_data(args, kwargs).items()},
        truth=eager_steps(model, args, kwargs, optimizer),
        precision=precision,
        optimizer=optimizer,
    )


FP32_OPTIMIZER = OptimizerSpec(epsilon=1e-4)
"""In fp32 the true gradient of an attention key's bias, 0, is rounding of 1e-10, which AdamW with a
smaller epsilon blows up to a whole step on one device as on several."""


def built_in(reference: str, *, precision: Precision = Precision.FP64, batch: int = 8) -> Subject:
    """A subject from the zoo; fp32 is held against fp64 from the same values.

    Two runs in fp32 would add their rounding errors.
    """
    if precision == Precision.FP64:
        return _built_in(reference, precision, batch, OptimizerSpec())
    exact = _built_in(reference, Precision.FP64, batch, FP32_OPTIMIZER)
    return replace(_built_in(reference, precision, batch, FP32_OPTIMIZER), truth=exact.truth)


def _built_in(
    reference: str, precision: Precision, batch: int, optimizer: OptimizerSpec
) -> Subject:
    dtype = {Precision.FP64: "float64", Precision.FP32: "float32"}[precision]
    source = resolve_model(reference)
    args, kwargs = source.example_inputs(batch, None, "cpu", seed=1, dtype=dtype)
    model = source.build(dtype, "cpu", seed=0)
    return subject_of(reference, model, args, kwargs, precision=precision, optimizer=optimizer)


def plan_of(subject: Subject, recipe: Recipe) -> ParallelPlan:
    """The recipe for this model: the same choice for every segment, stages of equal length."""
    prepared = subject.prepared
    segments = prepared.segmentation.segments
    num_stages = recipe.mesh.get("pp", 1)
    mesh = Mesh(**recipe.mesh)
    bounds = [round(stage * len(segments) / num_stages) for stage in range(num_stages + 1)]
    return ParallelPlan(
        model=GraphReference(
            reference=subject.reference,
            graph_sha256=prepared.sha256,
            num_parameters=prepared.graph.num_parameters,
            num_segments=len(segments),
        ),
        cluster=f"cpu:{mesh.num_devices}",
        job=JobSpec(
            global_batch=next(iter(subject.data.values())).shape[0],
            precision=subject.precision,
            optimizer=subject.optimizer,
        ),
        mesh=mesh,
        num_microbatches=recipe.micro,
        schedule=recipe.schedule,
        stages=[
            Stage(
                first_segment=bounds[stage],
                last_segment=bounds[stage + 1] - 1,
                first_device=stage * mesh.num_devices_per_stage,
                num_devices=mesh.num_devices_per_stage,
            )
            for stage in range(num_stages)
        ],
        segments=[
            SegmentPlan(
                segment_class=segment.segment_class,
                name=segment.name,
                shard={
                    axis: [
                        label
                        for label in recipe.shard.get(axis, ())
                        if label in prepared.labels.by_segment[segment.index]
                    ]
                    for axis in AXIS_NAMES
                    if recipe.mesh.get(axis, 1) > 1
                },
                zero_stage=recipe.zero,
                recompute=recipe.recompute,
                offload=recipe.offload,
            )
            for segment in prepared.segmentation.representatives()
        ],
        communication=CommunicationOptions(bucket_bytes=BUCKET_BYTES),
        provenance=Provenance(meshwright_version="0", solver="by hand", level="manual"),
    )


def on_virtual_ranks(subject: Subject, plan: ParallelPlan) -> Steps:
    """The plan's steps on virtual ranks."""
    cluster = VirtualCluster(
        lower_plan(subject.prepared, plan),
        layout_of(plan),
        subject.state.__getitem__,
        schedule=plan.schedule,
        num_microbatches=plan.num_microbatches,
        optimizer=plan.job.optimizer,
    )
    return virtual_steps(cluster, subject.data, num_steps=NUM_STEPS)


def largest_differences(subject: Subject, found: Steps) -> tuple[float, float, float]:
    """Of losses, gradients and parameters, as ``meshwright.runtime.verify`` defines them."""
    verified = compare(subject.truth, found)
    return tuple(  # type: ignore[return-value]
        float("inf") if value is None else value
        for value in (verified.loss, verified.gradients, verified.parameters)
    )
