"""StepReport: what one run of a plan measured, beside what was predicted."""

from __future__ import annotations

import math
import os
from typing import Annotated

import msgspec
from msgspec import Meta

from meshwright.cluster import parse_cluster
from meshwright.errors import BadRequest, PlannerError
from meshwright.records.kinds import Kind
from meshwright.records.record import Machine, Record, Scalar, Software, Timing
from meshwright.records.writing import make_record
from meshwright.strict_json import (
    FieldError,
    check_schema_version,
    convert,
    dump_json,
    load_json,
    read_source,
)

__all__ = [
    "REPORT_SCHEMA_VERSION",
    "PredictedStep",
    "RankMemory",
    "StepReport",
    "Verified",
    "finite_or_none",
    "read_step_report",
]

REPORT_SCHEMA_VERSION = 1

_Bytes = Annotated[int, Meta(ge=0)]


def finite_or_none(value: float) -> float | None:
    """``value``, or None where it is a NaN or an infinity, which JSON cannot hold."""
    return value if math.isfinite(value) else None


class RankMemory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes one rank held at its fullest, by what they were for."""

    rank: Annotated[int, Meta(ge=0)]
    parameter_bytes: _Bytes
    gradient_bytes: _Bytes
    optimizer_bytes: _Bytes
    activation_bytes: _Bytes

    @property
    def total_bytes(self) -> int:
        """Sum of the four; an upper bound of the peak, for they need not peak together."""
        return (
            self.parameter_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.activation_bytes
        )


class PredictedStep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the cost model had said."""

    step_time_s: float
    step_time_interval_s: tuple[float, float]
    peak_memory_bytes: int
    source: list[str]


class Verified(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Largest relative differences from one process; None where one was not finite."""

    loss: float | None
    gradients: float | None
    parameters: float | None

    def within(self, tolerance: float) -> bool:
        """Whether every difference is finite and at most ``tolerance``."""
        differences = (self.loss, self.gradients, self.parameters)
        return all(value is not None and value <= tolerance for value in differences)


class StepReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of one plan."""

    schema_version: int = REPORT_SCHEMA_VERSION
    plan_sha256: str
    """``meshwright.plans.plan_sha256`` of the plan."""
    model: str
    """Reference, as the user gave it."""
    graph_sha256: str
    cluster: str
    mesh: dict[str, int]
    """Devices along each axis of the plan's mesh, ``pp`` included."""
    num_microbatches: int
    precision: str
    step_time: Timing
    method: str
    """How the step was timed."""
    memory: list[RankMemory]
    """One for each rank, in order."""
    predicted: PredictedStep | None = None
    losses: list[float | None] = []
    """Of each step run; None where it was not finite."""
    verified: Verified | None = None
    """None where the run was not compared with one process."""
    samples_per_s: float
    tokens_per_s: float | None = None
    breakdown: dict[str, float] = {}
    """Measured seconds of a step by cause, where the runtime measured them."""
    machine: Machine
    software: Software
    measured_utc: str

    def __post_init__(self) -> None:
        check_schema_version(self.schema_version, REPORT_SCHEMA_VERSION)
        ranks = [item.rank for item in self.memory]
        if ranks != list(range(len(ranks))):
            raise FieldError("memory", f"must have ranks 0, 1, ... in order, got {ranks[:8]}")
        numbers: tuple[float | None, ...] = (
            self.samples_per_s,
            self.tokens_per_s,
            *self.losses,
            *self.breakdown.values(),
        )
        if self.verified is not None:
            numbers += (self.verified.loss, self.verified.gradients, self.verified.parameters)
        if not all(number is None or math.isfinite(number) for number in numbers):
            raise FieldError("losses", "or another figure is not finite; give None for it")

    @property
    def peak_memory_bytes(self) -> int:
        """Bytes of the fullest rank; 0 where memory was not measured."""
        return max((item.total_bytes for item in self.memory), default=0)

    def to_json(self) -> str:
        """The report as a JSON document with a newline at its end."""
        return dump_json(self)

    def to_records(self) -> list[Record]:
        """The report as Records: one of the step time, one for each kind of memory of a rank."""
        predicted_s = None if self.predicted is None else self.predicted.step_time_s
        timing = self.step_time
        records = [
            self._record(
                kind=Kind.STEP_TIME,
                unit="s",
                method=self.method,
                median=timing.median_s,
                p10=timing.p10_s,
                p90=timing.p90_s,
                samples=timing.times_s,
                extra={
                    "samples_per_s": self.samples_per_s,
                    "tokens_per_s": self.tokens_per_s,
                    "predicted_step_time_s": predicted_s,
                },
            )
        ]
        for item in self.memory:
            for cause in ("parameter", "gradient", "optimizer", "activation"):
                records.append(
                    self._record(
                        kind=Kind.MEMORY,
                        unit="bytes",
                        method="bytes of the tensors the rank held at its fullest",
                        median=getattr(item, f"{cause}_bytes"),
                        extra={"rank": item.rank, "cause": cause},
                    )
                )
        return records

    def _record(
        self,
        *,
        kind: Kind,
        unit: str,
        method: str,
        median: float,
        p10: float | None = None,
        p90: float | None = None,
        samples: tuple[float, ...] = (),
        extra: dict[str, Scalar],
    ) -> Record:
        run: dict[str, Scalar] = {
            "plan_sha256": self.plan_sha256,
            "graph_sha256": self.graph_sha256,
            "cluster": self.cluster,
            "precision": self.precision,
            "num_microbatches": self.num_microbatches,
            **{f"mesh_{axis}": size for axis, size in self.mesh.items()},
        }
        return make_record(
            kind=kind,
            name=self.model,
            device=_devices_of(self.cluster),
            verb="run",
            method=method,
            unit=unit,
            median=median,
            p10=p10,
            p90=p90,
            num_repeats=max(1, len(samples)),
            samples=samples,
            extra=run | extra,
            machine=self.machine,
            software=self.software,
            measured_utc=self.measured_utc,
        )


def _devices_of(cluster: str) -> str:
    """Names of the kinds of devices of a cluster; ``cluster`` itself where it cannot be read now.

    It may be a file that is gone by then.
    """
    try:
        devices = parse_cluster(cluster).devices
    except PlannerError:
        return cluster
    return "+".join(dict.fromkeys(device.name for device in devices))


def read_step_report(path_or_text: str | os.PathLike[str]) -> StepReport:
    """The report in a file, or in the text itself (a ``str`` that starts with ``{``).

    Raises:
        BadRequest: it cannot be read or does not follow the schema.
    """
    data, name = read_source(path_or_text, error=BadRequest, what="report")
    value = load_json(data, error=BadRequest, name=name)
    return convert(value, StepReport, error=BadRequest, name=name)
