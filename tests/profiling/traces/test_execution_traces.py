"""PyTorch execution traces and Chakra traces, made up and made by PyTorch itself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from meshwright.errors import BadRequest
from meshwright.profiling.traces.chakra import read_chakra_json, read_chakra_protobuf
from meshwright.profiling.traces.execution_graph import ExecutionGraph
from meshwright.profiling.traces.execution_trace import read_execution_trace
from meshwright.profiling.traces.formats import TraceFormat, detect_format
from meshwright.profiling.traces.importing import import_traces
from meshwright.profiling.traces.sources import open_source

SCHEMA = "aten::op(Tensor a) -> Tensor"


def _node_1_0_1(
    number: int, name: str, parent: int, inputs: list[Any], types: list[str], outputs: list[Any],
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    shapes = [[value[3]] if word.startswith("Tensor") else [] for value, word in zip(inputs, types)]  # noqa: B905
    return {
        "id": number, "name": name, "parent": parent, "rf_id": number, "tid": 1,
        "op_schema": SCHEMA, "inputs": inputs, "input_shapes": shapes, "input_types": types,
        "outputs": outputs, "output_shapes": [], "output_types": ["Tensor(float)"] * len(outputs),
        **more,
    }  # fmt: skip


def _tensor(number: int, elements: int) -> list[Any]:
    return [number, number + 100, 0, elements, 4, "cuda:0"]


def _new_form(node: dict[str, Any]) -> dict[str, Any]:
    """The same node in schema 1.0.2 and later."""
    attributes = [
        {"name": key, "type": "uint64", "value": node[key]} for key in ("rf_id", "tid", "op_schema")
    ]
    inputs, outputs = (
        {
            "values": node[f"{side}s"],
            "shapes": node[f"{side}_shapes"],
            "types": node[f"{side}_types"],
        }
        for side in ("input", "output")
    )
    return {
        "id": node["id"], "name": node["name"], "ctrl_deps": node["parent"], "inputs": inputs,
        "outputs": outputs, "attrs": attributes,
    }  # fmt: skip


def _nodes() -> list[dict[str, Any]]:
    """Linear calls addmm, whose result relu takes; then its sum goes around in an all-reduce."""
    a, b, c = _tensor(1, 64), _tensor(2, 64), _tensor(3, 64)
    float_, scalar = "Tensor(float)", "Int"
    return [
        _node_1_0_1(2, "[pytorch|profiler|execution_graph|thread]", 1, [], [], [], op_schema=""),
        _node_1_0_1(4, "aten::addmm", 3, [a, 1], [float_, scalar], [b]),
        _node_1_0_1(3, "aten::linear", 2, [a], [float_], [b]),
        _node_1_0_1(5, "aten::relu", 2, [b], [float_], [c]),
        _node_1_0_1(
            6, "record_param_comms", 2, [c, 7, "0", 0, "allreduce", [], []],
            [float_, "Int", "String", "Int", "String", "GenericList[]", "GenericList[]"], [c],
            op_schema="",
        ),
        _node_1_0_1(7, "record_param_comms", 2, [8, "wait"], ["Int", "String"], [], op_schema=""),
    ]  # fmt: skip


def _graph(data: bytes, folder: Path, reader: Any) -> ExecutionGraph:
    path = folder / "trace.et"
    path.write_bytes(data)
    with open_source(path) as source:
        found: ExecutionGraph = reader(next(source.members()))
    return found


@pytest.mark.parametrize("new", [False, True])
def test_both_forms_of_nodes_are_read(tmp_path: Path, new: bool) -> None:
    nodes = [_new_form(node) if new else node for node in _nodes()]
    data = json.dumps({"schema": "1.0.2-chakra.0.0.4", "pid": 9, "nodes": nodes}).encode()

    graph = _graph(data, tmp_path, read_execution_trace)

    by_name = {node.name: node for node in graph.nodes if node.number != 7}
    assert ("1.0.2-chakra.0.0.4", 9, 6) == (graph.schema, graph.pid, len(graph.nodes))
    assert (4,) == by_name["aten::relu"].data  # addmm gave it; linear only holds addmm
    assert () == by_name["aten::linear"].data
    assert (5,) == by_name["record_param_comms"].data
    assert (b"[[64],[]]", b'["float","Scalar"]') == (
        by_name["aten::addmm"].dims, by_name["aten::addmm"].types,
    )  # fmt: skip
    communication = by_name["record_param_comms"].communication
    assert communication is not None
    assert ("all_reduce", 256, "fp32") == (
        communication.name, communication.input_bytes, communication.dtype,
    )  # fmt: skip
    assert [5, 1] == [
        sum(node.is_operator for node in graph.nodes),
        sum(node.communication is not None for node in graph.nodes),
    ]


def test_an_execution_trace_has_no_times_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "et.json"
    path.write_text(json.dumps({"schema": "1.0.1", "nodes": _nodes()}))

    (found,) = import_traces([path])

    assert TraceFormat.EXECUTION_TRACE == found.format
    assert () == found.records
    assert "times (an execution trace holds none)" in found.missing
    assert "the groups of its communication" in found.missing


def _small_model_traces(folder: Path) -> tuple[Path, Path]:
    """An execution trace and a profiler trace, without shapes, of the same three steps."""
    from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile, schedule

    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    et_path, trace_path = folder / "et.json", folder / "trace.json"
    observer = ExecutionTraceObserver().register_callback(str(et_path))
    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=1, warmup=1, active=3),
        execution_trace_observer=observer,
        on_trace_ready=lambda one: one.export_chrome_trace(str(trace_path)),
    ) as profiler:
        for _ in range(6):
            model(torch.ones(16, 32)).sum().backward()
            optimizer.step()
            profiler.step()
    observer.unregister_callback()
    return et_path, trace_path


def test_traces_pytorch_makes_here_are_read_and_linked(tmp_path: Path) -> None:
    """Shapes come from the execution trace, times from the profiler; together they make Records."""
    et_path, trace_path = _small_model_traces(tmp_path)
    (alone,) = import_traces([trace_path])
    profiler, graph = import_traces([trace_path, et_path])

    assert TraceFormat.KINETO == detect_format(trace_path)
    assert TraceFormat.EXECUTION_TRACE == detect_format(et_path)
    assert 3 == alone.summary["ranks"][0]["num_iterations"]
    assert [] == [record for record in alone.records if record.kind == "operator"]
    assert "trace.json" == graph.summary["linked_to"]
    assert graph.summary["num_linked"] > 50
    products = [one for one in profiler.records if one.name == "linear"]
    sizes = {(one.extra["m"], one.extra["n"], one.extra["k"]): one.num_repeats for one in products}
    assert {(16, 64, 32): 3, (16, 8, 64): 3} == sizes


def _varint(value: int) -> bytes:
    found = b""
    while value > 0x7F:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


def _field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _message(*fields: bytes) -> bytes:
    data = b"".join(fields)
    return _varint(len(data)) + data


def _attribute(name: str, number: int, value: int | str) -> bytes:
    return _field(10, _field(1, name) + _field(number, value))


def _chakra() -> bytes:
    """Metadata; a matmul of 300 us on the host; an all-reduce of 4,096 bytes, 90 us on the GPU."""
    inputs = _field(1, "[]") + _field(2, "[[8, 4]]") + _field(3, "['Tensor(float)']")
    return (
        _message(_field(2, _field(1, "schema") + _field(29, "1.0.1")))
        + _message(
            _field(1, 5), _field(2, "aten::mm"), _field(3, 4), _field(7, 300), _field(8, inputs),
            _attribute("is_cpu_op", 27, 1), _attribute("rf_id", 13, 2),
        )
        + _message(
            _field(1, 6), _field(2, "ncclKernel_AllReduce"), _field(3, 7), _field(4, _varint(5)),
            _field(5, _varint(5) + _varint(300)), _field(7, 90), _field(8, inputs),
            _attribute("is_cpu_op", 27, 0), _attribute("comm_type", 9, 0),
            _attribute("comm_size", 9, 4096),
        )
    )  # fmt: skip


def test_chakra_protobuf(tmp_path: Path) -> None:
    graph = _graph(_chakra(), tmp_path, read_chakra_protobuf)

    matmul, reduction = graph.nodes
    assert TraceFormat.CHAKRA_PROTOBUF == detect_format(tmp_path / "trace.et")
    assert "1.0.1" == graph.schema
    assert (5, "aten::mm", 2, b"[[8, 4]]", True) == (
        matmul.number, matmul.name, matmul.order, matmul.dims, matmul.on_host,
    )  # fmt: skip
    assert ((5,), (5, 300), False) == (reduction.controls, reduction.data, reduction.on_host)
    assert [300e-6, 90e-6] == pytest.approx([matmul.duration_s, reduction.duration_s])
    assert reduction.communication is not None
    assert ("all_reduce", 4096, "fp32") == (
        reduction.communication.name,
        reduction.communication.input_bytes,
        reduction.communication.dtype,
    )


def test_chakra_json(tmp_path: Path) -> None:
    nodes = [
        {"Id": 5, "Name": "aten::mm", "NodeType": 4, "runtime": 300, "is_cpu_op": True},
        {"Id": 6, "Name": "c10d::broadcast_", "NodeType": 7, "data_deps": [5], "ctrlDeps": [5]},
    ]  # fmt: skip
    graph = _graph(json.dumps({"workload_graph": nodes}).encode(), tmp_path, read_chakra_json)

    matmul, broadcast = graph.nodes
    assert (300e-6, None) == (pytest.approx(matmul.duration_s), broadcast.duration_s)
    assert ((5,), (5,)) == (broadcast.data, broadcast.controls)
    assert broadcast.communication is not None
    assert "broadcast" == broadcast.communication.name


@pytest.mark.parametrize("cut", [1, 5, 40, 120])
def test_chakra_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    with pytest.raises(BadRequest, match="damaged"):
        _graph(_chakra()[:-cut], tmp_path, read_chakra_protobuf)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 50,
        _varint(2**40) + b"x",
        _message(_field(1, "0.0.4")) + _message(b"\x0b"),
        _message(_field(1, "0.0.4")) + _message(b"\x12\x7f"),
    ],
)
def test_hostile_protobuf_is_one_line(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        _graph(data, tmp_path, read_chakra_protobuf)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "nodes",
    [
        [{"name": "no id"}],
        [{"id": "text"}],
        [{"id": 1, "inputs": {"values": 5}, "attrs": [{"name": "rf_id", "value": "x"}]}],
        [{"id": 1, "name": "## process_group:init ##", "inputs": ["{"], "input_types": ["String"]}],
        [{"id": 1, "inputs": [[1, 2, 3, 4, 5]], "input_types": [5], "input_shapes": 7}],
    ],
)
def test_odd_nodes_are_read_or_refused_in_one_line(tmp_path: Path, nodes: list[Any]) -> None:
    path = tmp_path / "et.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"schema": "1.0.1", "nodes": nodes}).encode()))
    try:
        said = "; ".join(import_traces([path])[0].missing)
    except BadRequest as error:
        said = str(error)

    assert said
    assert "\n" not in said
