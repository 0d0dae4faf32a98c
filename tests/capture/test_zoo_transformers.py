"""Zoo models give the loss of the Hugging Face model of the same weights."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from meshwright.capture.references import resolve_model

transformers = pytest.importorskip("transformers")

LLAMA_NAMES = {
    "model.embed_tokens": "embedding",
    "model.layers": "layers",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
    "mlp.gate.": "feed_forward.router.",
    "mlp.experts.": "feed_forward.experts.",
    "model.norm": "norm",
    "lm_head": "head",
}
T5_NAMES = {
    "shared": "embedding",
    "lm_head": "head",
    "block.": "layers.",
    "layer.0.SelfAttention.relative_attention_bias": "position_bias.table",
    "layer.0.SelfAttention": "self_attention",
    "layer.0.layer_norm": "self_norm",
    "layer.1.EncDecAttention": "cross_attention",
    "layer.1.layer_norm": "cross_norm",
    "layer.2.layer_norm": "feed_forward_norm",
    "layer.1.DenseReluDense": "feed_forward",
    "layer.2.DenseReluDense": "feed_forward",
    "final_layer_norm": "norm",
    ".q.": ".query.",
    ".k.": ".key.",
    ".v.": ".value.",
    ".o.": ".output.",
    ".wi.": ".up.",
    ".wo.": ".down.",
}


def _renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    result = {}
    for key, tensor in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        result[key] = tensor
    return result


def _shifted(tokens: Tensor) -> Tensor:
    """Targets by which our models predict what the others derive from ``labels=tokens``."""
    return torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], -100)), dim=1)


def _tokens() -> Tensor:
    return torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(1))


def _built(config: object, auto_class: str) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(config)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model.double()


LLAMA_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_llama() -> None:
    config = transformers.LlamaConfig(**LLAMA_SIZES, rope_theta=10000.0)
    theirs = _built(config, "AutoModelForCausalLM")
    ours = resolve_model(
        "tiny-llama?hidden=32&num_layers=2&ffn=64&vocab_size=128&rope_base=10000"
    ).build("float64", "cpu")
    ours.load_state_dict(_renamed(theirs.state_dict(), LLAMA_NAMES))
    tokens = _tokens()

    expected = theirs(input_ids=tokens, labels=tokens).loss

    # transformers makes its rotary table and its loss in fp32, we in the model's dtype.
    assert pytest.approx(expected.item(), rel=1e-6) == ours(tokens, _shifted(tokens)).item()


def test_mixtral_when_no_expert_overflows() -> None:
    config = transformers.MixtralConfig(
        **LLAMA_SIZES, num_local_experts=4, num_experts_per_tok=2, rope_theta=10000.0
    )
    config._experts_implementation = "eager"
    theirs = _built(config, "AutoModelForCausalLM")
    ours = resolve_model("tiny-moe?rope_base=10000&capacity_factor=2").build("float64", "cpu")
    state = _renamed(theirs.state_dict(), LLAMA_NAMES)
    for key in [key for key in state if key.endswith("gate_up_proj")]:
        gate, up = state.pop(key).transpose(1, 2).chunk(2, dim=2)
        stem = key.removesuffix("gate_up_proj")
        state[f"{stem}gate"], state[f"{stem}up"] = gate, up
    for key in [key for key in state if key.endswith("down_proj")]:
        state[key.removesuffix("_proj")] = state.pop(key).transpose(1, 2)
    ours.load_state_dict(state)
    tokens = _tokens()

    expected = theirs(input_ids=tokens, labels=tokens).loss

    assert pytest.approx(expected.item(), rel=1e-6) == ours(tokens, _shifted(tokens)).item()


def test_t5() -> None:
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        vocab_size=128,
        dropout_rate=0.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        scale_decoder_outputs=True,
    )
    theirs = _built(config, "AutoModelForSeq2SeqLM")
    ours = resolve_model("tiny-t5").build("float64", "cpu")
    state = {
        re.sub(r"layers\.0\.position_bias", "position_bias", key): tensor
        for key, tensor in _renamed(theirs.state_dict(), T5_NAMES).items()
    }
    # In a decoder layer 1 is the attention to the encoder; in an encoder it is the feed-forward.
    state = {
        re.sub(r"(encoder.*)cross_norm", r"\1feed_forward_norm", k): v for k, v in state.items()
    }
    state = {k: v for k, v in state.items() if "embed_tokens" not in k}
    ours.load_state_dict(state)
    tokens = _tokens()
    target = tokens.flip(1)

    expected = theirs(input_ids=tokens, decoder_input_ids=tokens, labels=target).loss

    assert pytest.approx(expected.item(), rel=1e-9) == ours(tokens, tokens, target).item()
