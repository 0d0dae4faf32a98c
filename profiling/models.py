"""Measures a model on one device: each segment of its captured graph, and whole training steps.

The step is the module's own: forward, backward by autograd, optimizer. The segments are those the
planner works with, run operator by operator. Their sum and the optimizer's update should come near
the step; how near is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from meshwright.capture.captured import CapturedModel, capture
from meshwright.capture.references import resolve_model
from meshwright.capture.source import num_parameters
from meshwright.cluster.cpu import read_machine_cpu
from meshwright.errors import BadRequest, DoesNotFit
from meshwright.graph.opgraph import Phase
from meshwright.plans.plan import JobSpec, Precision
from meshwright.profiling.figures import Emit, Figure, Note
from meshwright.profiling.optimizers import make_optimizer
from meshwright.profiling.peak import measure_peak_memory
from meshwright.profiling.segments import (
    PieceTiming,
    pieces_of,
    time_pieces,
)
from meshwright.profiling.timer import CudaClock, Effort, HostClock, Measured, Timer, clock_of
from meshwright.records.kinds import Kind
from meshwright.records.record import Scalar
from meshwright.spmd.prepared import PreparedGraph, prepare
from meshwright.units import format_bytes, format_seconds

__all__ = ["ModelSummary", "measure_model"]

_DTYPES = {
    Precision.FP64: torch.float64,
    Precision.FP32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
}
_DIRECTIONS = {Phase.FORWARD: "fwd", Phase.BACKWARD: "bwd"}
"""As Records of operators name them."""
_STEP_SHARE = 0.4
"""Of the budget; the segments get the rest."""
_LEAST_PIECE_S = 0.02
_FEWEST_REPEATS = 3
"""Of a step and of each segment, whatever the budget."""
_FEWEST_COPIES = 2
"""Parameters and gradients; optimizers hold more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """Medians of one model on one device."""

    segments_s: float
    """Sum over all segments, forward and backward."""
    update_s: float
    """The optimizer's step alone."""
    step_s: float
    """Forward, backward and update of the module itself."""
    num_segments: int
    num_classes: int

    @property
    def ratio(self) -> float:
        """Segments and update over the step."""
        return (self.segments_s + self.update_s) / self.step_s


def measure_model(
    reference: str,
    job: JobSpec,
    *,
    device: str,
    budget_s: float,
    emit: Emit,
    processor_time: bool = False,
) -> ModelSummary:
    """Measure the model that ``reference`` names; ``emit`` gets every figure as it comes.

    ``job.global_batch`` is the batch of this one device; ``processor_time`` is the Timer's.

    Raises:
        PlannerError: the model is none, cannot be captured, or does not fit.
    """
    place = torch.device(device)
    if job.seq_len is None:
        job = msgspec.structs.replace(job, seq_len=resolve_model(reference).default_seq_len)
    try:
        return _measure(reference, job, place, budget_s, emit, processor_time)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        said = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in said:
            raise
        raise DoesNotFit(
            f"{reference} at batch {job.global_batch} does not fit {device}; give a smaller batch"
        ) from error


def _measure(
    reference: str,
    job: JobSpec,
    place: torch.device,
    budget_s: float,
    emit: Emit,
    processor_time: bool,
) -> ModelSummary:
    model, args, kwargs, captured = _open(reference, job, place)
    prepared = prepare(captured.graph)
    identity: dict[str, Scalar] = {
        "graph_sha256": prepared.sha256,
        "precision": str(job.precision),
        "batch": job.global_batch,
        "seq_len": job.seq_len,
        "num_threads": torch.get_num_threads(),
        "clock": "process_time" if processor_time and place.type == "cpu" else None,
    }
    emit(Note(text=f"{reference}: {len(prepared.segmentation.segments)} segments"))
    step_s, update_s = _steps(
        model, (args, kwargs), reference, job, place, budget_s * _STEP_SHARE, identity, emit
    )
    segments_s = _segments(
        prepared,
        captured.graph_inputs(model, args, kwargs),
        reference,
        place,
        budget_s * (1 - _STEP_SHARE),
        identity,
        emit,
    )
    return ModelSummary(
        segments_s=segments_s,
        update_s=update_s,
        step_s=step_s,
        num_segments=len(prepared.segmentation.segments),
        num_classes=prepared.segmentation.num_classes,
    )


