"""What a rank measures: step time, and the bytes it holds by cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from meshwright.profiling.timer import measure
from meshwright.records.record import Timing
from meshwright.records.report import RankMemory
from meshwright.runtime.memory import StorageTracker
from meshwright.runtime.session import RankSession

__all__ = ["METHOD", "Measurement", "measure_memory", "measure_steps"]

METHOD = "perf_counter around the whole step, barrier of all ranks before and after"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Steps of one rank, timed."""

    timing: Timing
    losses: tuple[float, ...]
    """Of every step, warm-up included; empty on ranks of a stage without the loss."""


def measure_steps(
    session: RankSession, batch: Mapping[str, Tensor], *, warmup: int, repeats: int
) -> Measurement:
    """Time ``repeats`` steps on the rank's own batch; all ranks must come here together."""
    losses: list[Tensor] = []

    def step() -> None:
        result = session.step(batch)
        if result.loss is not None:
            losses.append(result.loss)

    timing = measure(
        step,
        warmup=warmup,
        repeats=repeats,
        synchronize=dist.barrier,
        device=str(session.device),
    )
    return Measurement(timing=timing, losses=tuple(float(loss) for loss in losses))


def measure_memory(session: RankSession, batch: Mapping[str, Tensor]) -> RankMemory:
    """Bytes the rank holds, over one more step; all ranks come together.

    Parameters and optimizer state are what lies in memory between steps: run at least one step
    before, for optimizers make their state in the first. Gradients are those the optimizer reads,
    or the running sums over micro-batches where these are larger. Activations are everything else
    that operators, the optimizer's too, had made and not freed at the fullest moment.
    """
    with StorageTracker() as tracker:
        session.step(batch)
        peak_bytes = tracker.peak_bytes
    program = session.program
    gradients = [slot.gradient for slot in program.parameters if slot.gradient is not None]
    gradient_bytes = max(
        sum(program.values[value].num_bytes for value in values)
        for values in (gradients, program.running_sums)
    )
    return RankMemory(
        rank=session.rank,
        parameter_bytes=session.state.parameter_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=session.state.optimizer_bytes,
        activation_bytes=max(0, peak_bytes - gradient_bytes),
    )
