"""ParallelPlan: the narrow waist between what decides and what executes.

A plan names a mesh, cuts the segments of the graph into stages, and says for each class of equal
segments which dimension classes each mesh axis shards, how much the segment recomputes and which
ZeRO stage its parameters use. From that and the factor rules follows the placement of every
tensor; nothing in a plan depends on module names.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from meshwright.strict_json import FieldError

__all__ = [
    "AXIS_NAMES",
    "SCHEMA_VERSION",
    "SOURCES",
    "CommunicationOptions",
    "Compression",
    "GraphReference",
    "JobSpec",
    "Mesh",
    "OptimizerName",
    "OptimizerSpec",
    "ParallelPlan",
    "Precision",
    "Prediction",
    "Provenance",
    "Recompute",
    "ScheduleName",
    "SegmentPlan",
    "Stage",
]

SCHEMA_VERSION = 1

AXIS_NAMES = ("dp_replicate", "dp_shard", "cp", "ep", "tp")
"""Mesh axes inside a stage, outermost first: neighboring devices differ in ``tp``. ``pp`` is the
axis of stages and lies outside them. Device order inside a stage is row-major over these axes."""


SOURCES = ("measured", "learned", "analytic")
"""Where an estimate may come from."""

_Count = Annotated[int, Meta(ge=1)]
_Index = Annotated[int, Meta(ge=0)]
_Amount = Annotated[float, Meta(ge=0)]
_Decay = Annotated[float, Meta(ge=0, lt=1)]


class Precision(StrEnum):
    """Element type of parameters and activations.

    ``bf16`` and ``fp16`` keep an fp32 master copy and fp32 optimizer state. ``fp8`` is bf16 whose
    linear layers multiply in fp8 (``cost.precision``); it is priced, not run.
    """

    FP64 = "fp64"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"


class OptimizerName(StrEnum):
    """Optimizers the runtime can step."""

    ADAMW = "adamw"
    SGD = "sgd"


class Recompute(StrEnum):
    """What the backward pass computes again instead of keeping."""

    NONE = "none"
    SELECTIVE = "selective"
    """Keep the results of matrix products, convolutions and attention; recompute the rest."""
    FULL = "full"
    """Keep only what enters the segment."""


class ScheduleName(StrEnum):
    """Order of micro-batches on the stages of a pipeline."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    """1F1B with several stages on each group of devices (arXiv 2104.04473)."""
    ZB_H1 = "zb-h1"
    """1F1B with gradients of parameters put off into the bubble (arXiv 2401.10241)."""


class Compression(StrEnum):
    """How values are made smaller before they are sent."""

    NONE = "none"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    """One scale for each row."""
    TOP_K = "top-k"
    """The largest hundredth with its indices, the rest fed back into the next step's values."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a plan: immutable, strict about unknown keys, within the bounds of its fields.

    msgspec checks the bounds (``Meta``) when it reads a file; ``__post_init__`` checks the same
    ones when a part is made in Python. ``FieldError``, a ``ValueError``, says which field is out.
    """

    def __post_init__(self) -> None:
        for key, bounds in _bounds(type(self)):
            value = getattr(self, key)
            if value is None:
                continue
            # Negated, so that a NaN is out of bounds.
            if bounds.ge is not None and not value >= bounds.ge:
                raise FieldError(key, f"must be at least {bounds.ge}, got {value!r}")
            if bounds.le is not None and not value <= bounds.le:
                raise FieldError(key, f"must be at most {bounds.le}, got {value!r}")
            if bounds.lt is not None and not value < bounds.lt:
                raise FieldError(key, f"must be less than {bounds.lt}, got {value!r}")


@functools.cache
def _bounds(part: type[_Part]) -> tuple[tuple[str, Meta], ...]:
    """The bounded fields of ``part``; an optional field is bounded where it is given."""
    found: list[tuple[str, Meta]] = []
    for key, hint in typing.get_type_hints(part, include_extras=True).items():
        optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
        for choice in typing.get_args(hint) if optional else (hint,):
            metadata = getattr(choice, "__metadata__", ())
            found.extend((key, item) for item in metadata if isinstance(item, Meta))
    return tuple(found)


class Mesh(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many devices lie along each axis."""

    pp: _Count = 1
    dp_replicate: _Count = 1
    dp_shard: _Count = 1
    cp: _Count = 1
    ep: _Count = 1
    tp: _Count = 1

    @property
    def stage_shape(self) -> tuple[int, ...]:
        """Sizes of ``AXIS_NAMES``."""
        return (self.dp_replicate, self.dp_shard, self.cp, self.ep, self.tp)

    @property
    def num_devices_per_stage(self) -> int:
        """Devices of one stage."""
        return self.dp_replicate * self.dp_shard * self.cp * self.ep * self.tp

    @property
    def num_devices(self) -> int:
        """Devices of the whole plan."""
        return self.pp * self.num_devices_per_stage

    @property
    def data_parallel(self) -> int:
        """Ways the batch is split outside expert segments."""
        return self.dp_replicate * self.dp_shard * self.ep


