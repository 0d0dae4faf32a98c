"""Hugging Face models, built from a local ``config.json`` alone.

Neither weights nor remote code nor the network are touched: the configuration is read as JSON and
given to the class that transformers itself has for its ``model_type``. Attention runs through
``scaled_dot_product_attention``, except T5's. Experts run densely: every expert computes every
token, weighted by 0 where the router did not choose it. That is the model's function with static
shapes, at num_experts / top_k times its floating-point operations; transformers' own forms loop
over data, gather a copy of an expert's weights per token, or use an operator outside ATen.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.capture.source import (
    ExampleInputs,
    checked_batch_size,
    checked_seq_len,
    num_parameters,
    parse_value,
    seeded,
    torch_dtype,
)
from meshwright.capture.zoo.family import InputSampler
from meshwright.errors import BadModel

__all__ = ["HuggingFaceSource"]

MAX_CONFIG_BYTES = 1 << 20
MAX_DEFAULT_SEQ_LEN = 4096
"""Configurations of long-context models allow far more than one trains on by default."""

_DENSE_EXPERTS = "meshwright_dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """How to train a model type."""

    auto_class: str
    inputs: Callable[[Any, int, int, InputSampler], dict[str, Any]]
    has_sequence: bool = True
    attention: str = "sdpa"


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceSource:
    """A model of transformers, a ``ModelSource``; ``config`` is a ``PreTrainedConfig``."""

    reference: str
    config: Any

    @classmethod
    def open(cls, reference: str, directory: Path, overrides: dict[str, str]) -> HuggingFaceSource:
        """Read ``config.json`` in ``directory``; BadModel where it is not a usable one."""
        fields = _read_config(directory)
        model_type = fields.pop("model_type", None)
        if not isinstance(model_type, str):
            raise BadModel(f"{directory}/config.json has no model_type; is it a model's?")
        if model_type not in _TASKS:
            raise BadModel(
                f"{directory}: no training step for model_type {model_type!r}; "
                f"there is one for {', '.join(sorted(_TASKS))}"
            )
        if "quantization_config" in fields:
            raise BadModel(f"{directory}: quantized models cannot be trained; remove the setting")
        # They ask for code or kernels from elsewhere.
        fields.pop("auto_map", None)
        fields = {key: value for key, value in fields.items() if not key.startswith("_")}
        config_class = _config_class(model_type)
        try:
            known = config_class(**fields).to_dict()
            changed = {key: _overridden(known, key, text) for key, text in overrides.items()}
            config = config_class(**(fields | changed))
        except BadModel:
            raise
        except Exception as error:
            # Configuration classes raise whatever their checks raise.
            said = " ".join(str(error).split())[:300]
            raise BadModel(f"{directory}/config.json is not a {model_type}: {said}") from error
        config.use_cache = False
        return cls(reference=reference, config=config)

    @property
    def family(self) -> str:
        """The configuration's ``model_type``."""
        return str(self.config.model_type)

    @property
    def default_seq_len(self) -> int | None:
        """The configuration's greatest, at most 4096; None for images."""
        if not self._task.has_sequence:
            return None
        return min(MAX_DEFAULT_SEQ_LEN, _longest_sequence(self.config))

    @property
    def _task(self) -> _Task:
        return _TASKS[self.family]

    def build(
        self,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "meta",
        *,
        seed: int = 0,
    ) -> nn.Module:
        """The module in training mode, with dropout as configured."""
        transformers = _transformers()
        wanted = torch_dtype(dtype)
        kwargs: dict[str, Any] = {"dtype": wanted, "attn_implementation": self._task.attention}
        if self.family in _MIXTURES:
            _register_dense_experts()
            kwargs["experts_implementation"] = _DENSE_EXPERTS
        auto_class = getattr(transformers, self._task.auto_class)
        try:
            with seeded(seed, device):
                module: nn.Module = auto_class.from_config(copy.deepcopy(self.config), **kwargs)
        except Exception as error:
            # Constructors fail in as many ways as configurations can be wrong.
            said = " ".join(str(error).split())[:300]
            raise BadModel(f"{self.reference}: transformers cannot build it: {said}") from error
        return _without_idle_dropout(module).train()

    def example_inputs(
        self,
        batch_size: int,
        seq_len: int | None = None,
        device: str | torch.device = "meta",
        *,
        seed: int = 0,
        dtype: str | torch.dtype = "float32",
    ) -> ExampleInputs:
        """Inputs of one step with labels, so that the model returns its loss; all by keyword."""
        limit = _longest_sequence(self.config) if self._task.has_sequence else 0
        length = checked_seq_len(self.reference, seq_len, self.default_seq_len, limit)
        sampler = InputSampler(device=torch.device(device), dtype=torch_dtype(dtype))
        sampler.generator.manual_seed(seed)
        batch = checked_batch_size(batch_size)
        return (), self._task.inputs(self.config, batch, length, sampler)

    def describe(self) -> dict[str, Any]:
        """Reference, family, number of parameters, default sequence length, configuration."""
        return {
            "reference": self.reference,
            "family": self.family,
            "num_parameters": num_parameters(self.build()),
            "default_seq_len": self.default_seq_len,
            "config": self.config.to_diff_dict(),
        }


