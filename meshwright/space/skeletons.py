"""Which skeletons a context has, and which strategies a segment may choose on one.

A skeleton fixes the mesh, the number of stages and of micro-batches. On its ``tp`` axis a segment
may be split by tensors, with the sequence or without, take other samples (``batch``), or do the
same on every device (``replicate``). On ``cp`` it is split by tokens, or images by rows; attention
then exchanges tokens for heads, or passes keys and values around a ring.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from weakref import WeakKeyDictionary

from meshwright.cost.model import StepCostModel
from meshwright.graph.dimensions import BATCH, RING, SEQUENCE, SPATIAL
from meshwright.plans.plan import Recompute
from meshwright.space.decision import Labels, Sharding, Skeleton, Strategy
from meshwright.space.search import SearchContext
from meshwright.space.uniform import (
    divisors,
    largest_divisor,
    tensor_labels,
    tensor_parallel_sizes,
)

__all__ = ["EXPERTS", "WITH_RING", "Mesh", "meshes", "shardings_for", "skeletons", "strategies_for"]

EXPERTS = "experts"

_MIN_TOKENS = 512
"""Context parallelism leaves every rank at least so many tokens of a sequence: with fewer, the
operators are too small for a device."""

_SMALL_CLUSTER = 16
"""Up to so many devices, plans that leave some idle are tried like all others."""

_MIN_ROWS = 8
"""Spatial parallelism leaves every rank at least so many rows of an image."""

WITH_RING = "+ring"
"""End of a sharding's name: along ``cp`` keys and values go around, where else heads are
exchanged."""

Mesh = tuple[tuple[tuple[str, int], ...], int]
"""Sizes of the axes that shard segments (``cp``, ``ep``, ``tp``), and the number of stages."""


def meshes(context: SearchContext) -> Iterator[Mesh]:
    """Every way of dividing the devices but for data parallelism, simple ones first."""
    found = []
    num_devices = context.cluster.num_devices
    num_segments = len(context.model.segment_classes)
    for tp in tensor_parallel_sizes(context):
        for cp in _context_sizes(context, num_devices // tp):
            for ep in _expert_sizes(context, num_devices // (tp * cp)):
                for pp in divisors(num_devices // (tp * cp * ep)):
                    if pp <= num_segments:
                        found.append(((("cp", cp), ("ep", ep), ("tp", tp)), pp))
    found.sort(key=lambda mesh: ([size > 1 for _, size in mesh[0]], mesh[1] > 1, mesh[1], mesh[0]))
    yield from found


def skeletons(context: SearchContext, *, leave_idle: bool = False) -> Iterator[Skeleton]:
    """Every skeleton the pins allow, simple ones first; the most micro-batches first.

    ``leave_idle``: instead those that a large cluster has devices left over for, which can be best
    only where devices lose more by talking than they gain.
    """
    for sizes, num_stages in meshes(context):
        yield from skeletons_of(context, (sizes, num_stages), leave_idle=leave_idle)


def skeletons_of(
    context: SearchContext, mesh: Mesh, *, leave_idle: bool = False
) -> Iterator[Skeleton]:
    """The skeletons of one mesh: data parallelism as far as the batch divides."""
    sizes, num_stages = dict(mesh[0]), mesh[1]
    inner = sizes["cp"] * sizes["ep"] * sizes["tp"]
    batch = context.batch // sizes["ep"]
    for ways in _data_sizes(context, batch, inner * num_stages, leave_idle):
        splits = divisors(batch // ways) if context.can_split_step else (1,)
        for count in reversed(splits):
            allowed = False
            for dp_shard in _shard_sizes(context, ways, inner):
                skeleton = Skeleton.of(
                    {**sizes, "dp_replicate": ways // dp_shard, "dp_shard": dp_shard},
                    num_stages=num_stages,
                    num_microbatches=count,
                    communication=context.pins.communication,
                )
                if (dp_shard > 1 or not allowed) and context.allows(skeleton):
                    allowed = True
                    yield skeleton


def _data_sizes(
    context: SearchContext, batch: int, others: int, leave_idle: bool
) -> tuple[int, ...]:
    """Ways of data parallelism beside ``others`` devices: as many as there can be, or fewer."""
    num_devices = context.cluster.num_devices
    most = largest_divisor(batch, at_most=num_devices // others)
    fewer = tuple(reversed([ways for ways in divisors(batch) if ways < most]))
    if {"dp", "dp_replicate", "dp_shard"} & dict(context.pins.sizes).keys():
        return () if leave_idle else (most, *fewer)
    if num_devices <= _SMALL_CLUSTER:
        return () if leave_idle else (most, *fewer)
    return fewer if leave_idle else (most,)


def _shard_sizes(context: SearchContext, ways: int, inner: int) -> tuple[int, ...]:
    """Sizes of ``dp_shard``: all data-parallel ranks, those of one host, and last none.

    Every one where a pin tells sharding from replicating.
    """
    if context.pins.keeps_shards:
        return tuple(reversed(divisors(ways)))
    host = max(host.num_devices for host in context.cluster.hosts)
    near = max(d for d in divisors(ways) if d <= max(1, host // inner))
    return (*sorted({ways, near} - {1}, reverse=True), 1)


def _context_sizes(context: SearchContext, at_most: int) -> tuple[int, ...]:
    sequence = context.model.labels.sequence
    if sequence is None:
        return _spatial_sizes(context, at_most)
    length = context.model.analysis.class_size[sequence]
    least = 1 if context.pins.asks_for("cp") else _MIN_TOKENS
    return tuple(
        ways
        for ways in divisors(at_most)
        if ways == 1 or (length % ways == 0 and length // ways >= least)
    )


def _spatial_sizes(context: SearchContext, at_most: int) -> tuple[int, ...]:
    """Ways of cutting images by rows, with exchanged halos."""
    rows = {
        context.model.analysis.class_size[dimension_class]
        for names in context.model.labels.by_segment
        for label, dimension_class in names.items()
        if label in _rows(names)
    }
    if not rows or not context.allow_unrunnable:
        return (1,)
    most = max(rows)
    return tuple(
        ways
        for ways in divisors(at_most)
        if ways == 1 or (most % ways == 0 and most // ways >= _MIN_ROWS)
    )


def _rows(names: Iterable[str]) -> tuple[str, ...]:
    """Labels of the outermost spatial dim."""
    for kind in SPATIAL:
        found = tuple(label for label in names if label.rstrip("0123456789") == kind)
        if found:
            return found
    return ()


def _expert_sizes(context: SearchContext, at_most: int) -> tuple[int, ...]:
    sizes = {
        context.model.analysis.class_size[dimension_class]
        for names in context.model.labels.by_segment
        for label, dimension_class in names.items()
        if label.rstrip("0123456789") == EXPERTS
    }
    return tuple(
        ways
        for ways in divisors(at_most)
        if ways == 1 or (context.batch % ways == 0 and any(size % ways == 0 for size in sizes))
    )


# Strategies --------------------------------------------------------------------------------------


def shardings_for(context: SearchContext, skeleton: Skeleton) -> tuple[Sharding, ...]:
    """Ways of sharding all segments on the skeleton's mesh, the first of them always useful."""
    sizes = skeleton.sizes
    passes_on = sizes["cp"] > 1 and context.allow_unrunnable and _has_sequence(context)
    if sizes["tp"] == 1:
        names = ["plain", "plain" + WITH_RING] if passes_on else ["plain"]
        return tuple(_sharding(context, skeleton, name) for name in names)
    names = ["tensor", "tensor+sequence", "batch", "replicate"]
    batch = context.batch
    used = sizes["dp_replicate"] * sizes["dp_shard"] * sizes["ep"] * skeleton.num_microbatches
    if batch % (used * sizes["tp"]):
        names.remove("batch")
    found = {name: _sharding(context, skeleton, name) for name in names}
    with_sequence = context.pins.sequence_parallel
    if found["tensor"].by_class == found["tensor+sequence"].by_class or with_sequence is False:
        del found["tensor+sequence"]
    elif with_sequence:
        return (found["tensor+sequence"],)
    if passes_on:
        found["tensor" + WITH_RING] = _sharding(context, skeleton, "tensor" + WITH_RING)
    return tuple(found.values())


