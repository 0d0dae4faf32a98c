"""The local program of one stage: what every rank of the stage executes, as data.

All ranks of a stage run the same program; where a rank's coordinate matters the program says so
(``CoordinateInt``, and the group of a ``Collective``). A program holds no tensor and needs no
torch: the cost model prices it, the dry run counts it, the runtime turns it into code.

One step of a stage is::

    prologue                       once, on the rank's whole batch: what every micro-batch shares
    forward(m), backward(m)        as the schedule orders; ``accumulators`` are summed over m
    backward_final(m)              the last micro-batch: adds the sums, reduces the gradients
    tied exchange, finalize_tied   gradients of parameters that live on several stages
    optimizer step                 on ``ParameterSlot.optimized``
    publish                        ZeRO 1 and 2: gather the updated shards
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from meshwright.graph.opgraph import Literal, Ref, TensorSpec

__all__ = [
    "SUMMED",
    "Collective",
    "CollectiveKind",
    "Compute",
    "CoordinateInt",
    "DataSlot",
    "Function",
    "Instruction",
    "LocalArg",
    "ParameterSlot",
    "ShardSpec",
    "StageProgram",
    "TiedExchange",
    "Transfer",
    "ZeroShard",
]


SUMMED = -1
"""Stands for the batch dim of a result that is summed over micro-batches."""


class CollectiveKind(StrEnum):
    """Collectives, all along dim 0 of their operand."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    """``(n, ...)`` to ``(group n, ...)``, rank order."""
    REDUCE_SCATTER = "reduce_scatter"
    """``(group n, ...)`` to ``(n, ...)``."""
    ALL_TO_ALL = "all_to_all"
    """``(group n, ...)`` to the same shape, block i going to rank i."""
    HALO = "halo"
    """Rows for both neighbors, inside an operator; the runtime lacks it."""
    RING = "ring"
    """Blocks passed on from rank to rank until each was everywhere, beside the operator's work;
    the runtime lacks it."""


@dataclass(frozen=True, slots=True)
class CoordinateInt:
    """An integer argument that depends on the rank: ``offset + scale * position``.

    ``position`` is the rank's row-major position along ``axes``.
    """

    axes: tuple[str, ...]
    scale: int
    offset: int = 0


LocalArg = Ref | Literal | CoordinateInt | int | float | bool | str | None | tuple["LocalArg", ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """One local operator: an ATen overload, or ``"meshwright.NAME"``, a kernel of the runtime."""

    target: str
    args: tuple[LocalArg, ...]
    kwargs: tuple[tuple[str, LocalArg], ...] = ()
    outputs: tuple[int | None, ...]
    """Program values, one for each tensor returned; ``None`` where it is not used."""
    op_index: int = -1
    """The operator of the OpGraph it comes from; -1 for glue."""
    segment: int = -1
    flop: int = 0
    """Of this rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One collective of all ranks that differ only along ``axes``."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    """In mesh order; the group's ranks are row-major over them."""
    reduction: str = ""
    """``sum`` or ``max`` where the kind reduces."""
    input: int
    output: int
    num_bytes: int
    """Full payload: all-reduce the buffer, all-gather the result, reduce-scatter and
    all-to-all the operand."""
    segment: int = -1
    cause: str = ""
    """``tp``, ``dp_gradient``, ``zero_gather``, ``loss``...: for the breakdown."""