def _open(
    reference: str, job: JobSpec, device: torch.device
) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any], CapturedModel]:
    """The module on ``device``, one batch for it, and the graph of its step."""
    source = resolve_model(reference)
    if job.precision not in _DTYPES:
        raise BadRequest(f"{reference}: {job.precision} steps are not run; profile it in bf16")
    dtype = _DTYPES[job.precision]
    meta_args, meta_kwargs = source.example_inputs(
        job.global_batch, job.seq_len, "meta", dtype=dtype
    )
    shapes = source.build(dtype)
    _check_fits(reference, job, num_parameters(shapes), device)
    captured = capture(shapes, meta_args, meta_kwargs, name=reference)
    args, kwargs = source.example_inputs(job.global_batch, job.seq_len, device, seed=0, dtype=dtype)
    return source.build(dtype, device, seed=0), args, kwargs, captured


def _check_fits(reference: str, job: JobSpec, num_params: int, device: torch.device) -> None:
    """Refuse what parameters and gradients alone would overfill.

    Raises:
        DoesNotFit: they would.
    """
    if device.type == "cuda":
        cuda: Any = torch.cuda
        capacity_bytes = int(cuda.mem_get_info(device)[1])
    else:
        capacity_bytes = read_machine_cpu().memory_bytes
    needed_bytes = _FEWEST_COPIES * num_params * _DTYPES[job.precision].itemsize
    if needed_bytes > capacity_bytes:
        raise DoesNotFit(
            f"{reference} needs at least {format_bytes(needed_bytes)} for parameters and gradients "
            f"but {device.type} has {format_bytes(capacity_bytes)}; profile a smaller model, or "
            "fewer layers of it (?num_layers=2)"
        )


def _segments(
    prepared: PreparedGraph,
    inputs: Mapping[int, Tensor],
    reference: str,
    device: torch.device,
    budget_s: float,
    identity: Mapping[str, Scalar],
    emit: Emit,
) -> float:
    """Emit time and memory of every piece; the seconds of all segments together."""
    pieces = pieces_of(prepared.graph, prepared.segmentation)
    total_s = 0.0

    def on_piece(timing: PieceTiming) -> None:
        nonlocal total_s
        piece = timing.piece
        total_s += piece.multiplicity * timing.measured.timing.median_s
        which: dict[str, Scalar] = {"segment": piece.segment, "direction": _DIRECTIONS[piece.phase]}
        emit(
            Figure(
                kind=Kind.SEGMENT_TIME,
                name=reference,
                unit="s",
                values=timing.measured.timing.times_s,
                method=f"its captured operators one by one; {timing.measured.method}",
                extra={
                    **identity,
                    **which,
                    "segment_class": piece.segment_class,
                    "multiplicity": piece.multiplicity,
                },
            )
        )
        emit(_memory(reference, "peak", timing.peak_bytes, device, {**identity, **which}))
        emit(
            Note(
                text=f"segment {piece.segment} {piece.phase}: "
                f"{format_seconds(timing.measured.timing.median_s)} x {piece.multiplicity}, "
                f"peak {format_bytes(timing.peak_bytes)}"
            )
        )

    effort = Effort(
        budget_s=max(_LEAST_PIECE_S, budget_s / max(len(pieces), 1)), fewest_repeats=_FEWEST_REPEATS
    )
    timer = Timer(
        clock_of(device.type, processor_time=identity["clock"] is not None), effort=effort
    )
    time_pieces(prepared.graph, pieces, inputs, timer, on_piece=on_piece)
    return total_s


class _Step:
    """Training steps of a module, with fp32 copies of parameters in bf16 and fp16."""

    def __init__(
        self, model: nn.Module, call: tuple[tuple[Any, ...], Mapping[str, Any]], job: JobSpec
    ) -> None:
        self._model = model
        self._args, self._kwargs = call
        self.parameters = [item for item in model.parameters() if item.requires_grad]
        low = job.precision in (Precision.BF16, Precision.FP16)
        self.updated: list[Tensor] = [
            item.detach().float() if low else item for item in self.parameters
        ]
        optimizer = make_optimizer(job.optimizer, self.updated)
        if optimizer is None:
            raise BadRequest("profile model: the model has no parameter to train")
        self.optimizer = optimizer

    def clear(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.parameters, *self.updated):
            tensor.grad = None

    def forward_backward(self) -> None:
        """Gradients of one batch."""
        self.clear()
        _loss(self._model(*self._args, **self._kwargs)).backward()

    def update(self) -> None:
        """The optimizer's step from the gradients there are."""
        for parameter, target in zip(self.parameters, self.updated, strict=True):
            if target is not parameter:
                target.grad = None if parameter.grad is None else parameter.grad.to(target.dtype)
        self.optimizer.step()
        with torch.no_grad():
            for parameter, target in zip(self.parameters, self.updated, strict=True):
                if target is not parameter:
                    parameter.copy_(target)

    def __call__(self) -> None:
        self.forward_backward()
        self.update()


