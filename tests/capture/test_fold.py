"""A folded capture is the whole capture, or there is none."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.capture import repeats
from meshwright.capture.captured import capture
from meshwright.capture.fold import Captured, capture_folded
from meshwright.capture.references import resolve_model
from meshwright.errors import CaptureFailed
from meshwright.graph.opgraph import OpGraph
from tests.capture.deep_models import (
    DEPTH,
    IRREGULAR,
    REGULAR,
    WIDTH,
    Block,
    Deep,
    Mixing,
    chain,
    data,
)
from tests.capture.hf_configs import CONFIGS

_MORE = ("t5", "llama", "bert", "mixtral", "vit")
"""Further configurations of transformers."""


@pytest.fixture(autouse=True)
def fold_short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every model here would have to be twice as deep."""
    monkeypatch.setattr(repeats, "_MIN_UNITS", 5)


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every capture so far, whether it was folded."""
    found: list[bool] = []

    def recorded(*args: Any) -> Captured | None:
        result = capture_folded(*args)
        found.append(result is not None)
        return result

    monkeypatch.setattr("meshwright.capture.captured.capture_folded", recorded)
    return found


def both(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[OpGraph, OpGraph]:
    """The graph as ``capture`` gives it, and that of every layer traced."""
    graphs = []
    for fold in (True, False):
        random.seed(5)
        graphs.append(capture(model, args, kwargs, fold=fold).graph)
    return graphs[0], graphs[1]


def exact(graph: OpGraph) -> tuple[OpGraph, str]:
    """What is the same of equal graphs: equal arguments may be of different types (1 and True)."""
    return graph, repr(graph)


@pytest.mark.parametrize("mixing", REGULAR, ids=lambda mixing: mixing.__name__)
def test_equal_layers_are_folded(mixing: Mixing, folds: list[bool]) -> None:
    folded, whole = both(Deep(mixing), data())

    assert exact(whole) == exact(folded)
    assert [True] == folds


@pytest.mark.parametrize("mixing", IRREGULAR, ids=lambda mixing: mixing.__name__)
def test_layers_that_only_look_equal_are_not_taken_for_equal(mixing: Mixing) -> None:
    """Most are traced, some folded: the graph must be the same."""
    folded, whole = both(Deep(mixing), data())

    assert exact(whole) == exact(folded)


@pytest.mark.parametrize(
    "reference",
    [
        "tiny-gpt?num_layers=5&dropout=0.1",
        pytest.param("tiny-llama?num_layers=6", marks=pytest.mark.slow),
        pytest.param("tiny-moe?num_layers=6", marks=pytest.mark.slow),
        pytest.param("tiny-gpt-moe?num_layers=10", marks=pytest.mark.slow),
        "tiny-bert?num_layers=6",
        "tiny-t5?num_layers=5",
        pytest.param("tiny-vit?num_layers=6", marks=pytest.mark.slow),
        pytest.param("tiny-clip?image_num_layers=6&text_num_layers=7", marks=pytest.mark.slow),
        "tiny-mlp?num_layers=7",
        pytest.param("tiny-resnet?blocks=6,1,6,6", marks=pytest.mark.slow),
    ],
)
def test_zoo_family_is_folded(reference: str, folds: list[bool]) -> None:
    source = resolve_model(reference)
    args, kwargs = source.example_inputs(2)

    folded, whole = both(source.build(), *args, **kwargs)

    assert exact(whole) == exact(folded)
    assert [True] == folds


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-dlrm"])
def test_zoo_family_without_equal_layers_is_traced(name: str, folds: list[bool]) -> None:
    source = resolve_model(name)
    args, kwargs = source.example_inputs(2)

    capture(source.build(), args, kwargs)

    assert [False] == folds


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in _MORE)]
)
def test_transformers_model_is_folded(name: str, tmp_path: Path, folds: list[bool]) -> None:
    pytest.importorskip("transformers")
    config = dict(CONFIGS[name])
    depth = {"gpt2": "n_layer", "t5": "num_layers"}.get(name, "num_hidden_layers")
    (tmp_path / "config.json").write_text(json.dumps({**config, depth: 6}))
    source = resolve_model(str(tmp_path))
    args, kwargs = source.example_inputs(2)

    folded, whole = both(source.build(), *args, **kwargs)

    assert exact(whole) == exact(folded)
    assert [True] == folds


def test_layers_with_another_factor_are_kept_apart(folds: list[bool]) -> None:
    """The first two differ in an attribute; the six behind them are a run."""
    blocks = [Block(factor=0.5 if index < 2 else 1.0) for index in range(8)]

    folded, whole = both(Deep(chain, *blocks), data())

    assert exact(whole) == exact(folded)
    assert [True] == folds


def test_hidden_difference_is_seen() -> None:
    """A list is not looked at to find runs, only what a layer does with it."""
    blocks = [Block() for _ in range(DEPTH)]
    model = Deep(chain, *blocks)
    blocks[5].hidden_factors[0] = 7.0

    folded, whole = both(model, data())

    assert exact(whole) == exact(folded)
    assert {"layers.5"} == {op.module_path for op in folded.ops if 7.0 in op.args}


def test_hook_on_one_layer_is_seen() -> None:
    model = Deep(chain)
    model.layers[5].register_forward_hook(lambda _module, _args, result: result * 3.0)

    folded, whole = both(model, data())

    assert exact(whole) == exact(folded)
    assert any(3.0 in op.args for op in folded.ops)


def test_layers_with_a_shared_weight_are_traced(folds: list[bool]) -> None:
    blocks = [Block() for _ in range(DEPTH)]
    blocks[5].linear.weight = blocks[4].linear.weight
    model = Deep(chain, *blocks)

    folded, whole = both(model, data())

    assert exact(whole) == exact(folded)
    assert [False] == folds
    assert ("layers.5.linear.weight",) in [item.tied_names for item in folded.inputs]


def test_one_layer_used_many_times_is_traced(folds: list[bool]) -> None:
    block = Block()

    folded, whole = both(Deep(chain, *(block for _ in range(DEPTH))), data())

    assert exact(whole) == exact(folded)
    assert [False] == folds


@pytest.mark.parametrize("num_frozen", [1, 2, DEPTH])
def test_frozen_layers(num_frozen: int) -> None:
    model = Deep(chain)
    model.first.requires_grad_(False)
    for layer in model.layers[:num_frozen]:
        layer.requires_grad_(False)

    folded, whole = both(model, data())

    assert exact(whole) == exact(folded)


def test_running_statistics_of_every_layer_are_written(folds: list[bool]) -> None:
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(6)]

    folded, whole = both(Deep(chain, *blocks), data())

    assert exact(whole) == exact(folded)
    assert [True] == folds
    assert "layers.5.1.running_mean" in [item.name for item in folded.outputs]


def test_children_behind_a_run_keep_their_names(folds: list[bool]) -> None:
    class Loss(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().mean()

    blocks = [Block() for _ in range(6)]
    narrow = [nn.Linear(WIDTH, 2), *(nn.Linear(2, 2) for _ in range(5)), Loss()]
    model = nn.Sequential(nn.Linear(3, WIDTH), *blocks, *narrow)

    folded, whole = both(model, data())

    assert exact(whole) == exact(folded)
    assert [True] == folds
    assert "12.weight" in [item.name for item in folded.parameters]


def test_layers_that_take_turns_are_one_run(folds: list[bool]) -> None:
    blocks = [block for _ in range(6) for block in (Block(), nn.Linear(WIDTH, WIDTH))]

    folded, whole = both(Deep(chain, *blocks), data())

    assert exact(whole) == exact(folded)
    assert [True] == folds


def test_a_tensor_of_each_layer_stays_a_constant_of_its_own() -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.factor = torch.full((WIDTH,), factor)

        def forward(self, x: Tensor) -> Tensor:
            scaled: Tensor = self.linear(x) * self.factor
            return scaled

    model = Deep(chain, *(Scaled(float(index)) for index in range(6)))

    whole = capture(model, (data(),), fold=False)
    folded = capture(model, (data(),))

    assert exact(whole.graph) == exact(folded.graph)
    assert [float(index) for index in range(6)] == sorted(
        float(tensor[0]) for tensor in folded.constants.values()
    )


def test_a_layer_that_cannot_be_captured_is_named() -> None:
    class Deciding(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if self.hidden_factors[0] < x.sum().item() else 1.0)

    blocks = [Block() for _ in range(6)]
    blocks[5].__class__ = Deciding

    with pytest.raises(CaptureFailed, match="depend on data"):
        capture(Deep(chain, *blocks), (data(),))


def test_the_model_is_left_as_it_was(folds: list[bool]) -> None:
    model = Deep(chain)
    names = [name for name, _ in model.named_parameters()]
    layers = list(model.layers)

    capture(model, (data(),))

    assert [True] == folds
    assert names == [name for name, _ in model.named_parameters()]
    assert all(one is other for one, other in zip(layers, model.layers, strict=True))


def test_random_choices_of_the_model_are_those_of_one_pass() -> None:
    """Trying to fold takes no random numbers from the pass that counts."""
    counts = set()
    for fold in (True, False):
        random.seed(11)
        model = Deep(IRREGULAR[-1])
        counts.add(len(capture(model, (data(),), fold=fold).graph.ops))

    assert 1 == len(counts)


def test_what_the_model_remembers_is_forgotten_between_passes() -> None:
    class Remembering(Deep):
        def __init__(self) -> None:
            super().__init__(chain)
            self.calls: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(len(self.calls))
            return super().forward(x) * (1.0 + self.calls[-1])

    model = Remembering()
    folded, whole = both(model, data())

    assert exact(whole) == exact(folded)
    assert [] == model.calls
