"""Tables from short graphs are those from whole ones, number by number."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import pytest

from meshwright.cluster import parse_cluster
from meshwright.cost import tabulate
from meshwright.cost.choice import Choice
from meshwright.cost.columns import Columns
from meshwright.cost.model import StepCostModel
from meshwright.cost.op_work import OpWorks
from meshwright.cost.table import CostTable, Split
from meshwright.cost.unfold import NotPeriodic, unfolded
from meshwright.cost.write_columns import columns_of
from meshwright.graph.analyzed import analyze_graph
from meshwright.graph.dimensions import label_dimensions
from meshwright.graph.factors import analyze_factors
from meshwright.graph.opgraph import OpGraph
from meshwright.graph.segments import find_segments
from meshwright.graph.shorten import Short
from meshwright.graph.simplify import with_explicit_factories
from meshwright.plans.plan import AXIS_NAMES, JobSpec, Recompute, ScheduleName
from meshwright.spmd.sharded import ShardedGraph
from tests.cost.graphs import zoo
from tests.graph.deep import Shared, captured, stack

GPT = "tiny-gpt?num_layers=8&hidden=32&num_heads=4&vocab_size=64&seq_len=8"
MODELS = (
    GPT,
    pytest.param("tiny-moe?num_layers=8", marks=pytest.mark.slow),
    pytest.param("tiny-t5?num_layers=9", marks=pytest.mark.slow),
    pytest.param("tiny-clip?image_num_layers=8&text_num_layers=8", marks=pytest.mark.slow),
)

Shard = dict[str, list[str]]


@cache
def models_of(reference: str) -> tuple[StepCostModel, StepCostModel]:
    return both(with_explicit_factories(zoo(reference, 16)), 16)


def both(graph: OpGraph, batch: int) -> tuple[StepCostModel, StepCostModel]:
    """The model that uses short graphs, and one that knows nothing of them."""
    cluster, job = parse_cluster("16xa100-80gb"), JobSpec(global_batch=batch)
    found = analyze_graph(graph)
    whole = analyze_factors(graph)
    segmentation = find_segments(graph, whole.rules)
    return (
        StepCostModel(
            found.analysis,
            found.segmentation,
            found.labels,
            cluster=cluster,
            job=job,
            periods=found.periods,
        ),
        StepCostModel(
            whole,
            segmentation,
            label_dimensions(whole, segmentation),
            cluster=cluster,
            job=job,
        ),
    )


def by_segment(model: StepCostModel, kind: str) -> list[Shard]:
    """For each segment the labels of one way of sharding: data, tensor, sequence, batch."""
    found = []
    for names in model.labels.by_segment:
        batch = ["batch"] if "batch" in names else []
        tensor = [
            name
            for wanted in ("heads", "experts", "vocab", "inner")
            for name in names
            if name.rstrip("0123456789") == wanted
        ]
        tensor += ["sequence"] if kind == "sequence" and "sequence" in names else []
        inside = {"data": [], "batch": batch}.get(kind, tensor)
        found.append({"dp_shard": batch, "tp": inside})
    return found


def differences(left: object, right: object, path: str = "columns") -> list[str]:
    """Paths of the arrays that are not equal in every bit."""
    if dataclasses.is_dataclass(left):
        return [
            found
            for field in dataclasses.fields(left)
            for found in differences(
                getattr(left, field.name), getattr(right, field.name), f"{path}.{field.name}"
            )
        ]
    if isinstance(left, tuple) and left and isinstance(left[0], np.ndarray):
        assert isinstance(right, tuple)
        return [
            found
            for number, (one, two) in enumerate(zip(left, right, strict=True))
            for found in differences(one, two, f"{path}[{number}]")
        ]
    if isinstance(left, np.ndarray):
        assert isinstance(right, np.ndarray)
        return [] if left.shape == right.shape and (left == right).all() else [path]
    return [] if left == right else [path]


def is_short(model: StepCostModel) -> bool:
    """Whether a short graph stands for the graph where all segments of a class are alike."""
    return model._tabulator.short((("one",), (0,) * len(model.segment_classes))) is not None


def tables(
    models: tuple[StepCostModel, StepCostModel],
    shards: Sequence[Shard],
    sizes: Mapping[str, int],
    operators: Sequence[Mapping[int, Shard]] = (),
) -> tuple[CostTable, CostTable]:
    """The table of both models."""
    first, second = (model.table_of_segments(shards, sizes, operators) for model in models)
    return first, second


def choices(num_segments: int, sizes: Mapping[str, int]) -> list[Choice]:
    """Stage cuts with policies and ZeRO stages that change from segment to segment."""
    found = []
    for pp, micro, zero in itertools.product((1, 2, 3), (1, 4), (0, 3)):
        starts = tuple(round(stage * num_segments / pp) for stage in range(pp))
        split = Split(
            axis_sizes=tuple((axis, sizes.get(axis, 1)) for axis in AXIS_NAMES),
            num_microbatches=micro,
            num_stages=pp,
        )
        policies = [list(Recompute)[(number + pp) % 3] for number in range(num_segments)]
        found.append(
            Choice(
                split=split,
                starts=starts,
                first_devices=tuple(4 * stage for stage in range(pp)),
                zero_stages=tuple(zero if number % 3 else 1 for number in range(num_segments)),
                policies=tuple(policies if zero else policies[:1] * num_segments),
                schedule=ScheduleName.ONE_F_ONE_B,
                bucket_bytes=2**16,
            )
        )
    return found


@pytest.mark.parametrize("reference", MODELS)
@pytest.mark.parametrize("kind", ["data", "tensor", "sequence", "batch"])
def test_columns_are_those_of_the_whole_graph(
    reference: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every array, in every bit; and the whole graph was not sharded for the first."""
    short, whole = models_of(reference)
    tabulated: list[int] = []

    def spied(sharded: ShardedGraph, *, scaled: bool, works: OpWorks) -> Columns:
        tabulated.append(len(sharded.analysis.graph.ops))
        return columns_of(sharded, scaled=scaled, works=works)

    monkeypatch.setattr(tabulate, "columns_of", spied)
    shards = by_segment(short, kind)
    sizes = {"dp_shard": 2, "tp": 2, "dp_replicate": 1}
    found = short._build(shards, sizes, (), scaled=False)
    expected = whole._build(shards, sizes, (), scaled=False)

    assert [] == differences(found.columns, expected.columns)
    assert len(whole.analysis.graph.ops) == tabulated[-1]
    assert 2 == len(tabulated)
    assert tabulated[0] < tabulated[1]


