"""Sizes of a row's model: its columns, and what is known of its name where they are empty."""

from __future__ import annotations

import re
from dataclasses import dataclass

from meshwright.bench.runs import MeasuredRun, checked_size
from meshwright.capture.zoo import FAMILY_OF_MODEL
from meshwright.capture.zoo.family import Family
from meshwright.errors import BadRequest

__all__ = ["Sizes", "experts_of", "sizes_of"]

_VOCABULARIES = (
    (r"llama-?_?3|llama 3", 128256),
    (r"llama-?_?4|llama 4", 202048),
    (r"llama|mistral|mixtral|vicuna|alpaca", 32000),
    (r"qwen", 151936),
    (r"deepseek", 129280),
    (r"gpt[-_ ]?oss", 201088),
    (r"gemma", 256000),
    (r"nemotron", 256000),
    (r"grok", 131072),
    (r"glm", 151552),
    (r"bloom", 250880),
    (r"opt", 50272),
    (r"mpt", 50368),
    (r"falcon", 65024),
)
"""Of published models whose name has the pattern; the first that fits counts."""

_VOCABULARY_OF_ARCH = {"llama": 32000, "moe": 32000, "bert": 30522, "t5": 32128, "vit": 1000}
_GPT2_VOCABULARY = 50257
_TENSOR_PARALLEL = 8
_KNOWN = (
    (r"llama[-_ ]?(?:v)?3(?:\.\d)?[-_ ]?(8|70|405)b", "llama3-{}b"),
    (r"llama[-_ ]?(?:v)?2[-_ ]?(7|13|70)b", "llama2-{}b"),
    (r"mixtral[-_ ]?(8x7|8x22)b", "mixtral-{}b"),
    (r"gpt[-_ ]?3[-_ ]?(?:.*)?(175)b", "gpt3-{}b"),
)
"""Models of the zoo that a table may name without their sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a transformer, none missing."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    gated: bool
    vocab: int
    seq_len: int
    tied: bool
    experts: int
    """0: none."""
    top_k: int
    expert_ffn: int


def sizes_of(run: MeasuredRun, *, pads_vocab_to: int) -> tuple[Sizes, tuple[str, ...]]:
    """Sizes of ``run``'s transformer, and what was assumed.

    Raises:
        BadRequest: too little is told to build any model.
    """
    said: list[str] = []
    known = _known_sizes(run, said)
    arch = run.arch or ""
    layers, hidden = _depth_and_width(run, known, said)
    heads = run.heads or known.get("heads") or _heads(hidden, run.head_dim, said)
    head_width = run.head_dim or known.get("head_width") or max(hidden // heads, 1)
    kv_heads = run.kv_heads or known.get("kv_heads") or heads
    if heads % kv_heads:
        said.append(f"kv_heads {kv_heads} does not divide heads {heads}: {heads}")
        kv_heads = heads
    experts = experts_of(run)
    gated = run.gated_mlp
    if gated is None:
        gated = bool(known.get("gated", arch in ("llama", "moe")))
        if not known and arch != "gpt":
            said.append(f"gated_mlp not told: {gated}")
    ffn = run.ffn_hidden or known.get("ffn") or run.moe_ffn_hidden
    if ffn is None:
        ffn = _rounded(8 * hidden // 3, 256) if gated else 4 * hidden
        said.append(f"ffn_hidden not told: {ffn}")
    seq_len = run.seq_len or known.get("seq_len")
    if seq_len is None:
        seq_len = 512 if arch in ("bert", "t5") else 2048
        said.append(f"seq_len not told: {seq_len}")
    tied = run.tied_embeddings
    if tied is None:
        tied = not (gated or experts)
        said.append(f"tied_embeddings not told: {tied}")
    vocab = run.vocab or known.get("vocab")
    if vocab is None:
        vocab = _vocab(run, arch, pads_vocab_to)
        said.append(f"vocabulary not told: {vocab}")
    elif vocab % (pads_vocab_to * (run.tp or 1)):
        vocab = _padded(vocab, run, pads_vocab_to)
        said.append(f"vocabulary padded: {vocab}")
    found = Sizes(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        ffn=ffn,
        gated=gated,
        vocab=vocab,
        seq_len=seq_len,
        tied=tied,
        experts=experts,
        top_k=min(run.experts_per_token or known.get("top_k") or 2, experts or 1),
        expert_ffn=run.moe_ffn_hidden or known.get("expert_ffn") or ffn,
    )
    return found, tuple(said)


def experts_of(run: MeasuredRun) -> int:
    """Experts of a layer, as told or as the model's name has them; 0: a dense model.

    Raises:
        BadRequest: it is a mixture of experts, and how many is not known.
    """
    found = run.experts or _known_sizes(run, []).get("experts", 0)
    if not found and _is_moe(run):
        raise BadRequest("experts is not told, of a mixture of experts")
    return found if found > 1 else 0


def _is_moe(run: MeasuredRun) -> bool:
    return (run.arch or "").lower() == "moe"


def _known_sizes(run: MeasuredRun, said: list[str]) -> dict[str, int]:
    """Sizes of the zoo's model of the row's name, where the row lacks any that matter."""
    name = (run.model_name or "").lower()
    for pattern, reference in _KNOWN:
        match = re.search(pattern, name)
        if match is None:
            continue
        reference = reference.format(match.group(1))
        told = [run.layers, run.hidden, run.ffn_hidden]
        if _is_moe(run):
            told.append(run.experts)
        if reference not in FAMILY_OF_MODEL or None not in told:
            return {}
        said.append(f"sizes that are not told: those of {reference}")
        return _of_zoo(FAMILY_OF_MODEL[reference], reference)
    return {}


def _of_zoo(family: Family, reference: str) -> dict[str, int]:
    config = family.models[reference]
    hidden = int(config.hidden)
    found: dict[str, int | None] = {
        "layers": config.num_layers,
        "hidden": hidden,
        "heads": config.num_heads,
        "kv_heads": getattr(config, "num_kv_heads", config.num_heads),
        "ffn": getattr(config, "ffn", 4 * hidden),
        "vocab": config.vocab_size,
        "gated": int(family.name in ("llama", "moe")),
        "experts": getattr(config, "num_experts", 0),
        "top_k": getattr(config, "top_k", 0),
        "expert_ffn": getattr(config, "ffn", 0),
    }
    return {key: int(value) for key, value in found.items() if value is not None}


def _depth_and_width(run: MeasuredRun, known: dict[str, int], said: list[str]) -> tuple[int, int]:
    layers, hidden = run.layers or known.get("layers"), run.hidden or known.get("hidden")
    if hidden is None and run.heads and run.head_dim:
        hidden = run.heads * run.head_dim
        said.append(f"hidden not told: {hidden}, heads times their width")
    if run.arch == "t5" and layers is None and hidden is not None:
        layers = 12 if hidden <= 768 else 24
        said.append(f"layers not told: {layers} in each stack, as T5 of this width has")
    if layers is not None and hidden is not None:
        return layers, hidden
    if run.params_b is None or run.experts:
        missing = "layers" if layers is None else "hidden"
        raise BadRequest(f"{missing} is not told, and neither is what it follows from")
    count = run.params_b * 1e9
    # A transformer has 12 layers hidden^2 parameters; GPT-3's models are about 128 wide a layer.
    if hidden is None and layers is None:
        hidden = _rounded(round((count * 128 / 12) ** (1 / 3)), 128)
        said.append(f"hidden not told: {hidden}, by the number of parameters")
    if layers is None and hidden is not None:
        layers = max(round(count / (12 * hidden**2)), 1)
        said.append(f"layers not told: {layers}, by the number of parameters")
    if hidden is None and layers is not None:
        hidden = _rounded(round((count / 12 / layers) ** 0.5), 128)
        said.append(f"hidden not told: {hidden}, by the number of parameters")
    assert layers is not None, "follows from the number of parameters"
    assert hidden is not None, "follows from the number of parameters"
    checked_size("layers", layers)
    checked_size("hidden", hidden)
    return layers, hidden


def _heads(hidden: int, head_dim: int | None, said: list[str]) -> int:
    width = head_dim or (64 if hidden <= 2048 else 128)
    while hidden % width and width > 1:
        width //= 2
    said.append(f"heads not told: {hidden // width}")
    return hidden // width


def _vocab(run: MeasuredRun, arch: str, pads_vocab_to: int) -> int:
    """Of the model's name or kind, padded as the framework does."""
    name = (run.model_name or "").lower()
    plain = _VOCABULARY_OF_ARCH.get(arch, _GPT2_VOCABULARY)
    if pads_vocab_to > 1 and arch == "moe":
        plain = _GPT2_VOCABULARY
    for pattern, size in _VOCABULARIES:
        if re.search(pattern, name):
            plain = size
            break
    if pads_vocab_to == 1:
        return plain
    return _padded(plain, run, pads_vocab_to)


def _padded(vocab: int, run: MeasuredRun, pads_vocab_to: int) -> int:
    """For every tp up to that of a host alike, so that the plans of a job share one graph."""
    return _rounded(vocab, pads_vocab_to * max(run.tp or 1, _TENSOR_PARALLEL))


def _rounded(number: int, step: int) -> int:
    return -(-max(number, 1) // step) * step