class Stage(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Segments that run on one run of devices."""

    first_segment: _Index
    last_segment: _Index
    """Inclusive."""
    first_device: _Index
    num_devices: _Count
    branches: list[tuple[_Index, _Index]] = []
    """Further runs of segments of the stage, first and last: parts of other branches of the
    graph."""
    mesh: dict[str, _Count] = {}
    """Mesh axis to its size on this stage, where it is not the plan's."""
    batch_shares: list[_Amount] = []
    """Share of the samples each host of the stage takes, in the order of hosts; they sum to 1.
    Empty: every device takes the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_segment < self.first_segment:
            raise FieldError(
                "last_segment",
                f"is {self.last_segment}, before first_segment {self.first_segment}",
            )

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Runs of segments, first and last, ascending."""
        return tuple(sorted([(self.first_segment, self.last_segment), *self.branches]))

    @property
    def segments(self) -> tuple[int, ...]:
        """Segment numbers of the stage, ascending."""
        return tuple(number for first, last in self.runs for number in range(first, last + 1))

    @property
    def num_segments(self) -> int:
        """Segments of the stage, at least 1."""
        return len(self.segments)

    @property
    def devices(self) -> range:
        """Device numbers of the stage."""
        return range(self.first_device, self.first_device + self.num_devices)


class SegmentPlan(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the segments of one class do, or some of them."""

    segment_class: _Index
    at: list[tuple[_Index, _Index]] | None = None
    """Runs of segment numbers, first and last, whose segments of the class the entry is for;
    ``None``: all that no other entry names."""
    name: str
    """Module path of the first such segment, for the reader only."""
    shard: dict[str, list[str]]
    """Mesh axis to labels of dimension classes, most wanted first: on each axis an operator is
    sharded along the first of these classes it has a dimension of. With ``experts`` before
    ``batch`` only operators that apply experts' weights follow the experts. ``ring`` is no class:
    attention cut along the sequence passes keys and values around."""
    zero_stage: Annotated[int, Meta(ge=0, le=3)] = 0
    """0 replicate, 1 shard optimizer state, 2 also gradients, 3 also parameters; over
    ``dp_shard``."""
    recompute: Recompute = Recompute.NONE
    operators: dict[str, dict[str, list[str]]] = {}
    """Exceptions from ``shard``: number of an operator within the segment (its position, from 0, in
    the segment's forward operators followed by its backward operators, each in execution order)
    to axis to labels; an axis it does not name follows ``shard``, an empty list replicates."""
    offload: bool = False
    """Optimizer state lives in the host's memory, where the optimizer steps."""

    @property
    def operators_by_number(self) -> dict[int, dict[str, list[str]]]:
        """``operators`` with numbers for keys."""
        return {int(number): shard for number, shard in self.operators.items()}

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shard("shard", self.shard)
        for number, shard in self.operators.items():
            if not number.isdecimal() or str(int(number)) != number:
                raise FieldError("operators", f"has the key {number!r}; use an operator's number")
            _check_shard(f"operators.{number}", shard)


def _check_shard(field: str, shard: dict[str, list[str]]) -> None:
    for axis, labels in shard.items():
        if axis not in AXIS_NAMES:
            known = ", ".join(AXIS_NAMES)
            raise FieldError(field, f"has the unknown axis {axis!r}; known axes: {known}")
        if len(set(labels)) < len(labels) or "" in labels:
            raise FieldError(f"{field}.{axis}", f"has an empty label or one twice: {labels}")


class OptimizerSpec(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The optimizer and its constants, in ``torch.optim``'s words."""

    name: OptimizerName = OptimizerName.ADAMW
    learning_rate: _Amount = 1e-3
    weight_decay: _Amount = 0.01
    beta1: _Decay = 0.9
    beta2: _Decay = 0.999
    epsilon: _Amount = 1e-8
    momentum: _Amount = 0.0
    """SGD only."""


class JobSpec(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the user wants computed, whatever the plan."""

    global_batch: _Count
    seq_len: _Count | None = None
    """Tokens per sequence; ``None`` where the model has its own input shape."""
    precision: Precision = Precision.FP32
    optimizer: OptimizerSpec = OptimizerSpec()


class CommunicationOptions(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How values travel."""

    bucket_bytes: _Count = 25 * 2**20
    """Gradients are reduced in buckets of about this size."""
    tensor_parallel: Compression = Compression.NONE
    """Of what collectives inside segments carry along ``tp``."""
    pipeline: Compression = Compression.NONE
    """Of what passes between stages."""


class GraphReference(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which program the plan is for."""

    reference: str
    """As the user named it: ``"gpt3-175b"``, ``"package.module:callable"``, a directory."""
    graph_sha256: str
    """Of the canonical form, which holds no names."""
    num_parameters: _Index
    num_segments: _Count


class Prediction(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the cost model expects of the plan."""

    step_time_s: _Amount
    step_time_interval_s: tuple[_Amount, _Amount]
    """Interval the step time should fall into; for an analytic estimate a stated margin."""
    peak_memory_bytes: _Index
    memory_capacity_bytes: _Index
    fits: bool
    mfu: _Amount
    tokens_per_s: _Amount | None = None
    samples_per_s: _Amount
    source: list[str]
    """Any of ``measured``, ``learned``, ``analytic``."""
    sources: dict[str, Annotated[float, Meta(ge=0, le=1)]] = {}
    """Causes of time or memory to the share of their amount that is learned. One that is left out
    is analytic; one at 0 is, too, for being unlike all that was learned from."""
    breakdown: dict[str, float]
    """Seconds of the step by cause (``compute``, ``tp_communication``, ``bubble``...); they sum
    to ``step_time_s``."""
    memory_breakdown: dict[str, int]
    """Bytes on the fullest device by cause; they sum to ``peak_memory_bytes``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low_s, high_s = self.step_time_interval_s
        if not 0 <= low_s <= high_s:
            raise FieldError(
                "step_time_interval_s", f"must rise from 0 or more, got {low_s!r} to {high_s!r}"
            )
        unknown = sorted(set(self.source) - set(SOURCES))
        if unknown:
            known = ", ".join(SOURCES)
            raise FieldError("source", f"has the unknown source {unknown[0]!r}; known: {known}")


class Provenance(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the plan came from."""

    meshwright_version: str
    solver: str
    """Name of the rule or solver that proposed it."""
    level: str
    """``O1``, ``O2`` or ``manual``."""
    seed: int = 0
    pins: list[str] = []
    """What the user had decided, as ``plan --fix`` takes it."""
    allow_unrunnable: bool = False
    """Plans the runtime cannot carry could win."""
    cost_model: str = "analytic"
    """What priced it: ``analytic``, or the name of a learned model and the start of its hash."""
    planner: str = ""
    """Start of the hash of the learned planner that was asked too; empty: none was."""
    torch_version: str = ""
    created_utc: str = ""


class ParallelPlan(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A complete decision, ready to validate and, unless ``unrunnable``, to run."""

    schema_version: int = SCHEMA_VERSION
    model: GraphReference
    cluster: str
    """Shorthand or path the user gave."""
    job: JobSpec
    mesh: Mesh
    num_microbatches: _Count = 1
    schedule: ScheduleName = ScheduleName.ONE_F_ONE_B
    stages: list[Stage]
    """``mesh.pp`` of them, or with the interleaved schedule a multiple: stage i lies on the devices
    of stage i - pp."""
    segments: list[SegmentPlan]
    """At least one for each segment class, by ``segment_class``."""
    token_slices: list[_Count] = []
    """Tokens of each slice of the sequence the pipeline runs one after the other (arXiv
    2102.07988); empty: whole sequences."""
    communication: CommunicationOptions = CommunicationOptions()
    unrunnable: list[str] = []
    """Why the runtime cannot carry the plan yet, one line for each choice; empty: it can."""
    prediction: Prediction | None = None
    provenance: Provenance

    def stage_sizes(self, stage: int) -> dict[str, int]:
        """Size of each of ``AXIS_NAMES`` on a stage."""
        sizes = dict(zip(AXIS_NAMES, self.mesh.stage_shape, strict=True))
        return {axis: self.stages[stage].mesh.get(axis, size) for axis, size in sizes.items()}

    @property
    def stage_of_segment(self) -> tuple[int, ...]:
        """Stage of each segment; ``check_structure`` says whether each is in exactly one."""
        stages = {segment: i for i, stage in enumerate(self.stages) for segment in stage.segments}
        return tuple(stages[segment] for segment in sorted(stages))

    def segment_plans(self, segment_classes: Sequence[int]) -> tuple[SegmentPlan, ...]:
        """What each segment does.

        Args:
            segment_classes: class of each segment, in order.

        Raises:
            FieldError: a class has no entry, or a segment has two.
        """
        general: dict[int, SegmentPlan] = {}
        special: dict[int, SegmentPlan] = {}
        for entry in self.segments:
            if entry.at is None:
                if entry.segment_class in general:
                    raise FieldError(
                        "segments", f"have two entries without at for class {entry.segment_class}"
                    )
                general[entry.segment_class] = entry
                continue
            for number in (n for first, last in entry.at for n in range(first, last + 1)):
                if number >= len(segment_classes):
                    raise FieldError("segments", f"name segment {number}; the graph has none such")
                if segment_classes[number] != entry.segment_class:
                    continue
                if number in special:
                    raise FieldError("segments", f"have two entries for segment {number}")
                special[number] = entry
        found: list[SegmentPlan] = []
        for number, segment_class in enumerate(segment_classes):
            own = special.get(number) or general.get(segment_class)
            if own is None:
                raise FieldError(
                    "segments",
                    f"have no entry for class {segment_class} (segment {number}); add it",
                )
            found.append(own)
        return tuple(found)
