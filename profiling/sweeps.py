"""What ranks measure together, as they are told it; needs no torch.

An axis of ``n`` ranks splits into groups of ``size`` ranks that lie ``stride`` apart: ranks
``b size stride + o + stride i`` for ``i < size``. In training all groups of an axis communicate at
the same time, so that is what is measured; one group alone is measured beside it.

``bytes`` is the FULL payload: all_reduce and broadcast: one rank's buffer; all_gather: the gathered
output; reduce_scatter: one rank's whole input; all_to_all: one rank's whole send buffer; send_recv:
the message. (The convention of nccl-tests, and of the cost model's ``Collective.num_bytes``.)
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from meshwright.errors import BadRequest

__all__ = [
    "COLLECTIVES",
    "DTYPES",
    "TORCH_NAMES",
    "CollectiveSweep",
    "GroupShape",
    "MachineSweep",
    "OverlapSweep",
    "RankJob",
    "Sweep",
    "buffer_elements",
    "groups_of",
    "shapes_for",
    "sizes_between",
]

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "send_recv",
)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Of collectives, as records name them, and as torch does."""

TORCH_NAMES = {**DTYPES, "fp64": "float64"}
"""Element types whose products are measured, likewise; ``tf32`` is none of torch's."""


class GroupShape(msgspec.Struct, frozen=True, kw_only=True):
    """Groups along one axis of the mesh."""

    size: int
    stride: int = 1


class CollectiveSweep(msgspec.Struct, frozen=True, kw_only=True, tag="collectives"):
    """Collectives over sizes and groups."""

    ops: tuple[str, ...] = COLLECTIVES
    sizes_bytes: tuple[int, ...]
    shapes: tuple[GroupShape, ...]
    dtype: str = "fp32"
    budget_s: float
    point_s: float = 0.25
    """Time to spend on one figure where the budget allows."""
    alone: bool = True
    """Measure one group alone too."""


class OverlapSweep(msgspec.Struct, frozen=True, kw_only=True, tag="overlap"):
    """Compute beside communication, all groups of one shape at the same time."""

    ops: tuple[str, ...] = ("all_reduce", "all_gather", "reduce_scatter")
    sizes_bytes: tuple[int, ...]
    shape: GroupShape
    dtype: str = "fp32"
    budget_s: float
    repeats: int = 21
    """Most; 10 at least."""


class MachineSweep(msgspec.Struct, frozen=True, kw_only=True, tag="machine"):
    """Peaks, bandwidths, launches and host copies, all ranks at the same time."""

    budget_s: float
    largest_bytes: int = 2**26
    """Of one array of the largest working set."""


Sweep = CollectiveSweep | OverlapSweep | MachineSweep


class RankJob(msgspec.Struct, frozen=True, kw_only=True):
    """What every process is told."""

    num_ranks: int
    device: str
    """``cpu`` (gloo) or ``cuda`` (NCCL)."""
    sweeps: tuple[Sweep, ...]
    num_threads: int = 1
    """Of each process."""
    timeout_s: float = 60.0
    """Longest wait of one rank for another."""
    rendezvous: str = ""
    """File in which the processes find each other; filled in by who starts them."""


def shapes_for(
    num_ranks: int, *, sizes: Sequence[int] | None = None, strides: Sequence[int] | None = None
) -> tuple[GroupShape, ...]:
    """Every group shape that splits ``num_ranks`` evenly, of the sizes and strides asked for.

    Raises:
        BadRequest: there is none.
    """
    found = tuple(
        GroupShape(size=size, stride=stride)
        for size in sorted(set(sizes or range(2, num_ranks + 1)))
        for stride in sorted(set(strides or range(1, num_ranks + 1)))
        if size > 1 and stride > 0 and num_ranks % (size * stride) == 0
    )
    if not found:
        words = [f"groups of {', '.join(map(str, sizes))}" if sizes else "groups"]
        words += [f"at strides {', '.join(map(str, strides))}"] if strides else []
        raise BadRequest(
            f"profile collectives: {' '.join(words)} do not split {num_ranks} ranks; give sizes "
            "above 1 and strides whose product divides the number of ranks"
        )
    return found


def sizes_between(min_bytes: int, max_bytes: int) -> tuple[int, ...]:
    """The powers of two from ``min_bytes`` to ``max_bytes``.

    Raises:
        BadRequest: there is none.
    """
    found = tuple(2**i for i in range(2, 41) if min_bytes <= 2**i <= max_bytes)
    if not found:
        raise BadRequest(
            f"profile collectives: no power of two from 4 B to 1 TiB lies between {min_bytes} and "
            f"{max_bytes} bytes; widen --min-bytes and --max-bytes"
        )
    return found


def groups_of(num_ranks: int, shape: GroupShape) -> tuple[tuple[int, ...], ...]:
    """The groups of ``shape``; together they hold every rank once."""
    block = shape.size * shape.stride
    assert num_ranks % block == 0, f"{shape} does not split {num_ranks} ranks"
    return tuple(
        tuple(start + offset + shape.stride * i for i in range(shape.size))
        for start in range(0, num_ranks, block)
        for offset in range(shape.stride)
    )


def buffer_elements(op: str, payload_bytes: int, *, size: int, item_bytes: int) -> tuple[int, int]:
    """Elements one rank sends and receives when ``payload_bytes`` is the full payload.

    The payload is rounded up so that every rank has an equal share.
    """
    share = -(-payload_bytes // (size * item_bytes))
    whole = share * size
    if op == "all_gather":
        return share, whole
    if op == "reduce_scatter":
        return whole, share
    if op in ("all_reduce", "broadcast", "send_recv"):
        whole = -(-payload_bytes // item_bytes)
    return whole, whole
