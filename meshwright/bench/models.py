"""A row's model: an ``nn.Module`` on ``meta``, and inputs of one step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.bench.decoder import Decoder, DecoderConfig
from meshwright.bench.runs import MeasuredRun
from meshwright.bench.sizes import Sizes, sizes_of
from meshwright.bench.software import Software
from meshwright.capture.zoo import FAMILY_OF_MODEL
from meshwright.capture.zoo.family import Family, InputSampler
from meshwright.capture.zoo.t5 import FAMILY as T5
from meshwright.capture.zoo.t5 import T5Config
from meshwright.capture.zoo.vit import FAMILY as VIT
from meshwright.capture.zoo.vit import ViTConfig
from meshwright.errors import BadRequest

__all__ = ["RunModel", "model_of", "unlike_told", "with_family"]

_DECODERS = frozenset(("gpt", "llama", "moe", "mpt"))
_FAMILIES = _DECODERS | {"bert", "t5", "wrn", "vit"}
_NO_TRANSFORMERS = (
    r"mamba|hyena|rwkv|retnet|jamba|griffin|net\b|net[-_ ]|resnet|diffusion|gan\b|lstm|dlrm|gnn"
)
_GATED = (
    r"llama|mistral|qwen|deepseek|gemma|vicuna|alpaca|\byi\b|olmo|granite|internlm|baichuan|"
    r"phi[-_ ]?[34]|glm|kimi|codestral|command|exaone|solar|minitron"
)
_NOT_MODELED = (
    (r"deepseek[-_ ]?(v[23]|r1)|kimi|moonlight|\bmla\b|latent attention", "latent attention (MLA)"),
    (
        r"deepseek|kimi|moonlight|qwen[-_ ]?(1\.5|2)[-_ ]|llama[-_ ]?4|glm[-_ ]?4\.5|shared expert",
        "shared experts",
    ),
)
"""By a pattern of the name or notes of a mixture of experts."""
_UNLIKE = 0.03
"""Of the parameters told, that a built model may differ by without a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunModel:
    """What to build; equal for runs of the same program."""

    config: Any
    """Frozen; of a decoder or of one of the zoo's families."""
    family: Family | None
    """``None``: a decoder."""
    seq_len: int
    """0: the model has none."""

    @property
    def key(self) -> str:
        """Equal for equal models."""
        return f"{self.family.name if self.family else 'decoder'} {self.config} {self.seq_len}"

    def ring_share(self, tp: int) -> float:
        """Heads of keys and values on a rank of ``tp`` over those of queries.

        It is what a ring of attention passes on, of what our graph repeats for every query.
        """
        if not isinstance(self.config, DecoderConfig):
            return 1.0
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        # Ranks beyond the groups hold one of them each.
        return max(kv_heads, tp if heads % tp == 0 else 1) / heads

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The module, on ``meta``."""
        with torch.device("meta"):
            build = Decoder if self.family is None else self.family.build
            return build(self.config).to(dtype)

    def inputs(self, batch: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Keyword arguments of the module for ``batch`` samples, on ``meta``."""
        sampler = InputSampler(device=torch.device("meta"), dtype=dtype)
        if self.family is not None:
            return self.family.example_inputs(self.config, batch, self.seq_len, sampler)
        tokens = sampler.integers((batch, self.seq_len), end=self.config.vocab_size)
        return {"tokens": tokens, "targets": tokens.clone()}


def with_family(run: MeasuredRun) -> MeasuredRun:
    """``run`` with an ``arch`` that is known, where its words or its sizes tell one.

    A model of another name whose layers and width are told is taken for a decoder, unless the name
    is that of something else than a transformer.
    """
    arch = (run.arch or "").lower()
    words = f"{arch} {run.model_name or ''}".lower()
    if arch in _FAMILIES or re.search(_NO_TRANSFORMERS, words):
        return run
    if run.experts or re.search(r"mixtral|dbrx|\bmoe|gpt[-_ ]?oss|grok|a\d+b\b", words):
        return replace(run, arch="moe")
    if re.search(_GATED, words):
        return replace(run, arch="llama")
    for family in ("bert", "t5", "vit", "mpt"):
        if re.search(rf"\b{family}", words):
            return replace(run, arch=family)
    sized = run.layers is not None and run.hidden is not None
    if sized or re.search(r"gpt|opt\b|bloom|falcon|nemotron|megatron|turing|palm", words):
        return replace(run, arch="llama" if run.gated_mlp else "gpt")
    return run