Instruction = Compute | Collective


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """Straight-line code. A collective may be awaited as late as its first use."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    body: tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """How a full tensor is cut: for each dim its factors, outermost first, and who splits each.

    ``factors[d]`` is ``((size, axes), ...)``; the sizes multiply to the dim's size (an empty tuple
    stands for a dim that is not factored and not split). A rank keeps, of every factor, the
    block at its row-major position along ``axes``.
    """

    factors: tuple[tuple[tuple[int, tuple[str, ...]], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShard:
    """A parameter cut into equal chunks along one dim over ``dp_shard``, the last one padded."""

    dim: int
    chunk: int
    """Rows each rank holds, padding included: ``ceil(rows / ranks)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSlot:
    """One parameter of the stage."""

    name: str
    full: TensorSpec
    shard: ShardSpec
    """From the full tensor to this rank's tensor before ZeRO."""
    zero_stage: int
    zero: ZeroShard | None
    """Where ``zero_stage`` is 1 or more."""
    local: int
    """Value: the tensor operators compute with, before ZeRO sharding."""
    stored: int
    """Value the rank keeps between steps: ``local``, or with ZeRO 3 its chunk."""
    optimized: int
    """Value the optimizer updates: ``local``, or from ZeRO 1 on its chunk."""
    gradient: int | None
    """Value in the outputs of ``backward_final`` or ``finalize_tied``, of the shape of
    ``optimized``; ``None`` for a parameter the loss does not depend on."""
    replicated_axes: tuple[str, ...]
    """Axes along which ranks hold equal copies (for norms and checkpoints)."""
    offload: bool = False
    """The optimizer's own copy and its state live in the host's memory, where it steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSlot:
    """A buffer, constant or data input of the stage."""

    name: str
    role: str
    """``buffer``, ``constant`` or ``data``."""
    full: TensorSpec
    shard: ShardSpec
    """Over mesh axes only; micro-batches are cut from the result."""
    value: int
    """The tensor of one micro-batch, read by ``forward`` and ``backward``."""
    batch_value: int
    """The tensor of all micro-batches, read by ``prologue``; equals ``value`` where the input
    has no batch dim."""
    batch_dim: int | None
    """Dim that micro-batches cut into equal runs; ``None`` where they share the tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A value one stage computes and another needs, between ranks of equal coordinate."""

    source_stage: int
    target_stage: int
    source_value: int
    """Value number in the source stage's program."""
    target_value: int
    """Value number in the target stage's program."""
    source_phase: str
    """``forward`` or ``backward``: which function produces it."""
    target_phase: str
    num_bytes: int
    tag: int
    """Unique within the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TiedExchange:
    """A parameter on several stages: each sends its summed gradient to the others and adds."""

    name: str
    accumulator: int
    """Value in ``backward_final``'s outputs."""
    total: int
    """Value in ``finalize_tied``'s inputs."""
    stages: tuple[int, ...]
    """All stages that hold it, this one included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgram:
    """Everything the ranks of one stage do in a step; see the module docstring."""

    stage: int
    values: tuple[TensorSpec, ...]
    """Local shape, dtype and strides of every value of the program."""
    parameters: tuple[ParameterSlot, ...]
    inputs: tuple[DataSlot, ...]
    prologue: Function
    forward: Function
    backward: Function
    """Outputs: gradient transfers and ``accumulators``."""
    backward_final: Function
    """Reads the running sums (``running_sums``) too where there are several micro-batches."""
    finalize_tied: Function
    publish: Function
    """Inputs: ``optimized`` values; outputs: new ``local`` values, by ``published``."""
    published: tuple[tuple[str, int], ...]
    """Parameter name and the value in ``publish``'s outputs."""
    accumulators: tuple[int, ...]
    """Outputs of ``backward`` to be summed over micro-batches."""
    running_sums: tuple[int, ...]
    """Inputs of ``backward_final`` that hold those sums, in the same order."""
    saved: tuple[int, ...]
    """Values ``forward`` returns and ``backward`` reads, kept for each micro-batch in flight."""
    prologue_values: tuple[int, ...]
    """Outputs of ``prologue`` that ``forward`` and ``backward`` read."""
    incoming: tuple[Transfer, ...]
    outgoing: tuple[Transfer, ...]
    tied: tuple[TiedExchange, ...]
    loss: int | None
    """Value in ``forward``'s outputs; summed over micro-batches, already reduced over the mesh."""
    outputs: tuple[tuple[str, int, ShardSpec, int | None], ...]
    """Other results of the module: name, value, how it is cut, and its batch dim, along which
    micro-batches are concatenated (``None``: equal in all of them; ``SUMMED``: their sum)."""
    buffer_updates: tuple[tuple[str, int], ...]
    """Buffer name and the value in ``forward``'s outputs."""
    depth: int | None = None
    """Stages on the longest path from this one to an end of the stage graph, itself included: so
    far ahead 1F1B runs forwards; ``None``: as many as there are to the last stage."""
    notes: tuple[str, ...] = ()
    """Operators that are replicated because they have no rule, and the like."""
