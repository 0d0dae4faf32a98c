"""The figures that join operators and collectives into a step, in one place.

Each has a default, which is an assumption unless its docstring says where it stands, bounds that no
fit may leave, a unit, and an origin. A step predicted with bounded figures is bounded by the
roofline whatever a fit makes of them. The defaults describe our own runtime: eager, unfused, AdamW
of torch's foreach code, no gradient clipping, gradients in the parameters' type.

In JSON::

    {"schema_version": 1, "figures": {"overlap_fraction": {"value": 0.72, "origin": "learned"}}}

What is left out has its default.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Self

import msgspec

from meshwright.cost.work import DTYPES
from meshwright.errors import BadRequest
from meshwright.strict_json import (
    JsonValue,
    convert,
)

__all__ = ["DEFAULTS", "Bounds", "Calibration", "Origin"]

_SCHEMA_VERSION = 1


class Origin(StrEnum):
    """Where a figure comes from."""

    ASSUMPTION = "assumption"
    LEARNED = "learned"
    MEASURED = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a figure may be."""

    low: float
    high: float
    unit: str


def _figure(default: float, low: float, high: float, unit: str = "1") -> Any:
    return field(default=default, metadata={"bounds": Bounds(low=low, high=high, unit=unit)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """All of them; see the module docstring."""

    # Rooflines, where no operator is learned.
    flop_efficiency: float = _figure(0.7, 0.05, 1.0)
    """Share of an accelerator's dense peak that large matrix products reach: cuBLAS bf16 on A100
    and H100 reaches about 0.65 to 0.8 of the data sheet at the sizes of large transformers."""
    memory_efficiency: float = _figure(0.8, 0.05, 1.0)
    """Share of an accelerator's memory bandwidth that streaming kernels reach (BabelStream: 0.85 to
    0.92; strided and reducing kernels less); of the way to its host too."""
    cpu_flop_efficiency: float = _figure(0.5, 0.05, 1.0)
    """Of a CPU's peak, itself an upper estimate (``cluster.cpu``)."""
    cpu_memory_efficiency: float = _figure(0.7, 0.05, 1.0)
    pointwise_traffic: float = _figure(1.0, 0.1, 1.0)
    """Share of the traffic of element-wise operators that is left after fusion; 1: none."""
    matmul_dtype: str = ""
    """Of ``work.DTYPES``: what the products of linear layers are done in, for recipes that cast
    inside them (fp8, nvfp4 under bf16 training); empty: the job's precision."""

    attention_forward_efficiency: float = _figure(1.0, 0.2, 1.0)
    """Rate of the fused attention kernel that trains, over the one that is priced."""
    attention_backward_efficiency: float = _figure(0.8, 0.2, 1.0)
    """Rate of its backward over that of its forward: FlashAttention-2 on A100 and 3 on H100 print
    0.75 to 0.85 at long sequences (arXiv 2307.08691, 2407.08608)."""
    cast_bytes: float = _figure(0.0, 0.0, 16.0, "B")
    """Traffic for each element of an operand that is cast to ``matmul_dtype``."""

    # Host.
    launch_scale: float = _figure(1.0, 0.05, 20.0)
    """Of the device's ``launch_latency_s``."""
    host_s_per_microbatch: float = _figure(0.0, 0.0, 0.2, "s")
    """What the framework spends on the host for each micro-batch, not hidden."""
    host_s_per_step: float = _figure(0.0, 0.0, 2.0, "s")
    """The same once for each step: scheduler, logging, synchronization."""
    data_loading_share: float = _figure(0.0, 0.0, 0.5)
    """Waiting for data, over the time of all else."""
    straggler_share: float = _figure(0.0, 0.0, 0.05)
    """Waiting for the slowest rank, over the time of all else, for each doubling of devices."""

    # Communication.
    link_efficiency: float = _figure(0.8, 0.05, 1.0)
    """Share of a link's data sheet bandwidth that large messages reach, where no collective is
    learned; between what nccl-tests print for NVLink rings (about 0.8) and InfiniBand (0.9)."""
    overlap_fraction: float = _figure(0.8, 0.0, 1.0)
    """Share of a function's compute that communication started early can hide behind: the first
    bucket is ready only after the first backward segment, the last has nothing behind it."""
    gather_overlap: float = _figure(1.0, 0.0, 1.0)
    """How much of ``overlap_fraction`` holds for gathers of ZeRO-3; 0: nothing is prefetched."""
    gather_s_per_byte: float = _figure(0.0, 0.0, 1e-9, "s/B")
    """What a framework adds to gathers of ZeRO-3 for each byte of the result: copies and waits of
    its host."""
    publish_overlap: float = _figure(0.0, 0.0, 1.0)
    """Share of one forward that the gather of updated parameters hides behind; 0: it comes first,
    as in our runtime."""
    tensor_overlap: float = _figure(0.0, 0.0, 1.0)
    """Share of the collectives between products of a segment (tensor parallel) that hides behind
    them; 0: each waits for the other, as our runtime does."""
    compute_slowdown: float = _figure(0.19, 0.0, 0.5)
    """Compute takes this much longer while a collective runs beside it (arXiv 2507.03114)."""
    communication_slowdown: float = _figure(0.0, 0.0, 1.0)
    """Collectives take this much longer while compute runs beside them."""
    reduction_item_bytes: int = _figure(0, 0, 8, "B")
    """Of an element of a gradient as it is reduced; 0: as the parameter's."""

    # Optimizer.
    optimizer_traffic: float = _figure(1.0, 0.2, 2.0)
    """Traffic of the optimizer's step over that of torch's foreach code; a fused AdamW has about a
    third of it."""
    clipping_passes: float = _figure(0.0, 0.0, 8.0)
    """Times that clipping reads or writes all gradients; 3 for torch's ``clip_grad_norm_``."""

    # Memory.
    reserved_fraction: float = _figure(0.08, 0.0, 0.5)
    """Share of an accelerator's memory kept free: context, communication library, fragmentation."""
    reserved_bytes: int = _figure(0, 0, 64 * 2**30, "B")
    """Kept free besides."""
    memory_margin: float = _figure(0.0, 0.0, 1.0)
    """What the peak exceeds its prediction by once in a hundred times, over the prediction: kept
    free of what is not reserved, so that "fits" means that the 99th percentile fits."""
    allocator_share: float = _figure(0.0, 0.0, 0.5)
    """What the allocator holds unused, over activations, gathered parameters and temporaries."""
    gradient_item_bytes: int = _figure(0, 0, 8, "B")
    """Of an element of a gradient as it is kept; 0: as the parameter's."""
    parameter_item_bytes: int = _figure(0, 0, 8, "B")
    """Of an element of a parameter as it is stored; 0: as it is computed with. Stored in 4 bytes or
    more, the optimizer needs no copy of it (FSDP2's mixed precision)."""
    accumulates_in_place: int = _figure(0, 0, 1, "")
    """1: gradients live in buffers that are always there, are added to by the backward and reduced
    where they are (Megatron); 0: they come with the backward and are packed in buckets."""
    shards_over_context: int = _figure(0, 0, 1, "")
    """1: ZeRO cuts over the ranks of data and of context parallelism together (FSDP2, Megatron)."""

    origins: tuple[tuple[str, Origin], ...] = ()
    """Names of figures that are no assumptions, sorted, and where they come from."""

    def __post_init__(self) -> None:
        for name, bounds in self.bounds().items():
            value = getattr(self, name)
            if not (math.isfinite(value) and bounds.low <= value <= bounds.high):
                raise BadRequest(
                    f"calibration: {name} is {value}; it must be {bounds.low:g} to "
                    f"{bounds.high:g} {'' if bounds.unit == '1' else bounds.unit}".rstrip()
                )
        if self.matmul_dtype not in ("", *DTYPES):
            known = ", ".join(DTYPES)
            raise BadRequest(
                f"calibration: matmul_dtype is {self.matmul_dtype!r}; use one of {known}"
            )
        unknown = sorted({name for name, _ in self.origins} - {*self.bounds(), "matmul_dtype"})
        if unknown:
            raise BadRequest(f"calibration: there is no figure {unknown[0]!r}; remove its origin")

    @classmethod
    def bounds(cls) -> dict[str, Bounds]:
        """Every figure that is a number, in order, to what it may be."""
        return {f.name: f.metadata["bounds"] for f in fields(cls) if "bounds" in f.metadata}

    def origin_of(self, name: str) -> Origin:
        """Where the figure ``name`` comes from."""
        return dict(self.origins).get(name, Origin.ASSUMPTION)

    def with_figures(self, origin: Origin, **figures: float | str) -> Self:
        """A copy with some figures replaced, which are from ``origin``.

        Raises:
            BadRequest: no such figure, or outside its bounds.
        """
        known = {*self.bounds(), "matmul_dtype"}
        unknown = sorted(set(figures) - known)
        if unknown:
            raise BadRequest(
                f"calibration: there is no figure {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        origins = {**dict(self.origins), **dict.fromkeys(figures, origin)}
        kept = {name: where for name, where in origins.items() if where is not Origin.ASSUMPTION}
        changes: dict[str, Any] = {**figures, "origins": tuple(sorted(kept.items()))}
        return replace(self, **changes)

    def to_json(self) -> dict[str, JsonValue]:
        """All figures in the form of the module docstring."""
        values = asdict(self)
        return {
            "schema_version": _SCHEMA_VERSION,
            "figures": {
                name: {"value": values[name], "origin": self.origin_of(name).value}
                for name in (*self.bounds(), "matmul_dtype")
            },
        }

    @classmethod
    def from_json(cls, raw: JsonValue, *, where: str) -> Self:
        """The calibration that ``to_json`` wrote.

        Args:
            raw: parsed JSON.
            where: start of the message of an error.

        Raises:
            BadRequest: another form, an unknown figure, or one outside its bounds.
        """
        form = convert(raw, _Form, error=BadRequest, name=where)
        if form.schema_version != _SCHEMA_VERSION:
            raise BadRequest(
                f"{where}: schema_version is {form.schema_version}; this program reads "
                f"{_SCHEMA_VERSION}"
            )
        whole = {one.name for one in fields(cls) if one.type == "int"}
        found = cls()
        for name, figure in form.figures.items():
            is_text = isinstance(figure.value, str)
            if is_text != (name == "matmul_dtype") or (
                name in whole and not isinstance(figure.value, int)
            ):
                raise BadRequest(f"{where}: $.figures.{name}.value is of another type")
            try:
                found = found.with_figures(figure.origin, **{name: figure.value})
            except BadRequest as error:
                raise BadRequest(f"{where}: {error}") from error
        return found


class _FigureForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    value: int | float | str
    origin: Origin = Origin.ASSUMPTION


class _Form(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema_version: int
    figures: dict[str, _FigureForm]


DEFAULTS = Calibration()
"""Today's assumptions."""
