"""Parameters of a stage: what each rank keeps, and the code that gathers and reduces.

ZeRO cuts a parameter's local tensor over ``dp_shard`` along one dim into equal chunks, the last one
padded with zeros. Chunks travel packed: one collective for the parameters of a segment, gradients
in buckets of about ``bucket_bytes`` in the order the backward pass finishes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.graph.opgraph import Ref, TensorSpec, contiguous_stride
from meshwright.spmd.body import Body, ValueTable
from meshwright.spmd.layout import Layout
from meshwright.spmd.program import (
    CollectiveKind,
    CoordinateInt,
    ParameterSlot,
    ShardSpec,
    ZeroShard,
)

__all__ = [
    "STEP_BYTES",
    "ZERO_AXIS",
    "LocalParameter",
    "PendingGather",
    "choose_zero_shard",
    "chunk_spec",
    "cuts_like_zero",
    "finish_gather",
    "launch_gather",
    "new_parameter",
    "reduce_bucket",
    "scatter_bucket",
    "split_scattered",
    "zero_refusal",
]

ZERO_AXIS = "dp_shard"

STEP_BYTES = 256 * 2**20
"""Most that temporaries of the optimizer's step take: it updates so much at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalParameter:
    """A parameter on one stage, before its gradient is known."""

    name: str
    full: TensorSpec
    shard: ShardSpec
    spec: TensorSpec
    """Of the local tensor before ZeRO."""
    zero_stage: int
    zero: ZeroShard | None
    local: int
    stored: int
    optimized: int
    offload: bool = False

    def slot(self, gradient: int | None, replicated_axes: tuple[str, ...]) -> ParameterSlot:
        """The program's entry."""
        return ParameterSlot(
            name=self.name,
            full=self.full,
            shard=self.shard,
            zero_stage=self.zero_stage,
            zero=self.zero,
            local=self.local,
            stored=self.stored,
            optimized=self.optimized,
            gradient=gradient,
            replicated_axes=replicated_axes,
            offload=self.offload,
        )


