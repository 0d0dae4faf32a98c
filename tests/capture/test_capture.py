from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from meshwright.capture import CapturedModel, capture, execute
from meshwright.errors import BadRequest
from meshwright.graph.opgraph import InputRole, OpGraph, OutputRole, Phase
from meshwright.graph.serialize import graph_sha256
from tests.capture.small_models import RenamedGPT, SmallConv, TinyGPT, as_eager, images, tokens


@pytest.fixture(scope="module")
def gpt() -> CapturedModel:
    return capture(TinyGPT().double(), tokens())


def test_a_gpt_computes_what_eager_computes() -> None:
    _, result = as_eager(TinyGPT().double(), tokens(ignored=True))

    assert (2, 5, 11) == result.outputs["logits"].shape


def test_a_network_with_buffers_constants_and_nested_inputs_computes_what_eager_computes() -> None:
    captured, result = as_eager(SmallConv(dropout=0.5).double(), *images())

    assert ("args.0.image.left", "kwargs.label") == captured.data_names
    assert ["constant.0"] == list(captured.constants)
    assert ("1",) == captured.output_names
    assert ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var"] == sorted(
        result.buffer_updates
    )


def test_a_tied_parameter_appears_once_and_an_unused_one_has_no_gradient(
    gpt: CapturedModel,
) -> None:
    tied = [item for item in gpt.graph.parameters if item.tied_names]
    gradients = {item.name for item in gpt.graph.outputs_of(OutputRole.GRADIENT)}

    assert [("embed.weight", ("head.weight",))] == [(i.name, i.tied_names) for i in tied]
    assert {"unused.weight", "unused.bias"} == {i.name for i in gpt.graph.parameters} - gradients


def test_values_are_numbered_inputs_first_then_results_and_forward_comes_first(
    gpt: CapturedModel,
) -> None:
    graph = gpt.graph
    order = [i.value for i in graph.inputs] + [v for op in graph.ops for v in op.results]
    phases = [op.phase for op in graph.ops]

    assert list(range(len(graph.values))) == order
    assert list(range(len(graph.ops))) == [op.index for op in graph.ops]
    assert sorted(phases, key=list(Phase).index) == phases


def test_meta_fake_and_real_modules_give_one_graph_and_stay_as_they_were() -> None:
    real = TinyGPT()
    with torch.device("meta"):
        meta = TinyGPT()
        meta_tokens = (torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long))
    with FakeTensorMode():
        fake = TinyGPT()
    before = dict(real.named_parameters())
    graphs = [
        capture(model, args, name="gpt").graph
        for model, args in ((real, tokens()), (meta, meta_tokens), (fake, tokens()))
    ]

    assert graphs[0] == graphs[1] == graphs[2]
    assert all(parameter is before[name] for name, parameter in real.named_parameters())
    assert {torch.device("meta")} == {parameter.device for parameter in meta.parameters()}


def test_dtype_replaces_every_floating_dtype() -> None:
    graph = capture(TinyGPT(), tokens(), dtype=torch.bfloat16).graph

    assert {"bfloat16"} == {graph.values[item.value].dtype for item in graph.parameters}
    assert {"int64"} == {graph.values[i.value].dtype for i in graph.inputs_of(InputRole.DATA)}


def test_flops_agree_with_torchs_counter(gpt: CapturedModel) -> None:
    """On meta, where attention decomposes into the matrix products torch counts."""
    model = TinyGPT().to("meta")
    with FlopCounterMode(display=False) as counter:
        model(*(tensor.to("meta") for tensor in tokens()))["loss"].backward()

    assert counter.get_total_flops() == gpt.graph.num_flop


def test_convolution_flops_agree_with_torchs_counter() -> None:
    model = SmallConv().double()
    args, kwargs = images()
    graph = capture(model, args, kwargs).graph
    with FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)[0].backward()

    assert counter.get_total_flops() == graph.num_flop


def test_bytes_count_what_an_operator_touches(gpt: CapturedModel) -> None:
    """fp64: an embedding reads 10 indices and 10 rows of 8; a view moves nothing."""
    ops = {op.target: op for op in gpt.graph.ops if op.phase == Phase.FORWARD}
    look_up, view = ops["aten.embedding.default"], ops["aten.view.default"]

    assert (10 * 8 + 10 * 8 * 8, 10 * 8 * 8) == (look_up.bytes_read, look_up.bytes_written)
    assert (0, 0) == (view.bytes_read, view.bytes_written)


def _saved_by_forward(graph: OpGraph, index: int) -> set[int]:
    op = graph.ops[index]
    return {*op.inputs, *op.results}


