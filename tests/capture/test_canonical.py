from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.graph.opgraph import InputRole, OpGraph, Phase
from tests.capture.small_models import as_eager, tokens


class Loss(nn.Module):
    """Scores for five positions of two sequences, given to ``loss``."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11)
        self.loss = loss
        self.register_buffer("weight", torch.arange(1.0, 12.0))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.head(self.embed(inputs)), targets)


def _flat(scores: Tensor, targets: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), **options)  # type: ignore[arg-type]


CLASS_WEIGHTS = torch.arange(1.0, 12.0, dtype=torch.float64)

LOSSES = {
    "tokens": _flat,
    "positions in the last dim": lambda s, t: F.cross_entropy(s.transpose(1, 2), t),
    "class weights": lambda s, t: _flat(s, t, weight=CLASS_WEIGHTS),
    "another ignored class": lambda s, t: _flat(s, t.abs() % 11, ignore_index=3),
    "image": lambda s, t: F.cross_entropy(s.permute(0, 2, 1)[..., None], t[..., None]),
    "mse": lambda s, t: F.mse_loss(s, torch.ones_like(s)),
    "smooth l1": lambda s, t: F.smooth_l1_loss(s, torch.ones_like(s)),
    "huber": lambda s, t: F.huber_loss(s, torch.ones_like(s), delta=0.5),
    "binary": lambda s, t: F.binary_cross_entropy(s.sigmoid(), torch.full_like(s, 0.3)),
}


def _depends_on(graph: OpGraph, value: int) -> set[InputRole]:
    """Roles of the inputs that ``value`` is computed from."""
    producer = {v: op for op in graph.ops for v in op.results}
    role = {item.value: item.role for item in graph.inputs}
    if value in role:
        return {role[value]}
    return {r for source in producer[value].inputs for r in _depends_on(graph, source)}


@pytest.mark.parametrize("name", LOSSES)
def test_a_rewritten_mean_loss_has_the_same_value_and_gradients(name: str) -> None:
    captured, _ = as_eager(Loss(LOSSES[name]).double(), tokens(ignored=True))
    reductions = {
        op.target: op.args
        for op in captured.graph.ops
        if "nll_loss" in op.target or "_loss" in op.target or "binary_cross" in op.target
    }

    assert reductions
    assert all(2 in args for args in reductions.values()), reductions


@pytest.mark.parametrize("name", ["tokens", "class weights"])
def test_the_count_depends_on_data_alone_and_divides_loss_and_gradient(name: str) -> None:
    graph = as_eager(Loss(LOSSES[name]).double(), tokens(ignored=True))[0].graph
    divisions = [op for op in graph.ops if op.target == "aten.div.Tensor"]
    counts = {op.inputs[1] for op in divisions}

    assert [Phase.FORWARD, Phase.BACKWARD] == [op.phase for op in divisions]
    assert divisions[0].index == divisions[1].forward_op
    assert 1 == len(counts)
    assert _depends_on(graph, counts.pop()) <= {InputRole.DATA, InputRole.CONSTANT}


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    """Loss sums of the two sequences over their joint count: 4 and 5 targets of 9."""
    torch.manual_seed(0)
    model = Loss(_flat).double()
    inputs, targets = tokens(ignored=True)
    whole = model(inputs, targets)
    sums = [
        _flat(model.head(model.embed(inputs[i : i + 1])), targets[i : i + 1], reduction="sum")
        for i in range(2)
    ]

    assert 9 == int((targets != -100).sum())
    torch.testing.assert_close(sum(sums) / 9, whole, rtol=1e-12, atol=0.0)
