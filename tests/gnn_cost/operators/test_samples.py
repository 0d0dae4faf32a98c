"""Rows of tables and Records become graphs, or are left out for a reason."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from meshwright.cost.work import DTYPES, EdgeKind, Family
from meshwright.errors import BadRequest
from meshwright.gnn_cost.operators.samples import (
    measured_operators,
    operators_of_records,
    read_operator_table,
)
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.profiling.data import packaged_records
from tests.gnn_cost.measured import made, table

_LINEAR = {"m": 4, "n": 2, "k": 3}


def _families(graphs: MeasuredGraphs) -> list[Family]:
    return [Family(value) for value in graphs.work.family]


def test_linear_is_one_product() -> None:
    """4 x 3 times 3 x 2: 48 flop; 12 + 6 + 8 elements of two bytes."""
    graphs = made(_LINEAR).graphs

    assert [Family.MATMUL] == _families(graphs)
    assert [[1.0, 4.0, 2.0, 3.0]] == graphs.work.dims.tolist()
    assert [48.0] == graphs.work.flop.tolist()
    assert [52.0] == graphs.work.num_bytes.tolist()
    assert [1e-3] == graphs.time_s.tolist()
    assert "a100-sxm-80gb" == graphs.devices[graphs.device[0]].name


def test_backward_of_linear_is_two_products_in_order() -> None:
    """To the input 4 x 2 times 2 x 3, to the weight 3 x 4 times 4 x 2."""
    graphs = made({**_LINEAR, "direction": "bwd"}).graphs

    assert [[1.0, 4.0, 3.0, 2.0], [1.0, 3.0, 2.0, 4.0]] == graphs.work.dims.tolist()
    assert [[0], [1]] == graphs.work.edges.tolist()
    assert [EdgeKind.ORDER] == graphs.work.edge_kind.tolist()
    assert [0, 0] == graphs.graph.tolist()


def test_a_source_that_timed_one_product_of_the_backward_gets_one() -> None:
    graphs = made({**_LINEAR, "direction": "bwd", "source": "sailor_ops"}).graphs

    assert [[1.0, 4.0, 3.0, 2.0]] == graphs.work.dims.tolist()


def test_causal_attention_counts_attended_pairs() -> None:
    """2 queries after 2 earlier keys of 4: they see 3 and 4 keys, 7 pairs."""
    row = {
        **{"op": "sdpa", "b": 3, "heads": 4, "kv_heads": 2, "head_dim": 8},
        **{"seq_q": 2, "seq_k": 4, "causal": 1},
    }
    graphs = made(row, {**row, "direction": "bwd"}).graphs

    assert [Family.ATTENTION, Family.ATTENTION_BACKWARD] == _families(graphs)
    assert [12.0, 2.0, 4.0, 8.0] == graphs.work.dims[0].tolist()
    assert [4 * 12 * 8 * 7, 8 * 12 * 8 * 7] == graphs.work.flop.tolist()
    assert 2 * 3 * 8 * (2 * 2 * 4 + 2 * 4 * 2) == graphs.work.num_bytes[0]


def test_experts_are_two_grouped_products_with_what_stands_between() -> None:
    """16 tokens to 2 of 8 experts, 2 ranks: 16 pairs over 4 experts, 4 rows each."""
    graphs = made(
        {
            **{"op": "moe_ffn", "m": 16, "n": 64, "k": 32, "experts": 8, "top_k": 2, "tp": 2},
            "extra": '{"ep": 2}',
        }
    ).graphs

    assert [
        Family.GROUPED_MATMUL,
        Family.ELEMENTWISE,
        Family.GROUPED_MATMUL,
        Family.REDUCTION,
    ] == _families(graphs)
    assert [4.0, 4.0, 64.0, 32.0] == graphs.work.dims[0].tolist()
    assert [4.0, 4.0, 32.0, 32.0] == graphs.work.dims[2].tolist()
    assert 4 == graphs.work.edges.shape[1]


def test_norms_move_as_many_tensors_as_they_read_and_write() -> None:
    row = {"op": "layer_norm", "m": 5, "n": 8, "dtype": "fp32"}
    graphs = made(row, {**row, "direction": "bwd"}).graphs

    assert [Family.NORM, Family.NORM_BACKWARD] == _families(graphs)
    assert [4 * (2 * 40 + 2 * 8), 4 * (3 * 40 + 3 * 8)] == graphs.work.num_bytes.tolist()


def test_beside_products_nothing_computes_in_tf32_or_eight_bits() -> None:
    graphs = made(
        {"op": "gelu", "m": 5, "n": 8, "dtype": "tf32"}, {**_LINEAR, "dtype": "tf32"}
    ).graphs

    assert ["float32", "tf32"] == [DTYPES[place] for place in graphs.work.dtype]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**_LINEAR, "gpu": "abacus"}, "device not in the catalog"),
        ({"m": 4, "n": 2}, "k is not stated"),
        ({**_LINEAR, "m": 0}, "m is below 1"),
        ({**_LINEAR, "n": -4096}, "n is below 1"),
        ({**_LINEAR, "m": 1024.5}, "m is no whole number"),
        ({**_LINEAR, "k": 2.0**41}, "k is over 2**40"),
        ({**_LINEAR, "m": np.inf}, "m is over 2**40"),
        ({**_LINEAR, "m": 2.0**30, "n": 2.0**30}, "over 2**40 elements"),
        ({**_LINEAR, "direction": ""}, "direction is not stated"),
        ({**_LINEAR, "direction": "sideways"}, "direction is not fwd, bwd or update"),
        ({**_LINEAR, "extra": "{"}, "extra is no JSON object"),
        ({**_LINEAR, "extra": "[1]"}, "extra is no JSON object"),
        ({**_LINEAR, "extra": "[" * 100_000}, "extra is no JSON object"),
        ({**_LINEAR, "op": "divination"}, "no rule for this operator and direction"),
        ({**_LINEAR, "direction": "update"}, "no rule for this operator and direction"),
        ({**_LINEAR, "dtype": "int4_wo"}, "element types are mixed or not stated"),
        ({**_LINEAR, "extra": '{"dist": "power_law_1.2"}'}, "routing is not balanced"),
        ({**_LINEAR, "time_s": 0.0}, "no time"),
        ({**_LINEAR, "time_s": np.nan}, "no time"),
        ({**_LINEAR, "time_s": 10.0}, "time was cut off"),
        ({**_LINEAR, "source": "sailor_ops", "tp": 2}, "ranks exchange data in it"),
        (
            {**_LINEAR, "source": "aceso", "tp": 2, "extra": '{"role": "enc-MLP-GEMM-2"}'},
            "ranks exchange data in it",
        ),
        (
            {"op": "layer_norm", "m": 4, "n": 4, "source": "aceso"}
            | {"extra": '{"role": "final-layernorm"}'},
            "layer norm with other work in it",
        ),
        (
            {**_LINEAR, "dtype": "fp8", "extra": '{"kernel": "torch_flow"}'},
            "operands are quantized in it",
        ),
        ({**_LINEAR, "time_s": 1e-15}, "faster than the device's data sheet allows"),
        (
            {"op": "softmax", "m": 4, "n": 4, "source": "aceso"},
            "softmax with a mask of its own",
        ),
        (
            {"op": "copy", "m": 4, "n": 4, "extra": '{"variant": "host_to_device"}'},
            "runs over the link to the host",
        ),
    ],
)
def test_a_row_is_left_out_for_a_reason(row: dict[str, object], reason: str) -> None:
    samples = made(_LINEAR, row, _LINEAR)

    assert {reason: 1} == samples.dropped
    assert ["", reason, ""] == samples.reasons.tolist()
    assert [0, 2] == samples.rows.tolist()
    assert 2 == samples.graphs.count


@pytest.mark.parametrize(
    "row",
    [
        {"source": "aceso", "tp": 1, "extra": '{"role": "enc-MLP-GEMM-2"}'},
        {"source": "aceso", "tp": 2, "extra": '{"role": "enc-MLP-GEMM-1"}'},
        {"source": "somebody", "tp": 2, "extra": '{"role": "enc-MLP-GEMM-2"}'},
        {"dtype": "bf16", "extra": '{"kernel": "torch_flow"}'},
    ],
)
def test_a_row_that_holds_its_operator_alone_is_kept(row: dict[str, object]) -> None:
    assert 1 == made({**_LINEAR, **row}).graphs.count


def test_nothing_usable_gives_no_graphs() -> None:
    samples = made({**_LINEAR, "gpu": "abacus"})

    assert 0 == samples.graphs.count
    assert (2, 0) == samples.graphs.work.edges.shape


def test_what_is_no_number_in_extra_counts_as_nothing() -> None:
    assert 1 == made({**_LINEAR, "extra": '{"ep": "two"}'}).graphs.count


def test_mixed_operators_keep_the_order_of_the_table() -> None:
    rows = [
        {**_LINEAR, "time_s": 1.0},
        {"op": "add", "m": 2, "n": 2, "time_s": 2.0},
        {**_LINEAR, "direction": "bwd", "time_s": 3.0},
        {"op": "add", "m": 2, "n": 2, "time_s": 4.0},
    ]
    graphs = made(*rows).graphs

    assert [1.0, 2.0, 3.0, 4.0] == graphs.time_s.tolist()
    assert [0, 1, 2, 2, 3] == graphs.graph.tolist()
    assert ["linear", "element-wise", "linear", "element-wise"] == graphs.labels["kind"].tolist()


def test_shapes_are_what_a_model_fixes() -> None:
    """Batch is not part of a shape, the sizes of a weight are."""
    graphs = made(_LINEAR, {**_LINEAR, "m": 400}, {**_LINEAR, "k": 5}).graphs
    first, second, third = graphs.labels["shape"]

    assert first == second
    assert first != third


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_are_read_from_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ops{suffix}"
    columns = pa.table(table(_LINEAR, {**_LINEAR, "direction": "bwd"}))
    if suffix == ".csv":
        pa.csv.write_csv(columns, path)
    else:
        pa.parquet.write_table(columns, path)
    graphs = measured_operators(read_operator_table(path)).graphs

    assert 2 == graphs.count
    assert 3 == graphs.work.count


def test_a_table_without_times_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ops.csv"
    path.write_text("gpu,op,dtype\nt4,linear,fp16\n")

    with pytest.raises(BadRequest, match="no column time_s"):
        read_operator_table(path)


@pytest.mark.parametrize("text", ["", "\x00\x01", "gpu,op,dtype,time_s\nt4,linear,fp16,soon\n"])
def test_files_that_are_no_tables_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ops.csv"
    path.write_text(text)

    with pytest.raises(BadRequest, match=r"ops\.csv"):
        read_operator_table(path)


def test_records_of_the_package_become_graphs() -> None:
    device = made(_LINEAR).graphs.devices[0]
    cpu = replace(device, name="cpu")
    samples = operators_of_records(packaged_records(), find=lambda name: cpu)

    assert samples.graphs.count > 800
    assert {Family.CONVOLUTION, Family.OPTIMIZER, Family.NORM_BACKWARD, Family.EMBEDDING} <= set(
        _families(samples.graphs)
    )
    assert np.isfinite(samples.graphs.work.dims).all()
    assert (samples.graphs.work.num_bytes > 0).all()


def test_flop_of_records_are_those_they_state() -> None:
    """Two conventions of ours must not drift apart: the sweeps', and this one's."""
    records = [
        record
        for record in packaged_records()
        if record.kind == "operator" and record.name in ("linear", "bmm", "sdpa", "conv2d", "adam")
    ]
    device = made(_LINEAR).graphs.devices[0]
    samples = operators_of_records(records, find=lambda name: device)
    graphs = samples.graphs
    counted = np.bincount(graphs.graph, graphs.work.flop)
    stated = np.array([float(records[row].extra["flops"] or 0) for row in samples.rows])

    assert len(records) == graphs.count
    assert np.allclose(stated, counted)


@pytest.mark.skipif(
    not os.environ.get("MESHWRIGHT_OPERATOR_TABLE"),
    reason="set MESHWRIGHT_OPERATOR_TABLE to a table of measured operators",
)
def test_a_large_table_keeps_most_of_its_rows() -> None:
    samples = measured_operators(read_operator_table(Path(os.environ["MESHWRIGHT_OPERATOR_TABLE"])))

    assert samples.graphs.count > 0.8 * len(samples.reasons)
