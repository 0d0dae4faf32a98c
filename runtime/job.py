"""What a worker process is told, and what it prepares from that: model, program, data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from meshwright.capture.captured import CapturedModel, capture
from meshwright.capture.references import resolve_model
from meshwright.errors import BadRequest, PlannerError
from meshwright.plans.plan import ParallelPlan, Precision
from meshwright.plans.runnable import check_runnable
from meshwright.runtime.mesh import Layout, layout_of
from meshwright.runtime.state import TensorSource
from meshwright.runtime.verify import source_of
from meshwright.spmd.prepared import PreparedGraph, lower_plan, prepare
from meshwright.spmd.program import StageProgram

__all__ = [
    "TORCH_DTYPES",
    "Failure",
    "Job",
    "PlannedRun",
    "failure_of",
    "full_state",
    "global_batch",
    "open_plan",
    "read_job",
]

TORCH_DTYPES = {
    Precision.FP64: torch.float64,
    Precision.FP32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
    Precision.FP8: torch.bfloat16,
}


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of a plan, as the launcher writes it for its workers."""

    plan: str
    """Path of the plan file."""
    result_dir: str
    """Where rank 0 writes ``report.json`` and any rank its failure."""
    warmup: int = 2
    repeats: int = 10
    verify_steps: int = 0
    """Optimizer steps to compare with one process before anything is timed; 0 for none."""
    seed: int = 0
    """Of parameters, data and dropout."""
    device: str = "cpu"
    """``cpu`` or ``cuda``."""
    timeout_s: float = 600.0
    """Longest wait for another rank."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker died; the launcher raises the first one again."""

    rank: int
    error: str
    """Name of the exception's class."""
    message: str
    """One line."""
    is_planner_error: bool
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A plan with the captured program it is for; holds no real tensor."""

    plan: ParallelPlan
    captured: CapturedModel
    prepared: PreparedGraph
    layout: Layout

    def program(self, stage: int) -> StageProgram:
        """The program of one stage alone."""
        return lower_plan(self.prepared, self.plan, stage=stage)[0]

    def programs(self) -> tuple[StageProgram, ...]:
        """The programs of all stages."""
        return lower_plan(self.prepared, self.plan)


def read_job(path: str) -> Job:
    """The job in a file.

    Raises:
        BadRequest: if the file is not one.
    """
    try:
        return msgspec.convert(json.loads(Path(path).read_text(encoding="utf-8")), Job)
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise BadRequest(f"job file {path}: {error}; let `meshwright run` write it") from error


def open_plan(plan: ParallelPlan) -> PlannedRun:
    """Capture the plan's model, without memory for any tensor.

    Raises:
        PlannerError: if the model cannot be captured, or the runtime cannot carry the plan.
    """
    check_runnable(plan)
    source = resolve_model(plan.model.reference)
    dtype = TORCH_DTYPES[plan.job.precision]
    args, kwargs = source.example_inputs(
        plan.job.global_batch, plan.job.seq_len, "meta", dtype=dtype
    )
    captured = capture(source.build(dtype), args, kwargs, name=plan.model.reference)
    return PlannedRun(
        plan=plan,
        captured=captured,
        prepared=prepare(captured.graph),
        layout=layout_of(plan),
    )


def full_state(run: PlannedRun, *, seed: int) -> TensorSource:
    """Full initial parameters, buffers and constants by name, alike in every process."""
    plan = run.plan
    model = resolve_model(plan.model.reference).build(
        TORCH_DTYPES[plan.job.precision], "cpu", seed=seed
    )
    return source_of(model, run.captured.constants)


def global_batch(run: PlannedRun, *, seed: int) -> Mapping[str, Tensor]:
    """The global batch of every step by input name, alike in every process."""
    plan = run.plan
    args, kwargs = resolve_model(plan.model.reference).example_inputs(
        plan.job.global_batch,
        plan.job.seq_len,
        "cpu",
        seed=seed,
        dtype=TORCH_DTYPES[plan.job.precision],
    )
    return run.captured.flatten_data(args, kwargs)


def failure_of(error: BaseException, *, rank: int, time_s: float) -> Failure:
    """``error`` in one line."""
    lines = str(error).splitlines() or [""]
    return Failure(
        rank=rank,
        error=type(error).__name__,
        message=lines[0],
        is_planner_error=isinstance(error, PlannerError),
        time_s=time_s,
    )
