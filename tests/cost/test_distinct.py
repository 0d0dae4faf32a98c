"""Times summed over distinct nodes are, bit for bit, those summed over all."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from meshwright.cluster import parse_cluster
from meshwright.cost.columns import BACKWARD, FORWARD, PROLOGUE, Columns, FloatArray, sums_by
from meshwright.cost.distinct import SegmentSums, node_kinds
from meshwright.cost.model import StepCostModel
from meshwright.cost.table import CostTable, Split
from meshwright.cost.work import Family
from meshwright.graph.analyzed import analyze_graph
from meshwright.graph.simplify import with_explicit_factories
from meshwright.plans.plan import AXIS_NAMES, JobSpec, Recompute
from tests.cost.graphs import zoo
from tests.cost.test_unfold import by_segment

GPT = "tiny-gpt?num_layers=8&hidden=32&num_heads=4&vocab_size=64&seq_len=8"
SIZES = {**dict.fromkeys(AXIS_NAMES, 1), "dp_shard": 2, "tp": 2}


@cache
def model_of(reference: str) -> StepCostModel:
    found = analyze_graph(with_explicit_factories(zoo(reference, 16)))
    return StepCostModel(
        found.analysis,
        found.segmentation,
        found.labels,
        cluster=parse_cluster("8xh100"),
        job=JobSpec(global_batch=16),
        periods=found.periods,
    )


def table_of(reference: str, kind: str = "tensor") -> CostTable:
    model = model_of(reference)
    return model.table_of_segments(by_segment(model, kind), {**SIZES, "micro": 4})


def times_of_all_nodes(table: CostTable, split: Split, model: StepCostModel) -> FloatArray:
    """(nodes, 2) device time and communication time, node by node."""
    (roofline,) = model.pricer.rooflines.values()
    nodes, sent, weights = table.columns.nodes, table.columns.collectives, table.weights(split)
    is_backward = nodes.family == Family.ATTENTION_BACKWARD
    is_attention = (nodes.family == Family.ATTENTION) | is_backward
    attended = np.where(is_attention, nodes.flop_factor, 1.0)
    device_s = roofline.device_time_s(
        nodes.flop * weights[nodes.flop_scale] * attended, nodes.num_bytes @ weights
    )
    device_s = np.where(is_backward, device_s / roofline.kernels.attention_backward, device_s)
    communication_s = np.zeros(len(device_s))
    for row, node in enumerate(sent.node.tolist()):
        kind, axes = sent.groups[int(sent.group[row])]
        communication_s[node] += model.pricer.prices.time_s(
            kind,
            sent.num_bytes[row] * weights[sent.scale[row]],
            axes=table.actual_axes(axes),
            axis_sizes=split.sizes,
            num_stages=split.num_stages,
        )
    return np.stack([device_s, communication_s], axis=1)


@pytest.mark.parametrize("kind", ["data", "tensor", "sequence"])
@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.FULL])
@pytest.mark.parametrize("reference", [GPT, "tiny-t5", "tiny-moe"])
def test_segment_times_are_sums_over_all_nodes(
    reference: str, recompute: Recompute, kind: str
) -> None:
    model, table = model_of(reference), table_of(reference, kind)
    split = Split(axis_sizes=tuple(SIZES.items()), num_microbatches=4, num_stages=2)
    policies = (recompute,) * table.num_segments
    (roofline,) = model.pricer.rooflines.values()

    found = table.segment_times(split, policies, roofline=roofline, prices=model.pricer.prices)

    nodes, count = table.columns.nodes, table.num_segments + 1
    device_s, communication_s = times_of_all_nodes(table, split, model).T
    again = table.activations(policies).recomputed
    forward = np.flatnonzero(nodes.phase == FORWARD)
    late = np.concatenate([np.flatnonzero(nodes.phase == BACKWARD), again])
    for rows, amounts, times_s in (
        (forward, device_s, found.forward_s),
        (late, device_s, found.backward_s),
        (forward, communication_s, found.forward_communication_s),
        (late, communication_s, found.backward_communication_s),
    ):
        expected_s = sums_by(nodes.segment[rows] % count, amounts[rows], count)[:-1]
        assert expected_s.tolist() == times_s.tolist()
    once = nodes.phase == PROLOGUE
    assert float(device_s[once].sum() + communication_s[once].sum()) == found.prologue_s


def test_layers_of_a_deep_model_are_few_kinds() -> None:
    columns = table_of(GPT).columns
    kinds = node_kinds(columns)

    assert kinds.count < len(columns.nodes.flop) / 4
    assert columns.nodes.flop.tolist() == kinds.flop[kinds.kind_of_node].tolist()
    assert columns.nodes.num_bytes.tolist() == kinds.num_bytes[kinds.kind_of_node].tolist()


def test_nodes_that_send_unlike_amounts_are_of_unlike_kinds() -> None:
    columns = table_of(GPT).columns
    sent = columns.collectives
    twins = np.flatnonzero(
        (sent.num_bytes == sent.num_bytes[0]) & (np.diff(sent.node, prepend=-1) > 0)
    )
    more = sent.num_bytes.copy()
    more[twins[0]] += 1.0
    changed = replace(columns, collectives=replace(sent, num_bytes=more))

    assert node_kinds(columns).count + 1 == node_kinds(changed).count


def test_collectives_out_of_order_make_every_node_a_kind() -> None:
    columns = table_of(GPT).columns
    sent = columns.collectives
    backwards: Columns = replace(
        columns,
        collectives=replace(
            sent,
            node=sent.node[::-1].copy(),
            group=sent.group[::-1].copy(),
            num_bytes=sent.num_bytes[::-1].copy(),
            scale=sent.scale[::-1].copy(),
        ),
    )
    kinds = node_kinds(backwards)

    assert len(columns.nodes.flop) == kinds.count
    assert len(sent.node) == len(kinds.collectives.node)


def test_sums_of_segments_and_of_free_operators() -> None:
    """Segments 0 and 2 have nodes of kinds 0, 1; segment 1 has kind 1; one node is in none."""
    sums = SegmentSums(
        np.array([0, 1, 1, 0, 0, 1]),
        np.array([0, 0, 1, -1, 2, 2]),
        num_launches=np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        count=3,
    )

    assert [11.0, 10.0, 11.0, 1.0] == sums.of(np.array([1.0, 10.0])).tolist()
    assert [3.0, 3.0, 11.0, 4.0] == sums.num_launches.tolist()