def _loss(result: Any) -> Tensor:
    """The loss among what a module returns, as capture finds it."""
    if isinstance(result, Mapping):
        result = result["loss"]
    elif not isinstance(result, Tensor):
        result = result.loss if hasattr(result, "loss") else result[0]
    assert isinstance(result, Tensor), f"the loss is a {type(result).__name__}"
    return result


def _steps(
    model: nn.Module,
    call: tuple[tuple[Any, ...], Mapping[str, Any]],
    reference: str,
    job: JobSpec,
    device: torch.device,
    budget_s: float,
    identity: Mapping[str, Scalar],
    emit: Emit,
) -> tuple[float, float]:
    """Emit times and memory of whole steps; seconds of a step and of its update."""
    step = _Step(model, call, job)
    step()  # the first makes the optimizer's state, which is not the step's own
    step.clear()
    peak_bytes = measure_peak_memory(step, device=device.type).peak_bytes
    clock = (
        CudaClock("cuda")
        if device.type == "cuda"
        else HostClock(processor_time=identity["clock"] is not None)
    )
    for cause, num_bytes in _held(step, peak_bytes).items():
        emit(_memory(reference, cause, num_bytes, device, identity))
    num_params = sum(item.numel() for item in step.parameters)
    step_effort, update_effort = (
        Effort(budget_s=share * budget_s, fewest_repeats=_FEWEST_REPEATS) for share in (0.7, 0.3)
    )
    timer = Timer(clock, effort=step_effort)
    try:
        whole = timer.measure(step)
    except KeyboardInterrupt:
        if timer.unfinished is not None:
            found = timer.unfinished
            emit(_step_figure(reference, job, found, num_params, peak_bytes, identity))
        raise
    emit(_step_figure(reference, job, whole, num_params, peak_bytes, identity))
    update = Timer(clock, effort=update_effort).measure(step.update)
    emit(_update_figure(reference, job, update, num_params, identity))
    emit(
        Note(
            text=f"step {format_seconds(whole.timing.median_s)}, of which the optimizer "
            f"{format_seconds(update.timing.median_s)}; peak {format_bytes(peak_bytes)} beyond "
            "parameters and optimizer state"
        )
    )
    return whole.timing.median_s, update.timing.median_s


def _step_figure(
    reference: str,
    job: JobSpec,
    whole: Measured,
    num_params: int,
    peak_bytes: int,
    identity: Mapping[str, Scalar],
) -> Figure:
    samples_per_s = job.global_batch / whole.timing.median_s
    return Figure(
        kind=Kind.STEP_TIME,
        name=reference,
        unit="s",
        values=whole.timing.times_s,
        method=f"eager forward, backward and optimizer; {whole.method}",
        extra={
            **identity,
            "optimizer": str(job.optimizer.name),
            "num_params": num_params,
            "compiled": False,
            "samples_per_s": samples_per_s,
            "tokens_per_s": samples_per_s * job.seq_len if job.seq_len else None,
            "peak_memory_bytes": peak_bytes,
        },
    )


def _update_figure(
    reference: str, job: JobSpec, update: Measured, num_params: int, identity: Mapping[str, Scalar]
) -> Figure:
    return Figure(
        kind=Kind.OPERATOR,
        name=str(job.optimizer.name),
        unit="s",
        values=update.timing.times_s,
        method=f"the optimizer's step over all parameters; {update.method}",
        extra={
            "direction": "update",
            "dtype": str(job.precision),
            "numel": num_params,
            "model": reference,
            "num_threads": identity["num_threads"],
            "clock": identity["clock"],
        },
    )


def _held(step: _Step, peak_bytes: int) -> dict[str, int]:
    """Bytes by what they are for; the peak of a step is that of gradients and activations."""
    state = [
        value
        for entry in step.optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    ]
    copies = [new for new, old in zip(step.updated, step.parameters, strict=True) if new is not old]
    return {
        "parameter": _num_bytes(step.parameters),
        "optimizer": _num_bytes(state) + _num_bytes(copies),
        "gradient": _num_bytes(step.parameters),
        "peak": peak_bytes,
    }


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _memory(
    reference: str,
    cause: str,
    num_bytes: int,
    device: torch.device,
    identity: Mapping[str, Scalar],
) -> Figure:
    counter = (
        "the allocator's peak" if device.type == "cuda" else "the allocations torch's profiler saw"
    )
    extra = {key: value for key, value in identity.items() if key not in ("num_threads", "clock")}
    return Figure(
        kind=Kind.MEMORY,
        name=reference,
        unit="bytes",
        values=(float(num_bytes),),
        method=f"{counter} of one run, beyond what was held before"
        if cause == "peak"
        else "bytes of the tensors held between steps",
        extra={**extra, "cause": cause},
    )