def _overridden(known: dict[str, Any], key: str, text: str) -> Any:
    if not isinstance(known.get(key), bool | int | float | str):
        raise BadModel(
            f"the configuration has no number or word {key!r} that {text!r} could replace"
        )
    return parse_value(key, text, known[key])


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BadModel(
            "Hugging Face configurations need transformers; pip install 'meshwright[hf]'"
        ) from error
    return transformers


def _config_class(model_type: str) -> Any:
    _transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise BadModel(f"{directory} holds no config.json; give a Hugging Face model directory")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise BadModel(f"{path} is larger than {MAX_CONFIG_BYTES} bytes; is it a configuration?")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadModel(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadModel(f"{path} must hold a JSON object, not a {type(fields).__name__}")
    return fields


def _longest_sequence(config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return MAX_DEFAULT_SEQ_LEN


def _causal_inputs(
    config: Any, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Any]:
    """The model itself shifts the labels."""
    tokens = sampler.integers((batch_size, seq_len), end=config.vocab_size)
    return {"input_ids": tokens, "labels": tokens.clone()}


def _masked_inputs(
    config: Any, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Any]:
    """15 % of the tokens are to be predicted; no padding."""
    shape = (batch_size, seq_len)
    original = sampler.integers(shape, end=config.vocab_size)
    masked = sampler.chosen(shape, fraction=0.15)
    return {
        "input_ids": original.masked_fill(masked, 0),
        "attention_mask": torch.ones(shape, dtype=torch.int64, device=sampler.device),
        "labels": original.masked_fill(masked.logical_not(), -100),
    }


def _sequence_to_sequence_inputs(
    config: Any, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Any]:
    """Source and target have the same length; the decoder reads the shifted target."""
    shape = (batch_size, seq_len)
    source = sampler.integers(shape, end=config.vocab_size)
    target = sampler.integers(shape, end=config.vocab_size)
    start = torch.zeros((batch_size, 1), dtype=torch.int64, device=sampler.device)
    return {
        "input_ids": source,
        "decoder_input_ids": torch.cat((start, target[:, :-1]), dim=1),
        "labels": target,
    }


def _image_inputs(
    config: Any, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Any]:
    del seq_len
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {
        "pixel_values": sampler.normal((batch_size, config.num_channels, height, width)),
        "labels": sampler.integers((batch_size,), end=config.num_labels),
    }


_CAUSAL = _Task(auto_class="AutoModelForCausalLM", inputs=_causal_inputs)
_MASKED = _Task(auto_class="AutoModelForMaskedLM", inputs=_masked_inputs)
# The position bias needs a gradient, for which the fused attention operator of the CPU has none.
_SEQUENCE = _Task(
    auto_class="AutoModelForSeq2SeqLM", inputs=_sequence_to_sequence_inputs, attention="eager"
)
_IMAGE = _Task(
    auto_class="AutoModelForImageClassification", inputs=_image_inputs, has_sequence=False
)

_TASKS = {
    "bert": _MASKED,
    "gpt2": _CAUSAL,
    "llama": _CAUSAL,
    "mixtral": _CAUSAL,
    "qwen2_moe": _CAUSAL,
    "t5": _SEQUENCE,
    "vit": _IMAGE,
}
_MIXTURES = frozenset({"mixtral", "qwen2_moe"})


class _IdleDropout(nn.Identity):
    """Dropout that never drops; attention layers read its probability."""

    p = 0.0


def _without_idle_dropout(module: nn.Module) -> nn.Module:
    """Dropout of probability 0 would still put a random operator into the graph."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout) and child.p == 0.0:
                setattr(parent, name, _IdleDropout())
    return module


def _register_dense_experts() -> None:
    """Make ``_dense_experts`` known to transformers; again and again is the same as once."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_DENSE_EXPERTS, _dense_experts)


def _dense_experts(experts: Any, x_TD: Tensor, choice_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Weighted sum over all experts of their result for every token, (T, D).

    T = tokens, D = hidden size, K = choices per token, E = experts, F = feed-forward width.
    """
    expert_E = torch.arange(experts.num_experts, device=x_TD.device)
    chosen_TKE = (choice_TK.unsqueeze(-1) == expert_E).to(weight_TK.dtype)
    weight_TE = (weight_TK.unsqueeze(-1) * chosen_TKE).sum(dim=1)
    x_ETD = x_TD.unsqueeze(0).expand(experts.num_experts, -1, -1)
    inner_ETF = experts._apply_gate(torch.bmm(x_ETD, experts.gate_up_proj.transpose(1, 2)))
    result_ETD = torch.bmm(inner_ETF, experts.down_proj.transpose(1, 2))
    weighted_ETD = result_ETD * weight_TE.t().unsqueeze(-1)
    return weighted_ETD.sum(dim=0).to(x_TD.dtype)
