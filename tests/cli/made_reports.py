"""A step report that nothing was run for."""

from __future__ import annotations

from meshwright.records import (
    RankMemory,
    StepReport,
    Verified,
    describe_machine,
    describe_software,
    timing_of,
    utc_now,
)

__all__ = ["report_with"]


def report_with(
    verified: Verified | None, *, precision: str = "fp32", plan_sha256: str = "ab" * 32
) -> StepReport:
    """What a run on one processor might have measured: a median of 2 s."""
    return StepReport(
        plan_sha256=plan_sha256,
        model="m",
        graph_sha256="cd" * 32,
        cluster="cpu:1",
        mesh={"tp": 1},
        num_microbatches=1,
        precision=precision,
        step_time=timing_of([1.0, 2.0, 3.0]),
        method="by hand",
        memory=[
            RankMemory(
                rank=0,
                parameter_bytes=1,
                gradient_bytes=1,
                optimizer_bytes=2,
                activation_bytes=4,
            )
        ],
        verified=verified,
        samples_per_s=1.0,
        machine=describe_machine(),
        software=describe_software(),
        measured_utc=utc_now(),
    )
