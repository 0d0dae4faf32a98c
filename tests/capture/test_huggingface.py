"""Hugging Face configurations become models with a training step, offline."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meshwright.capture import capture
from meshwright.capture.references import resolve_model
from meshwright.errors import BadModel, BadRequest
from tests.capture.hf_configs import CONFIGS

transformers = pytest.importorskip("transformers")


def _directory(path: Path, config: dict[str, Any]) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model reference must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_captures_with_the_operations_torch_counts(
    name: str, tmp_path: Path
) -> None:
    source = resolve_model(_directory(tmp_path, CONFIGS[name]))
    real = source.build(device="cpu")
    _, inputs = source.example_inputs(4, device="cpu")
    # The CPU's fused attention has no flop formula in torch; the plain one is two products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = real(**inputs).loss
        loss.backward()

    args, kwargs = source.example_inputs(4)
    graph = capture(source.build(), args, kwargs, name=name).graph

    assert loss.isfinite()
    assert not [op for op in graph.ops if "dropout" in op.target]
    assert name == source.family
    assert pytest.approx(counter.get_total_flops(), rel=0.01) == graph.num_flop
    assert sum(weight.numel() for weight in real.parameters()) == graph.num_parameters


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_dense_experts_compute_what_the_loop_over_experts_does(name: str, tmp_path: Path) -> None:
    source = resolve_model(_directory(tmp_path, CONFIGS[name]))
    model = source.build("float64", "cpu", seed=1)
    _, inputs = source.example_inputs(2, device="cpu")
    dense = model(**inputs).logits
    model.config._experts_implementation = "eager"

    torch.testing.assert_close(dense, model(**inputs).logits)


def test_overrides_replace_settings_and_seeds_repeat(tmp_path: Path) -> None:
    reference = _directory(tmp_path, CONFIGS["llama"]) + "?num_hidden_layers=1"
    source = resolve_model(reference)
    first, second = (source.build(device="cpu", seed=4) for _ in range(2))

    assert 1 == len(first.model.layers)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_the_default_sequence_is_the_longest_up_to_4096(tmp_path: Path) -> None:
    long = CONFIGS["llama"] | {"max_position_embeddings": 131072}

    assert 4096 == resolve_model(_directory(tmp_path, long)).default_seq_len
    assert 32 == resolve_model(_directory(tmp_path, CONFIGS["llama"])).default_seq_len
    assert resolve_model(_directory(tmp_path, CONFIGS["vit"])).default_seq_len is None


def test_a_sequence_above_the_configured_one_is_refused(tmp_path: Path) -> None:
    source = resolve_model(_directory(tmp_path, CONFIGS["gpt2"]))

    with pytest.raises(BadRequest, match="sequence length 33 is not between 1 and 32"):
        source.example_inputs(2, 33)


def test_remote_code_is_never_asked_for(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    config = CONFIGS["gpt2"] | {
        "auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"},
        "_attn_implementation": "someone/kernel",
    }

    model = resolve_model(_directory(tmp_path, config)).build()

    assert "GPT2LMHeadModel" == type(model).__name__


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object, not a list"),
        ("{}", "has no model_type"),
        ('{"model_type": "mamba"}', "no training step for model_type 'mamba'; there is one for"),
        ('{"model_type": "gpt2", "n_embd": "wide"}', "is not a gpt2"),
        ('{"model_type": "gpt2", "quantization_config": {}}', "quantized models cannot be trained"),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(BadModel, match=message) as caught:
        resolve_model(str(tmp_path))

    assert "\n" not in str(caught.value)


def test_a_directory_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))


def test_a_path_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BadModel, match=r"no directory '\./nowhere'"):
        resolve_model("./nowhere")


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="no number or word 'num_leyers'"):
        resolve_model(_directory(tmp_path, CONFIGS["gpt2"]) + "?num_leyers=1")


def test_a_missing_transformers_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(BadModel, match=r"pip install 'meshwright\[hf\]'"):
        resolve_model(_directory(tmp_path, CONFIGS["gpt2"]))
