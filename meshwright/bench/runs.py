"""One measured training run: a row of a table, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from meshwright.errors import BadRequest
from meshwright.strict_json import one_line

__all__ = ["MeasuredRun", "Skipped", "checked_size", "run_of_row"]

_LARGEST = 2**53
_MOST = {
    "layers": 1024,
    "hidden": 2**18,
    "heads": 2**14,
    "kv_heads": 2**14,
    "head_dim": 2**14,
    "ffn_hidden": 2**20,
    "moe_ffn_hidden": 2**20,
    "vocab": 2**24,
    "seq_len": 2**24,
    "experts": 4096,
    "gpus": 2**17,
    "global_batch": 2**24,
    "params_b": 1e5,
}
"""Sizes beyond these take hours to model and are of no model there is."""

_DEGREES = ("dp", "tp", "pp", "cp", "ep", "virtual_stages")
_TEXTS = frozenset({
    "run_id", "source", "arch", "model_name", "gpu", "precision", "schedule", "recompute",
    "framework", "trust", "notes",
})  # fmt: skip
_SWITCHES = frozenset({
    "gated_mlp", "tied_embeddings", "sequence_parallel", "flash_attention", "oom",
    "is_derived_time",
})  # fmt: skip
_AMOUNTS = frozenset({
    "params_b", "intra_host_GBps", "inter_host_GBps", "step_time_s", "peak_memory_bytes",
    "samples_per_s",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A row that cannot be predicted."""

    run_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """A run with its columns for fields, named and counted as in the table; ``None``: not told."""

    run_id: str
    gpu: str
    source: str = ""
    arch: str | None = None
    model_name: str | None = None
    params_b: float | None = None
    """1e9 parameters."""
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn_hidden: int | None = None
    gated_mlp: bool | None = None
    vocab: int | None = None
    seq_len: int | None = None
    tied_embeddings: bool | None = None
    experts: int | None = None
    experts_per_token: int | None = None
    moe_ffn_hidden: int | None = None
    gpus_per_host: int | None = None
    hosts: int | None = None
    gpus: int | None = None
    nvlink_domain_gpus: int | None = None
    intra_host_GBps: float | None = None
    inter_host_GBps: float | None = None
    precision: str | None = None
    global_batch: int | None = None
    micro_batch: int | None = None
    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    ep: int | None = None
    virtual_stages: int | None = None
    schedule: str | None = None
    zero_stage: int | None = None
    sequence_parallel: bool | None = None
    recompute: str | None = None
    framework: str | None = None
    flash_attention: bool | None = None
    step_time_s: float | None = None
    peak_memory_bytes: float | None = None
    oom: bool = False
    samples_per_s: float | None = None
    is_derived_time: bool | None = None
    trust: str | None = None
    notes: str | None = None

    @property
    def measured_s(self) -> float | None:
        """Seconds of a step, as measured or from samples per second; ``None``: not told."""
        if self.step_time_s:
            return self.step_time_s
        if self.samples_per_s and self.global_batch and not self.oom:
            return self.global_batch / self.samples_per_s
        return None

    @property
    def job_key(self) -> str:
        """Equal for runs that a planner would choose between: one job on one set of devices."""
        return "|".join(
            str(value)
            for value in (
                self.source, self.arch, self.model_name, self.layers, self.hidden, self.heads,
                self.ffn_hidden, self.experts, self.seq_len, self.global_batch, self.gpu,
                self.gpus, self.hosts, self.precision,
            )
        )  # fmt: skip

    @property
    def plan_key(self) -> str:
        """Equal for runs of a job that did the same."""
        return "|".join(
            str(value)
            for value in (
                self.micro_batch, *(getattr(self, name) or 1 for name in _DEGREES),
                self.schedule, self.zero_stage, self.sequence_parallel, self.recompute,
                self.framework, self.flash_attention,
            )
        )  # fmt: skip


_FIELDS = tuple(item.name for item in fields(MeasuredRun))


def run_of_row(row: Mapping[str, str | float | bool | None]) -> MeasuredRun:
    """The run a row tells of; columns that are not fields are left out.

    Sizes and degrees of 0 stand for an empty cell, but for ``zero_stage``.

    Raises:
        BadRequest: a value makes no sense, or ``run_id`` or ``gpu`` is missing.
    """
    for name in ("run_id", "gpu"):
        if not row.get(name):
            raise BadRequest(f"{name} is missing; every run needs one")
    values = {
        name: _value(name, row[name]) for name in _FIELDS if name in row and row[name] is not None
    }
    return MeasuredRun(**{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]


def checked_size(name: str, value: float) -> None:
    """Whether the size of a model or a cluster, a column by its name, can be modeled.

    Raises:
        BadRequest: it is larger than any there is.
    """
    most = _MOST.get(name, _LARGEST)
    if value > most:
        raise BadRequest(f"{name} is {value:.10g}; more than {most:.10g} is not modeled")


def _value(name: str, value: str | float | bool | None) -> str | float | bool | None:
    if name in _TEXTS:
        return one_line(str(value)).strip() or None
    if name in _SWITCHES:
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        raise BadRequest(f"{name} is {value!r}; it must be true or false")
    if isinstance(value, str) or value is None or not math.isfinite(value):
        raise BadRequest(f"{name} is {value!r}; it must be a finite number")
    if name in _AMOUNTS:
        if value < 0:
            raise BadRequest(f"{name} is {value}; it must be 0 or more")
        checked_size(name, value)
        return float(value) or None
    if value != int(value) or not 0 <= value < _LARGEST:
        raise BadRequest(f"{name} is {value}; it must be a whole number, 0 or more")
    if name == "zero_stage":
        if value > 3:
            raise BadRequest(f"zero_stage is {value}; it must be 0 to 3")
        return int(value)
    checked_size(name, value)
    return int(value) or None