def _has_sequence(context: SearchContext) -> bool:
    return context.model.labels.sequence is not None


def strategies_for(context: SearchContext, skeleton: Skeleton) -> tuple[Strategy, ...]:
    """Everything a segment may do on the skeleton and the pins allow."""
    can_zero = skeleton.sizes["dp_shard"] > 1 and not _splits_a_parameter(context)
    stages: tuple[int, ...] = (0, 1, 2, 3) if can_zero else (0,)
    if can_zero and context.pins.keeps_shards:
        # Without ZeRO the two kinds of data parallelism are one.
        stages = stages[1:]
    ways = (False, True) if _can_offload(context) else (False,)
    every = (
        Strategy(sharding=sharding, zero_stage=zero_stage, recompute=recompute, offload=offload)
        for sharding, offload, zero_stage, recompute in product(
            shardings_for(context, skeleton), ways, stages, Recompute
        )
    )
    return tuple(strategy for strategy in every if context.allows_strategy(strategy))


def _splits_a_parameter(context: SearchContext) -> bool:
    """Whether ``dp_shard``, which takes the batch, cuts a parameter: then ZeRO cannot."""
    analysis = context.model.analysis
    return any(
        context.model.labels.batch in leaves
        for item in analysis.graph.parameters
        for leaves in analysis.value_dims[item.value]
    )


