"""The operators of a captured model, with the sizes they have on one device.

The model's joint graph is sharded for each tensor-parallel degree by the same rules that lower a
plan, then every forward operator is mapped to a family; the family is measured forward and
backward, which covers the operators autograd made of it. What runs in the backward pass and belongs
to no forward operator (sums of gradients) is mapped by itself. Operators no family covers are
named, with the traffic they stand for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from meshwright.capture import capture
from meshwright.capture.references import resolve_model
from meshwright.errors import BadRequest
from meshwright.graph.opgraph import Op, OpGraph, Phase
from meshwright.plans.plan import AXIS_NAMES
from meshwright.profiling.operators.candidate import Candidate, Dims, Direction, DtypeName
from meshwright.profiling.operators.catalog import FAMILIES
from meshwright.profiling.operators.mapping import COVERED, LocalOp, Pairs, dims_of
from meshwright.spmd.layout import MICRO
from meshwright.spmd.prepared import PreparedGraph, prepare
from meshwright.spmd.sharded import OpNode, ShardedGraph, shard_graph
from meshwright.spmd.specs import LocalSpecs

__all__ = ["ModelOperators", "Uncovered", "model_operators"]

_TENSOR_KINDS = ("heads", "experts", "vocab", "inner")
"""Dimension classes tensor parallelism cuts, most wanted first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncovered:
    """Operators of one kind that no family stands for."""

    target: str
    phase: str
    count: int
    traffic_fraction: float
    """Of the bytes all operators of the step move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOperators:
    """What a model asks to be measured."""

    candidates: tuple[Candidate, ...]
    uncovered: tuple[Uncovered, ...]
    """Most traffic first."""


def model_operators(
    reference: str,
    *,
    tensor_parallel: Sequence[int],
    batch: int,
    seq_len: int | None,
    dtypes: Sequence[DtypeName],
) -> ModelOperators:
    """Every distinct operator of a training step of the model, and its AdamW updates.

    Args:
        reference: As ``meshwright.capture.references.resolve_model`` takes it.
        tensor_parallel: Degrees; 1 means whole.
        batch: Samples on the device.
        seq_len: Tokens of a sample; None means the model's own.
        dtypes: To measure each in; the sizes do not depend on them.

    Raises:
        BadModel: The reference names nothing.
        BadRequest: A degree cuts nothing.
    """
    source = resolve_model(reference)
    args, kwargs = source.example_inputs(batch, seq_len, "meta")
    graph = capture(source.build(), args, kwargs, name=reference).graph
    prepared = prepare(graph)
    found: dict[object, Candidate] = {}
    for degree in tensor_parallel:
        sharded = _sharded(prepared, degree)
        for op, dims, directions, role in _operators(prepared, sharded):
            for direction in directions:
                for dtype in dtypes:
                    candidate = FAMILIES[op].candidate(
                        dims, direction, dtype, model=reference, tp=degree, role=role
                    )
                    found.setdefault(candidate.key, candidate)
    return ModelOperators(candidates=tuple(found.values()), uncovered=_uncovered(prepared))


def _sharded(prepared: PreparedGraph, degree: int) -> ShardedGraph:
    sizes = {axis: 1 for axis in AXIS_NAMES} | {MICRO: 1, "tp": degree}
    shards = [{"tp": _labels(names)} for names in prepared.labels.by_segment]
    sharded = shard_graph(
        prepared.analysis, prepared.segmentation, prepared.labels, shards=shards, axis_sizes=sizes
    )
    if degree > 1 and not any(
        axis == "tp"
        for node in sharded.nodes
        if isinstance(node, OpNode)
        for axis, _ in node.choice
    ):
        raise BadRequest(
            f"--tp {degree}: nothing of {prepared.graph.name} can be cut {degree} ways; "
            "give a divisor of its heads or layer sizes"
        )
    return sharded


def _labels(names: Mapping[str, int]) -> list[str]:
    return [name for kind in _TENSOR_KINDS for name in names if name.rstrip("0123456789") == kind]


def _operators(
    prepared: PreparedGraph, sharded: ShardedGraph
) -> Iterator[tuple[str, Dims, tuple[Direction, ...], str]]:
    """Family, sizes, directions and role of everything a family covers."""
    graph = prepared.graph
    specs = LocalSpecs(sharded)
    pairs = Pairs.of(graph)
    covered = _covered_forward(prepared)
    for node in sharded.nodes:
        if not isinstance(node, OpNode):
            continue
        op = graph.ops[node.op]
        if op.phase is Phase.BACKWARD and op.forward_op in covered:
            continue
        local = LocalOp(
            op=op,
            operands=tuple(map(specs.spec, node.operands)),
            results=tuple(specs.spec(value) for value in node.results if value is not None),
        )
        mapped = dims_of(local, pairs)
        if mapped is None or mapped is COVERED:
            continue
        name, dims = mapped
        directions = tuple(
            direction
            for direction in FAMILIES[name].directions
            if direction is Direction.FWD or op.phase is Phase.FORWARD
        )
        yield name, dims, directions, op.module_path
    yield from _updates(prepared, sharded, specs)


def _updates(
    prepared: PreparedGraph, sharded: ShardedGraph, specs: LocalSpecs
) -> Iterator[tuple[str, Dims, tuple[Direction, ...], str]]:
    """AdamW over the parameters of each kind of segment, and of the whole model."""
    graph = prepared.graph
    parameters = {item.value for item in graph.parameters}
    groups: list[tuple[str, set[int]]] = []
    for segment in prepared.segmentation.representatives():
        read = {value for index in segment.forward_ops for value in graph.ops[index].inputs}
        groups.append((f"segment class {segment.segment_class}", read & parameters))
    groups.append(("all parameters", parameters))
    for role, values in groups:
        counts = [specs.spec(sharded.inputs[value]).num_elements for value in values]
        if not counts:
            continue
        for variant in ("fused", "foreach"):
            dims = {"numel": sum(counts), "num_tensors": len(counts), "variant": variant}
            yield "adamw", dims, (Direction.UPDATE,), role


def _whole(graph: OpGraph, op: Op) -> LocalOp:
    return LocalOp(
        op=op,
        operands=tuple(graph.values[value] for value in op.inputs),
        results=tuple(graph.values[value] for value in op.results),
    )


def _covered_forward(prepared: PreparedGraph) -> set[int | None]:
    """Forward operators a family stands for, views among them: their backward is covered too."""
    graph = prepared.graph
    pairs = Pairs.of(graph)
    return {
        op.index
        for op in graph.ops
        if op.phase is Phase.FORWARD
        and (prepared.analysis.rules[op.index].is_view or dims_of(_whole(graph, op), pairs))
    }


def _uncovered(prepared: PreparedGraph) -> tuple[Uncovered, ...]:
    graph = prepared.graph
    pairs = Pairs.of(graph)
    covered = _covered_forward(prepared)
    counts: Counter[tuple[str, str]] = Counter()
    traffic: Counter[tuple[str, str]] = Counter()
    for op in graph.ops:
        if prepared.analysis.rules[op.index].is_view or op.index in covered:
            continue
        if op.phase is Phase.BACKWARD and (
            op.forward_op in covered or dims_of(_whole(graph, op), pairs)
        ):
            continue
        key = (op.target, str(op.phase))
        counts[key] += 1
        traffic[key] += op.bytes_read + op.bytes_written
    total_bytes = sum(op.bytes_read + op.bytes_written for op in graph.ops)
    rows = [
        Uncovered(
            target=target,
            phase=phase,
            count=count,
            traffic_fraction=traffic[target, phase] / max(1, total_bytes),
        )
        for (target, phase), count in counts.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.traffic_fraction, row.target)))