def model_of(run: MeasuredRun, software: Software) -> tuple[RunModel, tuple[str, ...]]:
    """The model of ``run`` as ``software`` writes it, and what was assumed.

    Raises:
        BadRequest: the row does not tell enough, or names an architecture nothing is known of.
        BadModel: its sizes make no model.
    """
    arch = (run.arch or "").lower()
    if arch == "wrn":
        return _wide_resnet(run)
    if arch not in _FAMILIES:
        raise BadRequest(f"arch {run.arch!r} of {run.model_name!r}: no model of the kind is known")
    sizes, said = sizes_of(run, pads_vocab_to=software.pads_vocab_to)
    if arch == "t5":
        return _t5(sizes), said
    if arch == "vit":
        return _vit(sizes), (*said, "images of 224 x 224 in patches of 16 assumed")
    return _decoder(arch, sizes, software), said


def unlike_told(run: MeasuredRun, num_parameters: int) -> tuple[str, ...]:
    """What sets the model of ``num_parameters`` that was built apart from the one that ran."""
    said = []
    if run.params_b is not None:
        built_b = num_parameters / 1e9
        if abs(built_b / run.params_b - 1) > _UNLIKE:
            said.append(
                f"params_b {run.params_b:.4g} told, but the sizes make a model of {built_b:.4g} "
                f"({built_b / run.params_b - 1:+.1%})"
            )
    if run.experts or (run.arch or "").lower() == "moe":
        words = f"{run.model_name or ''} {run.notes or ''}".lower()
        said += [f"{part}: not modeled" for name, part in _NOT_MODELED if re.search(name, words)]
    return tuple(said)


def _decoder(arch: str, sizes: Sizes, software: Software) -> RunModel:
    modern = arch == "llama" or sizes.gated
    config = DecoderConfig(
        hidden=sizes.hidden,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_width=sizes.head_width,
        ffn=sizes.ffn,
        vocab_size=sizes.vocab,
        seq_len=sizes.seq_len,
        gated=sizes.gated,
        tie_embeddings=sizes.tied,
        rotary=modern and sizes.head_width % 2 == 0,
        rms_norm=modern,
        bias=not modern and arch != "mpt",
        causal=arch != "bert",
        dropout=software.dropout,
        fused_attention=software.fused_attention,
        fuses_pointwise=software.fuses_pointwise,
        fused_loss=software.fused_loss,
        num_experts=sizes.experts,
        top_k=sizes.top_k,
        expert_ffn=sizes.expert_ffn,
    )
    return RunModel(config=config, family=None, seq_len=sizes.seq_len)


def _t5(sizes: Sizes) -> RunModel:
    config = T5Config(
        hidden=sizes.hidden,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        head_width=sizes.head_width,
        ffn=sizes.ffn,
        vocab_size=sizes.vocab,
        seq_len=sizes.seq_len,
    )
    return RunModel(config=config, family=T5, seq_len=sizes.seq_len)


def _vit(sizes: Sizes) -> RunModel:
    config = ViTConfig(
        hidden=sizes.hidden, num_layers=sizes.layers, num_heads=sizes.heads, patch_size=16
    )
    return RunModel(config=config, family=VIT, seq_len=0)


def _wide_resnet(run: MeasuredRun) -> tuple[RunModel, tuple[str, ...]]:
    """The zoo's model of the nearest number of parameters, of Alpa's table."""
    name = (run.model_name or "").lower()
    match = re.search(r"(\d+(?:\.\d+)?)\s*(b|m)\b", name)
    count = run.params_b
    if count is None and match:
        count = float(match.group(1)) * (1 if match.group(2) == "b" else 1e-3)
    if count is None:
        raise BadRequest(f"model {run.model_name!r}: neither params_b nor a size in the name")
    known = {
        reference: _billions(reference)
        for reference in FAMILY_OF_MODEL
        if reference.startswith("wide-resnet-")
    }
    depth = 101 if run.layers == 101 or "101" in name else None
    fitting = {r: c for r, c in known.items() if depth is None or f"-{depth}-" in r}
    nearest = min(fitting, key=lambda reference: abs(fitting[reference] / count - 1))
    family = FAMILY_OF_MODEL[nearest]
    config = replace(family.models[nearest])
    return RunModel(config=config, family=family, seq_len=0), (f"model taken for {nearest}",)


def _billions(reference: str) -> float:
    size = reference.rsplit("-", 1)[1]
    return float(size[:-1]) * (1.0 if size.endswith("b") else 1e-3)
