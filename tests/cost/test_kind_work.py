"""Tables whose operators a model prices: what it is asked, how often, and what becomes of it."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest

from meshwright.cluster import parse_cluster
from meshwright.cluster.model import Device
from meshwright.cost.columns import IntArray, scale_weights
from meshwright.cost.kind_times import batch_splits
from meshwright.cost.model import StepCostModel
from meshwright.cost.pricing import ANALYTIC, Priced, Pricing
from meshwright.cost.roofline import Roofline, roofline_of
from meshwright.cost.table import CostTable, Split
from meshwright.cost.work import DTYPES, EdgeKind, Family, OperatorWork
from meshwright.graph.analyzed import analyze_graph
from meshwright.graph.opgraph import OpGraph
from meshwright.graph.simplify import with_explicit_factories
from meshwright.plans.plan import AXIS_NAMES, JobSpec, Recompute
from meshwright.spmd.layout import MICRO
from tests.cost.graphs import two_linear, zoo

GPT = "tiny-gpt?num_layers=4&hidden=32&num_heads=4&vocab_size=64&seq_len=8"


class FlatPricer:
    """Every operator takes one time; keeps what it was asked."""

    def __init__(self, time_s: float = 1.0, trust: float = 0.25) -> None:
        self.time_s, self.trust = time_s, trust
        self.asked: list[OperatorWork] = []

    def operators(self, work: OperatorWork, device: Device) -> Priced:
        assert device.name == "h100-sxm-80gb"
        self.asked.append(work)
        return Priced(
            time_s=np.full(work.count, self.time_s), trust=np.full(work.count, self.trust)
        )


def model_of(graph: OpGraph, batch: int, pricing: Pricing = ANALYTIC) -> StepCostModel:
    found = analyze_graph(with_explicit_factories(graph))
    return StepCostModel(
        found.analysis,
        found.segmentation,
        found.labels,
        cluster=parse_cluster("8xh100"),
        job=JobSpec(global_batch=batch),
        periods=found.periods,
        pricing=pricing,
    )


@cache
def gpt() -> StepCostModel:
    return model_of(zoo(GPT, 16), 16)


@cache
def linear() -> StepCostModel:
    return model_of(two_linear(), 16)


def split_of(*, data: int = 1, micro: int = 1, tp: int = 1, stages: int = 1) -> Split:
    sizes = {**dict.fromkeys(AXIS_NAMES, 1), "dp_shard": data, "tp": tp}
    return Split(axis_sizes=tuple(sizes.items()), num_microbatches=micro, num_stages=stages)


def shards_of(model: StepCostModel) -> list[dict[str, list[str]]]:
    """The batch along ``dp_shard``; heads and inner sizes along ``tp``."""
    return [
        {
            "dp_shard": ["batch"],
            "tp": [name for name in names if name.rstrip("0123456789") in {"heads", "inner"}],
        }
        for names in model.labels.by_segment
    ]


def table_of(model: StepCostModel, split: Split) -> CostTable:
    sizes = {**split.sizes, MICRO: split.num_microbatches}
    return model.table_of_segments(shards_of(model), sizes)


def fresh(table: CostTable, splits: tuple[tuple[int, int], ...] = ()) -> CostTable:
    """The same amounts with nothing remembered."""
    return CostTable(table.columns, is_rounded=True, batch_splits=splits)


def roofline_with(pricer: FlatPricer | None, model: StepCostModel) -> Roofline:
    (device,) = model.cluster.devices
    return roofline_of(device, "float32", operators=pricer)


def rows_of(work: OperatorWork, rows: IntArray) -> Counter[tuple[float, ...]]:
    """These rows without their order."""
    table = np.column_stack([work.family, work.dtype, work.dims, work.flop, work.num_bytes])
    return Counter(map(tuple, np.round(table[rows], 6).tolist()))


def test_products_of_one_rank() -> None:
    """(16, 4) by (4, 8) and (16, 8) by (8, 2); 2 ranks and 2 micro-batches leave 4 rows.

    The backward makes 4 rows of 8 for the second's operand, and contracts 4 rows for each weight.
    """
    split = split_of(data=2, micro=2)
    table = table_of(linear(), split)
    work, kinds = table.operator_work(split, roofline_with(None, linear()))
    products = work.family == Family.MATMUL

    expected = {(1, 4, 8, 4), (1, 4, 2, 8), (1, 2, 8, 4), (1, 4, 8, 2), (1, 8, 4, 4)}
    assert expected == set(map(tuple, work.dims[products].tolist()))
    assert (2 * work.dims[products].prod(axis=1)).tolist() == work.flop[products].tolist()
    assert [DTYPES.index("float32")] * work.count == work.dtype.tolist()
    assert len(kinds) == work.count


def test_edges_join_what_meets() -> None:
    """The first product feeds the second and its weight's gradient, through views."""
    split = split_of()
    work, _ = table_of(linear(), split).operator_work(split, roofline_with(None, linear()))
    row = {tuple(dims): number for number, dims in enumerate(work.dims.tolist())}
    first, second = row[1, 16, 8, 4], row[1, 16, 2, 8]
    of_second_weight = row[1, 2, 8, 16]
    edges = {
        kind: set(zip(*work.edges[:, work.edge_kind == kind].tolist(), strict=True))
        for kind in EdgeKind
    }

    assert {(first, second), (first, of_second_weight)} <= edges[EdgeKind.DATA]
    assert (first, second) in edges[EdgeKind.ORDER]
    assert (first, of_second_weight) not in edges[EdgeKind.ORDER]
    assert set() == edges[EdgeKind.FUSION] | edges[EdgeKind.OVERLAP]
    assert (work.edges[0] != work.edges[1]).all()