def choose_zero_shard(shape: tuple[int, ...], ways: int) -> ZeroShard:
    """The first dim that divides evenly over ``ways``, else the largest, padded."""
    for dim, size in enumerate(shape):
        if size % ways == 0:
            return ZeroShard(dim=dim, chunk=size // ways)
    dim = max(range(len(shape)), key=lambda d: (shape[d], -d), default=0)
    size = shape[dim] if shape else 1
    return ZeroShard(dim=dim, chunk=-(-size // ways))


def chunk_spec(spec: TensorSpec, zero: ZeroShard) -> TensorSpec:
    """One rank's chunk, padding included."""
    shape = tuple(zero.chunk if dim == zero.dim else size for dim, size in enumerate(spec.shape))
    return TensorSpec(shape=shape, dtype=spec.dtype, stride=contiguous_stride(shape))


def new_parameter(
    values: ValueTable,
    *,
    name: str,
    full: TensorSpec,
    shard: ShardSpec,
    spec: TensorSpec,
    zero_stage: int,
    zero_ways: int,
    offload: bool = False,
) -> LocalParameter:
    """Number the values of one parameter; scalars are never cut."""
    local = values.new(spec)
    if zero_stage == 0 or zero_ways == 1 or not spec.shape:
        return LocalParameter(
            name=name,
            full=full,
            shard=shard,
            spec=spec,
            zero_stage=0,
            zero=None,
            local=local,
            stored=local,
            optimized=local,
            offload=offload,
        )
    zero = choose_zero_shard(spec.shape, zero_ways)
    chunk = values.new(chunk_spec(spec, zero))
    return LocalParameter(
        name=name,
        full=full,
        shard=shard,
        spec=spec,
        zero_stage=zero_stage,
        zero=zero,
        local=local,
        stored=chunk if zero_stage == 3 else local,
        optimized=chunk,
        offload=offload,
    )


def cuts_like_zero(layout: Layout) -> bool:
    """Whether operators cut a parameter along ZeRO's axis, so that ZeRO cannot."""
    return ZERO_AXIS in layout.sharding_axes


def zero_refusal(name: str, *, zero_stage: int, segment: int) -> str:
    """Why ``cuts_like_zero`` forbids a ZeRO stage."""
    return (
        f"segment {segment}: ZeRO {zero_stage} would cut {name} along {ZERO_AXIS}, which already "
        "cuts it because an operator that reads it is sharded so; use zero_stage 0 there, or "
        f"{ZERO_AXIS} for the batch alone"
    )


# Gathering ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingGather:
    """An all-gather that is under way."""

    parameters: tuple[LocalParameter, ...]
    flat: int
    ways: int
    launched: int
    """Number of instructions that start it, counted from the body's end at launch."""


def launch_gather(
    body: Body, parameters: Sequence[LocalParameter], chunks: Sequence[int], *, ways: int
) -> PendingGather:
    """Start gathering the full tensors of ``parameters`` from their ``chunks``."""
    before = len(body.instructions)
    if len(parameters) == 1:
        elements = body.spec(chunks[0]).num_elements
        flat = body.reshape(chunks[0], (elements,))
    else:
        counts = tuple(body.spec(chunk).num_elements for chunk in chunks)
        args = (tuple(Ref(chunk) for chunk in chunks), counts)
        flat = body.one("meshwright.pack", args, (sum(counts),), parameters[0].spec.dtype)
    gathered = body.collective(
        CollectiveKind.ALL_GATHER, flat, axes=(ZERO_AXIS,), ways=ways, cause="zero_gather"
    )
    return PendingGather(
        parameters=tuple(parameters),
        flat=gathered,
        ways=ways,
        launched=len(body.instructions) - before,
    )


def finish_gather(body: Body, pending: PendingGather) -> list[int]:
    """The full tensors, one for each parameter."""
    outputs = body.compute(
        "meshwright.unpack_gathered",
        (Ref(pending.flat), pending.ways, _shards(pending.parameters)),
        tuple(
            TensorSpec(
                shape=p.spec.shape, dtype=p.spec.dtype, stride=contiguous_stride(p.spec.shape)
            )
            for p in pending.parameters
        ),
    )
    return [value for value in outputs if value is not None]


def _shards(
    parameters: Sequence[LocalParameter],
) -> tuple[tuple[tuple[int, ...], int, int], ...]:
    described = []
    for parameter in parameters:
        assert parameter.zero is not None
        shape = chunk_spec(parameter.spec, parameter.zero).shape
        described.append((shape, parameter.zero.dim, parameter.spec.shape[parameter.zero.dim]))
    return tuple(described)


# Reducing ----------------------------------------------------------------------------------------


def reduce_bucket(
    body: Body, gradients: Sequence[int], *, axes: tuple[str, ...], ways: int
) -> list[int]:
    """All-reduced ``gradients``, by one collective."""
    if ways == 1:
        return list(gradients)
    if len(gradients) == 1:
        return [body.all_reduce(gradients[0], axes=axes, ways=ways, cause="dp_gradient")]
    specs = [body.spec(gradient) for gradient in gradients]
    counts = tuple(spec.num_elements for spec in specs)
    args = (tuple(Ref(gradient) for gradient in gradients), counts)
    flat = body.one("meshwright.pack", args, (sum(counts),), specs[0].dtype)
    flat = body.all_reduce(flat, axes=axes, ways=ways, cause="dp_gradient")
    return _unpacked(body, flat, tuple(spec.shape for spec in specs))


def scatter_bucket(
    body: Body, parameters: Sequence[LocalParameter], gradients: Sequence[int], *, ways: int
) -> int:
    """The flat buffer of this rank's chunks of the summed ``gradients``."""
    chunks = [math.prod(shape) for shape, _, _ in _shards(parameters)]
    args = (tuple(Ref(gradient) for gradient in gradients), ways, _shards(parameters))
    dtype = parameters[0].spec.dtype
    flat = body.one("meshwright.pack_scatter", args, (sum(chunks) * ways,), dtype)
    return body.collective(
        CollectiveKind.REDUCE_SCATTER,
        flat,
        axes=(ZERO_AXIS,),
        ways=ways,
        cause="dp_gradient",
        reduction="sum",
    )


def split_scattered(body: Body, parameters: Sequence[LocalParameter], flat: int) -> list[int]:
    """The chunks in a flat buffer of ``scatter_bucket``."""
    return _unpacked(body, flat, tuple(shape for shape, _, _ in _shards(parameters)))


def own_chunk(body: Body, parameter: LocalParameter, gradient: int) -> int:
    """This rank's chunk of a gradient that is whole on every rank."""
    assert parameter.zero is not None
    spec = chunk_spec(parameter.spec, parameter.zero)
    position = CoordinateInt((ZERO_AXIS,), 1)
    args = (Ref(gradient), parameter.zero.dim, parameter.zero.chunk, position)
    return body.one("meshwright.zero_shard", args, spec.shape, spec.dtype)


def _unpacked(body: Body, flat: int, shapes: tuple[tuple[int, ...], ...]) -> list[int]:
    dtype = body.spec(flat).dtype
    outputs = body.compute(
        "meshwright.unpack",
        (Ref(flat), shapes),
        tuple(
            TensorSpec(shape=shape, dtype=dtype, stride=contiguous_stride(shape))
            for shape in shapes
        ),
    )
    return [value for value in outputs if value is not None]
