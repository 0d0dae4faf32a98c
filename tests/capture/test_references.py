"""What a user can write to name a model, and what is said when it names none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from meshwright.capture import capture
from meshwright.capture.references import resolve_model
from meshwright.errors import BadModel, BadRequest

USER_MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, hidden=8, bias=True):
        super().__init__()
        self.first = nn.Linear(4, hidden, bias=bias)
        self.second = nn.Linear(hidden, 1)

    def forward(self, x, y):
        return ((self.second(self.first(x).relu()) - y) ** 2).mean()


class WithInputs(Net):
    def example_inputs(self, batch_size, seq_len):
        return torch.randn(batch_size, 4), torch.randn(batch_size, 1)


def by_function():
    return Net(), lambda batch_size, seq_len: {
        "x": torch.randn(batch_size, 4), "y": torch.randn(batch_size, 1)
    }


def by_both():
    return Net(), lambda batch_size, seq_len: (
        (torch.randn(batch_size, 4),), {"y": torch.randn(batch_size, 1)}
    )


def fixed():
    return Net(), (torch.randn(6, 4), torch.randn(6, 1))


class Tied(WithInputs):
    def __init__(self):
        super().__init__(hidden=int(torch.linspace(8, 16, 2)[0].item()))
        self.again = nn.Linear(4, 8)
        self.again.weight = self.first.weight


def no_inputs():
    return Net()


def not_a_model():
    return 7


def broken():
    raise KeyError("a message\\nof two lines")


constant = 3
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a module that lies in the working directory."""
    (tmp_path / "house_of_user.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "house_of_user"
    sys.modules.pop("house_of_user", None)


def test_a_builtin_name_resolves_without_building() -> None:
    source = resolve_model("gpt3-175b")

    assert ("gpt3-175b", "gpt", 2048) == (source.reference, source.family, source.default_seq_len)


def test_overrides_change_the_configuration() -> None:
    source = resolve_model("gpt2?num_layers=4&hidden=48&tie_embeddings=false&dropout=0.1")

    config = source.describe()["config"]

    assert (4, 48, False, 0.1) == (
        config["num_layers"],
        config["hidden"],
        config["tie_embeddings"],
        config["dropout"],
    )
    assert 12 == config["num_heads"]


def test_describe_is_plain_data() -> None:
    described = resolve_model("tiny-mlp").describe()

    # 32*64+64, twice 64*64+64, 64*16+16.
    assert 2112 + 2 * 4160 + 1040 == described["num_parameters"]
    assert ("tiny-mlp", "mlp", None) == (
        described["reference"],
        described["family"],
        described["default_seq_len"],
    )


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("gtp2", r"no built-in model 'gtp2' \(did you mean gpt2"),
        ("", "no built-in model ''"),
        ("llama3-8B", "did you mean llama3-8b"),
        ("gpt2?num_layer=4", r"gpt2 has no setting 'num_layer' \(did you mean num_layers"),
        ("gpt2?num_layers=four", "num_layers=four must be a whole number"),
        ("gpt2?num_layers=1.5", "num_layers=1.5 must be a whole number"),
        ("gpt2?num_layers=0", "num_layers=0 must be positive"),
        ("gpt2?hidden=100", "hidden=100 must be a positive multiple of num_heads=12"),
        ("gpt2?tie_embeddings=1", "tie_embeddings=1 must be true or false"),
        ("gpt2?dropout=1.5", "dropout=1.5 must be at least 0 and below 1"),
        ("gpt2?dropout=nan", "dropout=nan must be at least 0 and below 1"),
        ("gpt2?hidden", "cannot read 'hidden'"),
        ("gpt2?", "cannot read ''"),
        ("gpt2?hidden=8&hidden=8", "'hidden' is given twice"),
        ("tiny-resnet?blocks=1,x", "blocks=1,x must be whole numbers joined by commas"),
        ("tiny-moe?top_k=9", "top_k=9 must be between 1 and num_experts=4"),
        ("no_such_module:model", "cannot import 'no_such_module'"),
        ("os:", "write package.module:callable"),
        ("torch:no_such_thing", "module 'torch' has no 'no_such_thing'"),
        ("torch:__version__", "torch:__version__ is not a callable"),
    ],
)
def test_a_reference_that_names_nothing_is_refused_in_one_line(
    reference: str, message: str
) -> None:
    with pytest.raises(BadModel, match=message) as caught:
        resolve_model(reference)

    assert "\n" not in str(caught.value)


def test_a_model_without_sequence_takes_no_sequence_length() -> None:
    with pytest.raises(BadRequest, match="resnet-50 has no sequence length, but 128"):
        resolve_model("resnet-50").example_inputs(2, 128)


def test_a_sequence_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(BadRequest, match="sequence length 2048 is not between 1 and 1024"):
        resolve_model("gpt2").example_inputs(2, 2048)


def test_a_batch_is_positive() -> None:
    with pytest.raises(BadRequest, match="batch size 0 must be at least 1"):
        resolve_model("gpt2").example_inputs(0)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(BadRequest, match="no floating-point dtype 'int8'"):
        resolve_model("tiny-mlp").build("int8")


@pytest.mark.parametrize("name", ["WithInputs", "by_function", "by_both", "fixed"])
def test_every_form_of_a_users_model_captures_and_runs(name: str, user: str) -> None:
    source = resolve_model(f"{user}:{name}")
    args, kwargs = source.example_inputs(6)
    graph = capture(source.build(), args, kwargs).graph
    real_args, real_kwargs = source.example_inputs(6, device="cpu", seed=2, dtype="float64")
    loss = source.build("float64", "cpu", seed=1)(*real_args, **real_kwargs)

    # 4*8+8 and 8+1.
    assert 49 == graph.num_parameters
    assert torch.float64 == loss.dtype
    assert loss.item() == source.build("float64", "cpu", seed=1)(*real_args, **real_kwargs).item()


def test_overrides_are_arguments_of_the_users_callable(user: str) -> None:
    model = resolve_model(f"{user}:WithInputs?hidden=3&bias=false").build()

    assert (3, 4) == tuple(model.first.weight.shape)
    assert model.first.bias is None


def test_a_model_that_meta_cannot_build_is_reduced_to_shapes_and_stays_tied(user: str) -> None:
    model = resolve_model(f"{user}:Tied").build("bfloat16")

    assert all(weight.is_meta for weight in model.parameters())
    assert isinstance(model.again.weight, nn.Parameter)
    assert model.again.weight is model.first.weight
    assert torch.bfloat16 == model.first.weight.dtype


def test_fixed_inputs_need_their_own_batch_size(user: str) -> None:
    with pytest.raises(BadRequest, match="example inputs have batch 6 but 8 is needed"):
        resolve_model(f"{user}:fixed").example_inputs(8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_inputs", "returned a Net without example_inputs"),
        ("not_a_model", "returned int; return an nn.Module"),
        ("broken", "failed with KeyError: 'a message"),
    ],
)
def test_a_callable_that_makes_no_model_is_refused(name: str, message: str, user: str) -> None:
    with pytest.raises(BadModel, match=message) as caught:
        resolve_model(f"{user}:{name}").build()

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (":constant", ":constant is not a callable"),
        (":WithInputs?depth=3", "unexpected keyword argument 'depth'"),
    ],
)
def test_what_cannot_be_called_is_refused(reference: str, message: str, user: str) -> None:
    with pytest.raises(BadModel, match=message):
        resolve_model(user + reference)