def test_fusion_joins_neighbors_that_work_row_by_row() -> None:
    split = split_of()
    table = table_of(gpt(), split)
    work, _ = table.operator_work(split, roofline_with(None, gpt()))
    fused = work.edges[:, work.edge_kind == EdgeKind.FUSION]
    data = work.edges[:, work.edge_kind == EdgeKind.DATA]
    pairs = {(Family(work.family[a]), Family(work.family[b])) for a, b in fused.T.tolist()}

    assert (Family.ELEMENTWISE, Family.NORM) in pairs
    assert not {Family.MATMUL, Family.ATTENTION} & {family for pair in pairs for family in pair}
    assert set(zip(*fused.tolist(), strict=True)) < set(zip(*data.tolist(), strict=True))


@pytest.mark.parametrize(("data", "micro", "tp"), [(1, 1, 1), (2, 4, 1), (4, 2, 2), (8, 1, 2)])
def test_scaled_and_unscaled_tables_have_equal_work(data: int, micro: int, tp: int) -> None:
    """Node by node: the kinds of two tables may differ, what they stand for does not."""
    model = gpt()
    split = split_of(data=data, micro=micro, tp=tp)
    scaled = table_of(model, split)
    sizes = {**split.sizes, MICRO: micro}
    exact = model._build(shards_of(model), sizes, (), scaled=False)
    assert scaled.columns.is_scaled
    assert not exact.columns.is_scaled

    def of_nodes(table: CostTable) -> Counter[tuple[float, ...]]:
        work, kinds = table.operator_work(split, roofline_with(None, model))
        row = np.full(table.kinds.count, -1)
        row[kinds] = np.arange(work.count)
        rows = row[table.kinds.kind_of_node]
        rows = rows[rows >= 0]
        return rows_of(work, rows)

    assert of_nodes(exact) == of_nodes(scaled)


def test_rings_see_all_keys() -> None:
    """Of 8 tokens a rank of 2 has 4 queries; the last one sees one block whole, and part of its."""
    model = gpt()
    sizes = {**dict.fromkeys(AXIS_NAMES, 1), "cp": 2}
    shards = [
        {"dp_shard": ["batch"], "cp": [*(n for n in names if n == "sequence"), "ring"]}
        for names in model.labels.by_segment
    ]
    table = model.table_of_segments(shards, {**sizes, MICRO: 1})
    split = Split(axis_sizes=tuple(sizes.items()), num_microbatches=1, num_stages=1)
    work, _ = table.operator_work(split, roofline_with(None, model))
    (attention,) = np.flatnonzero(work.family == Family.ATTENTION)

    assert [16 * 4, 4, 8, 8] == work.dims[attention].tolist()
    assert 4 * 16 * 4 * 4 * 8 * 8 * (1 + 36 / 64) / 2 == work.flop[attention]


def test_a_pricer_takes_the_place_of_the_roofline() -> None:
    model, split = linear(), split_of(micro=2)
    table = fresh(table_of(model, split))
    policies = (Recompute.NONE,) * table.num_segments
    prices = model.pricer.prices
    analytic = roofline_with(None, model)
    before = table.segment_times(split, policies, roofline=analytic, prices=prices)
    pricer = FlatPricer()
    found = table.segment_times(
        split, policies, roofline=roofline_with(pricer, model), prices=prices
    )
    after = table.segment_times(split, policies, roofline=analytic, prices=prices)

    # Two products and a sum; a fill and three products. Views cost nothing.
    assert 3.0 == found.forward_s.sum()
    assert 4.0 == found.backward_s.sum() + found.free_s + found.prologue_s
    assert 0.25 * (found.forward_s + found.backward_s).sum() == found.learned_s.sum()
    assert 0.0 == before.learned_s.sum()
    assert before.forward_s.tolist() == after.forward_s.tolist()


def test_pricers_do_not_share_what_is_remembered() -> None:
    model, split = linear(), split_of()
    table = fresh(table_of(model, split))
    seconds = []
    for time_s in (1.0, 3.0, 1.0):
        roofline = roofline_with(FlatPricer(time_s), model)
        times = table.times_of_kinds(split, roofline, model.pricer.prices)
        seconds.append(times.device_s.max())

    assert [1.0, 3.0, 1.0] == seconds