@pytest.mark.parametrize("which", ["gpt", "conv"])
def test_a_backward_operator_reads_what_its_forward_operator_saw(which: str) -> None:
    """Every derivative kernel that needs forward values names the operator that had them."""
    graph = (
        capture(TinyGPT(), tokens()).graph
        if which == "gpt"
        else capture(SmallConv(dropout=0.5).double(), *images()).graph
    )
    kernels = {
        "aten._log_softmax_backward_data.default": "aten._log_softmax.default",
        "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": (
            "aten._scaled_dot_product_flash_attention_for_cpu.default"
        ),
        "aten.convolution_backward.default": "aten.convolution.default",
        "aten.embedding_dense_backward.default": "aten.embedding.default",
        "aten.gelu_backward.default": "aten.gelu.default",
        "aten.max_pool2d_with_indices_backward.default": "aten.max_pool2d_with_indices.default",
        "aten.native_batch_norm_backward.default": (
            "aten._native_batch_norm_legit_functional.default"
        ),
        "aten.native_dropout_backward.default": "aten.native_dropout.default",
        "aten.native_layer_norm_backward.default": "aten.native_layer_norm.default",
        "aten.nll_loss_backward.default": "aten.nll_loss_forward.default",
        "aten.threshold_backward.default": "aten.relu.default",
    }
    checked = [op for op in graph.ops if op.target in kernels]

    assert checked
    for op in checked:
        assert op.forward_op is not None
        assert kernels[op.target] == graph.ops[op.forward_op].target
        forward_values = {
            v for item in graph.ops if item.phase == Phase.FORWARD for v in item.results
        }
        saved = set(op.inputs) & forward_values
        assert saved <= _saved_by_forward(graph, op.forward_op)
        assert op.module_path == graph.ops[op.forward_op].module_path


def test_a_weight_gradient_comes_from_its_own_layer(gpt: CapturedModel) -> None:
    """Two layers of five modules with weight and bias."""
    graph = gpt.graph
    producer = {value: op for op in graph.ops for value in op.results}
    paths = {
        item.name: producer[item.value].module_path
        for item in graph.outputs_of(OutputRole.GRADIENT)
        if item.name.startswith("layers")
    }

    assert paths == {name: name.rpartition(".")[0] for name in paths}
    assert 2 * 5 * 2 == len(paths)


def test_a_sum_of_gradients_belongs_to_no_forward_operator_and_takes_a_neighbors_path(
    gpt: CapturedModel,
) -> None:
    sums = [
        op
        for op in gpt.graph.ops
        if op.phase == Phase.BACKWARD and op.target == "aten.add.Tensor" and op.forward_op is None
    ]

    assert ["layers.1.out", "layers.0.ffn.2", "layers.0.out", "embed", "embed"] == [
        op.module_path for op in sums
    ]


def test_operators_know_module_and_source_line(gpt: CapturedModel) -> None:
    attention = [op for op in gpt.graph.ops if "attention_for_cpu.default" in op.target]

    assert ["layers.0", "layers.1"] == [op.module_path for op in attention]
    assert all(op.source.startswith("small_models.py:") for op in attention)


def test_renaming_modules_parameters_and_inputs_keeps_the_digest(gpt: CapturedModel) -> None:
    renamed = capture(RenamedGPT(TinyGPT()).double(), tokens())
    narrower = capture(RenamedGPT(TinyGPT()), tokens())

    assert graph_sha256(gpt.graph) == graph_sha256(renamed.graph)
    assert graph_sha256(gpt.graph) != graph_sha256(narrower.graph)


class Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor


@dataclasses.dataclass
class Returned:
    logits: Tensor
    loss: Tensor


class Variant(nn.Module):
    """Parts that models do with tensors and that a graph must come to terms with."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=True) if kind == "lstm" else None
        self.head = nn.Linear(8, 11)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(inputs)
        if self.kind == "no_grad":
            with torch.no_grad():
                weight = self.inner(x).softmax(-1)
            x = x * weight
        elif self.kind == "writes":
            x = self.inner(x)
            x[:, 0] = 1.0
            x[:, 1:3].mul_(2)
        elif self.kind == "checkpoint":
            x = checkpoint(self.inner, x, use_reentrant=False)
        elif self.kind == "lstm":
            assert self.rnn is not None
            x = self.rnn(x)[0]
        elif self.kind == "attention_dropout":
            q = self.inner(x).unflatten(-1, (2, 4)).transpose(1, 2)
            x = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).transpose(1, 2).flatten(2)
        smoothing = 0.1 if self.kind == "smoothing" else 0.0
        logits = self.head(x).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)


@pytest.mark.parametrize(
    "kind", ["no_grad", "writes", "checkpoint", "lstm", "attention_dropout", "smoothing"]
)
def test_what_models_do_computes_what_eager_computes(kind: str) -> None:
    captured, _ = as_eager(Variant(kind).double(), tokens(ignored=True))

    assert not any(op.target.split(".")[1].endswith("_") for op in captured.graph.ops)


class Wrapped(nn.Module):
    """Takes a named tuple, returns a dataclass that torch knows nothing about."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = TinyGPT()

    def forward(self, batch: Batch, factor: float) -> Returned:
        result = self.gpt(*batch)
        return Returned(logits=result["logits"], loss=result["loss"] * factor)


def test_named_tuples_go_in_and_dataclasses_come_out() -> None:
    model = Wrapped().double()
    captured = capture(model, (Batch(*tokens()), 2.0))
    result = execute(captured.graph, captured.graph_inputs(model, (Batch(*tokens()), 2.0)))
    loss = model(Batch(*tokens()), 2.0).loss

    assert ("args.0.inputs", "args.0.targets") == captured.data_names
    assert ("logits",) == captured.output_names
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.zeros(2, 5, dtype=torch.long),), {}, r"missing: args\.1"),
        ((torch.zeros(3, 5, dtype=torch.long),) * 2, {}, r"args\.0 has shape \[3, 5\]"),
        ((torch.zeros(2, 5),) * 2, {}, r"args\.0 has dtype torch\.float32"),
        ((torch.zeros(2, 5, dtype=torch.long),) * 2, {"flag": 1}, r"kwargs\.flag is 1"),
    ],
)
def test_flatten_data_refuses_another_call(
    gpt: CapturedModel, args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        gpt.flatten_data(args, kwargs)