def _can_offload(context: SearchContext) -> bool:
    """Every device has a way to its host's memory."""
    return all(host.device.to_host_bytes_per_s > 0 for host in context.cluster.hosts)


_KNOWN: WeakKeyDictionary[StepCostModel, dict[tuple[str, tuple[str, ...]], Sharding]]
_KNOWN = WeakKeyDictionary()


def _sharding(context: SearchContext, skeleton: Skeleton, name: str) -> Sharding:
    """Worked out once for a model, name and set of axes."""
    known = _KNOWN.setdefault(context.model, {})
    axes = tuple(axis for axis, size in skeleton.axis_sizes if size > 1)
    if (name, axes) not in known:
        known[name, axes] = _new_sharding(context, axes, name)
    return known[name, axes]


def _new_sharding(context: SearchContext, axes: tuple[str, ...], name: str) -> Sharding:
    by_class: list[Labels] = []
    for segment in context.model.segmentation.representatives():
        names = context.model.labels.by_segment[segment.index]
        batch = (BATCH,) if BATCH in names else ()
        experts = tuple(label for label in names if label.rstrip("0123456789") == EXPERTS)
        heads = tuple(label for label in names if label.rstrip("0123456789") == "heads")
        sequence = (SEQUENCE,) if SEQUENCE in names else ()
        attention = (RING,) if name.endswith(WITH_RING) else heads
        tensor = {
            "tensor": tuple(tensor_labels(names, sequence_parallel=False)),
            "tensor+sequence": tuple(tensor_labels(names, sequence_parallel=True)),
            "batch": batch,
        }.get(name.removesuffix(WITH_RING), ())
        wanted = {
            "dp_replicate": batch,
            "dp_shard": batch,
            "cp": (*sequence, *attention) if _has_sequence(context) else _rows(names),
            "ep": (*experts, *batch),
            "tp": tensor,
        }
        by_class.append(tuple((axis, wanted[axis]) for axis in axes))
    return Sharding(name=name, by_class=tuple(by_class))