def test_splits_that_cut_alike_share_a_price() -> None:
    model = gpt()
    table = fresh(table_of(model, split_of(data=2)))
    pricer = FlatPricer()
    roofline = roofline_with(pricer, model)
    for split in (split_of(data=2), split_of(data=2, stages=2), split_of(data=2, stages=4)):
        table.times_of_kinds(split, roofline, model.pricer.prices)

    assert 1 == len(pricer.asked)


def test_a_table_that_is_asked_often_is_priced_at_once() -> None:
    model = gpt()
    splits = batch_splits(16, 8)
    table = fresh(table_of(model, split_of()), splits)
    single = fresh(table_of(model, split_of()))
    pricer = FlatPricer()
    roofline = roofline_with(pricer, model)
    each = roofline_with(FlatPricer(), model)
    for data, micro in splits:
        split = split_of(data=data, micro=micro)
        some = table.times_of_kinds(split, roofline, model.pricer.prices)
        alone = single.times_of_kinds(split, each, model.pricer.prices)
        assert alone.device_s.tolist() == some.device_s.tolist()
    count = pricer.asked[0].count
    sizes = {data * micro for data, micro in splits[2:]}

    assert [count, count, len(sizes) * count] == [work.count for work in pricer.asked]
    last = pricer.asked[-1]
    assert len(sizes) == last.edges.shape[1] / pricer.asked[0].edges.shape[1]


def test_many_splits_are_the_splits_one_by_one() -> None:
    model = gpt()
    table = table_of(model, split_of())
    kinds = table._prices.work
    weights = np.array([table.weights(split_of(data=d, micro=m)) for d, m in ((1, 2), (4, 1))])
    both = kinds.at(weights)
    for number in range(2):
        alone = kinds.at(weights[number : number + 1])
        rows = slice(number * alone.count, (number + 1) * alone.count)
        assert alone.dims.tolist() == both.dims[rows].tolist()
        assert alone.flop.tolist() == both.flop[rows].tolist()
        assert alone.num_bytes.tolist() == both.num_bytes[rows].tolist()


def test_splits_that_divide_a_batch_and_the_devices() -> None:
    assert ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2)) == batch_splits(4, 2)
    assert ((1, 1), (1, 3)) == batch_splits(3, 8)
    # dp 1, 2, ... 128 of 1,536 samples on 1,024 GPUs with tp 8: 20, 18, ... 6 divisors remain.
    assert 20 + 18 + 16 + 14 + 12 + 10 + 8 + 6 == len(batch_splits(1536, 128))


def test_fusion_and_narrow_products_reach_the_work() -> None:
    model, split = gpt(), split_of()
    kinds = table_of(model, split)._prices.work
    plain = kinds.at(np.ones((1, 4)))
    changed = kinds.at(np.ones((1, 4)), pointwise_traffic=0.5, matmul_dtype="float8_e4m3fn")
    joined = np.isin(plain.family, (Family.ELEMENTWISE, Family.NORM))
    products = plain.family == Family.MATMUL

    assert (0.5 * plain.num_bytes[joined]).tolist() == changed.num_bytes[joined].tolist()
    assert plain.num_bytes[products].tolist() == changed.num_bytes[products].tolist()
    # The graph's own type has four bytes: its products are not cast.
    assert plain.dtype.tolist() == changed.dtype.tolist()


def test_equal_graphs_are_priced_once() -> None:
    """Four splits in which a micro-batch has two sizes; every row finds itself."""
    model, split = gpt(), split_of()
    kinds = table_of(model, split)._prices.work
    weights = np.array(
        [scale_weights(data_parallel=data, num_microbatches=m) for data, m in DATA_AND_MICRO]
    )
    work = kinds.at(weights)

    once, kept, place = kinds.distinct(work)

    every = np.arange(work.count)
    assert once.count < work.count * 0.6
    assert rows_of(work, kept) == rows_of(once, np.arange(once.count))
    for name in ("family", "dtype", "dims", "flop", "num_bytes"):
        assert getattr(work, name).tolist() == getattr(once, name)[place].tolist()
    assert neighbors(work, every) == neighbors(once, place)


DATA_AND_MICRO = ((1, 4), (2, 2), (4, 1), (1, 2))


def neighbors(work: OperatorWork, rows: IntArray) -> list[Counter[tuple[float, ...]]]:
    """For each of ``rows``, what comes before and after it, by kind of edge and size."""
    met: list[Counter[tuple[float, ...]]] = [Counter() for _ in range(work.count)]
    for (first, second), kind in zip(work.edges.T, work.edge_kind, strict=True):
        met[first][1, kind, work.family[second], *work.dims[second]] += 1
        met[second][0, kind, work.family[first], *work.dims[first]] += 1
    return [met[row] for row in rows]