@pytest.mark.parametrize("reference", MODELS)
def test_steps_cost_what_they_cost_on_the_whole_graph(reference: str) -> None:
    """Time and memory by cause, under several stage cuts, policies and ZeRO stages."""
    models = models_of(reference)
    sizes = {"dp_shard": 2, "tp": 2}
    pair = tables(models, by_segment(models[0], "sequence"), sizes)
    for choice in choices(pair[0].num_segments, sizes):
        found, expected = (
            model.pricer.price(table, choice) for model, table in zip(models, pair, strict=True)
        )

        assert pytest.approx(expected.breakdown_s, rel=1e-12, abs=1e-18) == found.breakdown_s
        for cause, num_bytes in expected.memory.by_cause.items():
            assert num_bytes.tolist() == found.memory.by_cause[cause].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_is_priced_as_on_the_whole_graph(seed: int) -> None:
    """Blocks of segments in ways of their own, some with exceptions for single operators."""
    rng = random.Random(seed)
    models = models_of(GPT)
    count = len(models[0].segment_classes)
    ways = [by_segment(models[0], kind) for kind in ("tensor", "sequence", "batch")]
    shards: list[Shard] = []
    operators: list[dict[int, Shard]] = []
    while len(shards) < count:
        here = rng.choice(ways)[len(shards) : len(shards) + rng.randint(1, count)]
        number = rng.choice((None, None, 0, 1, 2))
        operators += [{} if number is None else {number: {"tp": []}} for _ in here]
        shards += here
    short, whole = tables(models, shards, {"dp_shard": 2, "tp": 2, "micro": 2}, operators)

    assert [] == differences(short.columns, whole.columns)


@pytest.mark.parametrize("depth", [6, 7, 8, 9, 12, 30])
@pytest.mark.parametrize("kind", ["data", "tensor"])
def test_any_depth_is_priced_as_on_the_whole_graph(depth: int, kind: str) -> None:
    """From stacks too shallow to be cut to deep ones."""
    models = both(stack(*(16,) * depth), 8)
    short, whole = tables(models, by_segment(models[0], kind), {"dp_shard": 2, "tp": 2})

    assert [] == differences(short.columns, whole.columns)
    assert (depth > 6) == is_short(models[0])


def test_a_block_that_differs_is_priced_as_on_the_whole_graph() -> None:
    """Two runs with something else between them."""
    models = both(stack(*(16,) * 9, 24, *(16,) * 9), 8)
    short, whole = tables(models, by_segment(models[0], "tensor"), {"dp_shard": 2, "tp": 2})

    assert [] == differences(short.columns, whole.columns)


def test_a_shared_parameter_is_left_to_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is the sum of what all blocks give, so no block can be left out."""
    refused: list[str] = []

    def spied(columns: Columns, sharded: ShardedGraph, short: Short, graph: OpGraph) -> Columns:
        try:
            return unfolded(columns, sharded, short, graph)
        except NotPeriodic as error:
            refused.append(str(error))
            raise

    monkeypatch.setattr(tabulate, "unfolded", spied)
    models = both(captured(Shared(9)), 8)
    short, whole = tables(models, by_segment(models[0], "tensor"), {"dp_shard": 2, "tp": 2})

    assert [] == differences(short.columns, whole.columns)
    assert is_short(models[0])
    assert ["something outside the units depends on all of them"] == refused


def test_a_mixture_with_a_cut_elsewhere_is_not_sharded_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stretches of 15 and 15 segments, then of 10 and 20: the same short graph serves both."""
    models = both(stack(*(16,) * 30), 8)
    ways = [by_segment(models[0], kind) for kind in ("tensor", "batch")]
    sizes = {"dp_shard": 2, "tp": 2}
    mixtures = [[*ways[0][:cut], *ways[1][cut:]] for cut in (15, 10)]
    models[0]._build(mixtures[0], sizes, (), scaled=False)
    monkeypatch.setattr(tabulate, "shard_graph", None)
    found = models[0]._build(mixtures[1], sizes, (), scaled=False)
    monkeypatch.undo()
    expected = models[1]._build(mixtures[1], sizes, (), scaled=False)

    assert [] == differences(found.columns, expected.columns)


def test_tables_by_class_are_tables_by_segment() -> None:
    """The same object: one table serves both."""
    model, _ = models_of(GPT)
    by_class = [{"dp_shard": ["batch"]} for _ in range(model.segmentation.num_classes)]
    shards = [by_class[number] for number in model.segment_classes]

    assert model.table(by_class, {"dp_shard": 2}) is model.table_of_segments(
        shards, {"dp_shard": 2}
    )
