"""Models that instances are about: sizes drawn by family, or the zoo's own, captured once.

A model is a reference that ``capture.references`` resolves (``tiny-llama?hidden=2048&...``) with
its batch and precision, so whoever reads a specification can plan the same model by hand.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import msgspec
import numpy as np
import torch

from meshwright import __version__
from meshwright.capture import capture
from meshwright.capture.references import resolve_model
from meshwright.capture.source import num_parameters
from meshwright.capture.zoo import FAMILY_OF_MODEL
from meshwright.cost.precision import TORCH_DTYPE
from meshwright.errors import BadRequest
from meshwright.graph.opgraph import OpGraph
from meshwright.graph.serialize import graph_from_json, graph_to_json
from meshwright.plans.plan import Precision
from meshwright.space.contexts import Program, study

__all__ = [
    "HELD_OUT_FAMILIES",
    "TRAINING_FAMILIES",
    "ModelSpec",
    "Programs",
    "cache_folder",
    "draw_model",
    "family_of",
    "parameters_of",
    "zoo_models",
]

TRAINING_FAMILIES = ("gpt", "llama", "moe", "gpt-moe", "bert", "vit", "resnet", "mlp")
HELD_OUT_FAMILIES = ("t5", "clip", "unet", "dlrm")
"""No model of theirs is trained on."""

_REMEMBERED = 2
"""Programs in memory: makers take all instances of a model one after the other."""

_HEAD_WIDTHS = (64, 64, 80, 96, 128, 128)
_NUM_HEADS = (8, 12, 16, 16, 20, 24, 32, 32, 40, 48, 64)
_NUM_LAYERS = (4, 6, 8, 8, 12, 12, 16, 18, 20, 24, 24, 28, 32, 36)
_SEQ_LENS = (512, 1024, 1024, 2048, 2048, 4096)
_VOCABULARIES = (32000, 32768, 50257, 51200, 64000, 100352, 128256)
_PRECISIONS = (Precision.BF16, Precision.BF16, Precision.BF16, Precision.FP16, Precision.FP32)
_LEAST_PARAMETERS = 10e6
_MOST_PARAMETERS = 40e9
"""Of a model that is drawn; larger ones of the zoo are left to other splits."""

Draw = Callable[[np.random.Generator], dict[str, int | float | str]]


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model and what one step of it takes."""

    reference: str
    global_batch: int
    precision: Precision


def family_of(reference: str) -> str:
    """Name of the zoo family that a built-in reference belongs to."""
    return FAMILY_OF_MODEL[reference.partition("?")[0]].name


@lru_cache(maxsize=4096)
def parameters_of(reference: str) -> int:
    """Elements of all parameters, counted on ``meta``."""
    return num_parameters(resolve_model(reference).build())


@lru_cache(maxsize=64)
def zoo_models(family: str) -> tuple[str, ...]:
    """The family's own models of a size worth planning."""
    return tuple(
        name
        for name, of in FAMILY_OF_MODEL.items()
        if of.name == family and parameters_of(name) >= _LEAST_PARAMETERS
    )


def draw_model(
    rng: np.random.Generator, families: tuple[str, ...], *, zoo_share: float = 0.25
) -> ModelSpec:
    """A model of one of ``families``, each as likely as the others, of at most 40e9 parameters.

    Args:
        rng: what draws it.
        families: names of zoo families.
        zoo_share: how often one of the zoo's own models is taken; of a family whose sizes are not
            drawn, always.
    """
    family = str(rng.choice(families))
    while True:
        if family not in _DRAWS or rng.random() < zoo_share:
            reference = str(rng.choice(zoo_models(family)))
        else:
            base, draw = _DRAWS[family]
            sizes = "&".join(f"{key}={value}" for key, value in draw(rng).items())
            reference = f"{base}?{sizes}"
        if parameters_of(reference) <= _MOST_PARAMETERS:
            break
    precision = Precision(rng.choice(_PRECISIONS))
    return ModelSpec(reference=reference, global_batch=_batch(rng, reference), precision=precision)


def _batch(rng: np.random.Generator, reference: str) -> int:
    """A round number of samples: of sequences, 2**15 to 2**22 tokens, else 64 to 2,048."""
    seq_len = resolve_model(reference).default_seq_len
    low, high = (64.0, 2048.0) if seq_len is None else (2**15 / seq_len, 2**22 / seq_len)
    low, high = max(low, 8.0), min(max(high, 16.0), 2048.0)
    wanted = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    unit = int(rng.choice((1, 1, 1, 1, 3, 5)))
    return unit << max(0, round(float(np.log2(wanted / unit))))


# Sizes by family --------------------------------------------------------------------------------


def _one_of(rng: np.random.Generator, values: tuple[int, ...]) -> int:
    return int(values[int(rng.integers(len(values)))])


def _width(rng: np.random.Generator) -> dict[str, int | float | str]:
    """Hidden size, heads and layers of a transformer."""
    num_heads = _one_of(rng, _NUM_HEADS)
    return {
        "hidden": num_heads * _one_of(rng, _HEAD_WIDTHS),
        "num_heads": num_heads,
        "num_layers": _one_of(rng, _NUM_LAYERS),
    }


def _text(rng: np.random.Generator) -> dict[str, int | float | str]:
    return {"vocab_size": _one_of(rng, _VOCABULARIES), "seq_len": _one_of(rng, _SEQ_LENS)}


def _gpt(rng: np.random.Generator) -> dict[str, int | float | str]:
    tied = "true" if rng.random() < 0.7 else "false"
    return {**_width(rng), **_text(rng), "tie_embeddings": tied}


def _llama(rng: np.random.Generator) -> dict[str, int | float | str]:
    sizes = _width(rng)
    heads, hidden = int(sizes["num_heads"]), int(sizes["hidden"])
    groups = tuple(count for count in (2, 4, 8, heads) if heads % count == 0)
    factor = float(rng.choice((8 / 3, 3.5, 4.0)))
    return {
        **sizes,
        "num_kv_heads": _one_of(rng, groups),
        "ffn": 128 * max(1, round(hidden * factor / 128)),
        **_text(rng),
    }


def _routing(rng: np.random.Generator) -> dict[str, int | float | str]:
    return {
        "num_experts": _one_of(rng, (4, 8, 8, 16, 32)),
        "top_k": _one_of(rng, (1, 2, 2)),
        "group_size": 512,
        "capacity_factor": 1.25,
    }


def _moe(rng: np.random.Generator) -> dict[str, int | float | str]:
    sizes = _llama(rng)
    return {**sizes, "num_layers": _one_of(rng, (4, 8, 12, 16, 24)), **_routing(rng)}


def _gpt_moe(rng: np.random.Generator) -> dict[str, int | float | str]:
    sizes = {**_width(rng), "num_layers": _one_of(rng, (4, 8, 12, 16, 24))}
    return {**sizes, "ffn_factor": _one_of(rng, (4, 8)), **_text(rng), **_routing(rng)}


def _bert(rng: np.random.Generator) -> dict[str, int | float | str]:
    return {**_width(rng), "seq_len": _one_of(rng, (128, 256, 512, 512))}


def _vit(rng: np.random.Generator) -> dict[str, int | float | str]:
    patch = _one_of(rng, (14, 16, 16, 32))
    return {**_width(rng), "patch_size": patch, "image_size": 224, "num_classes": 1000}


def _resnet(rng: np.random.Generator) -> dict[str, int | float | str]:
    blocks = ("2,2,2,2", "3,4,6,3", "3,4,6,3", "3,4,12,3")[int(rng.integers(4))]
    return {
        "blocks": blocks,
        "channels": _one_of(rng, (64, 96, 128, 160, 256, 320)),
        "width_factor": _one_of(rng, (1, 2, 2, 4)),
        "image_size": 224,
        "num_classes": 1024,
    }


def _mlp(rng: np.random.Generator) -> dict[str, int | float | str]:
    return {
        "inputs": _one_of(rng, (1024, 4096)),
        "hidden": _one_of(rng, (2048, 4096, 8192, 12288, 16384)),
        "num_layers": _one_of(rng, (3, 4, 6, 8, 12, 16)),
        "num_classes": _one_of(rng, (1024, 16384, 65536)),
    }


def _t5(rng: np.random.Generator) -> dict[str, int | float | str]:
    num_heads, width = _one_of(rng, (8, 12, 16, 24, 32)), 64
    return {
        "hidden": _one_of(rng, (512, 768, 1024, 2048)),
        "num_layers": _one_of(rng, (4, 6, 8, 12)),
        "num_heads": num_heads,
        "head_width": width,
        "ffn": _one_of(rng, (2048, 3072, 4096, 8192)),
        "vocab_size": 32128,
        "seq_len": _one_of(rng, (512, 1024)),
        "num_buckets": 32,
        "max_distance": 128,
    }


_DRAWS: Mapping[str, tuple[str, Draw]] = MappingProxyType(
    {
        "gpt": ("tiny-gpt", _gpt),
        "llama": ("tiny-llama", _llama),
        "moe": ("tiny-moe", _moe),
        "gpt-moe": ("tiny-gpt-moe", _gpt_moe),
        "bert": ("bert-base", _bert),
        "vit": ("tiny-vit", _vit),
        "resnet": ("tiny-resnet", _resnet),
        "mlp": ("tiny-mlp", _mlp),
        "t5": ("tiny-t5", _t5),
    }
)


# Captured graphs --------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$XDG_CACHE_HOME/meshwright``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "meshwright"


class Programs:
    """Captured and analyzed models; graphs are kept as files in ``folder``, by version."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "graphs"
        self._known: OrderedDict[ModelSpec, Program] = OrderedDict()

    def get(self, spec: ModelSpec) -> Program:
        """The program of ``spec``, captured where there is no file of it (seconds).

        Raises:
            PlannerError: the reference names nothing, or its step cannot be captured.
        """
        if spec not in self._known:
            self._known[spec] = study(self._graph(spec))
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(spec)
        return self._known[spec]

    def path(self, spec: ModelSpec) -> Path:
        """The file of its graph."""
        words = f"{msgspec.json.encode(spec).decode()} {__version__} {torch.__version__}"
        return self._folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.json.gz"

    def _graph(self, spec: ModelSpec) -> OpGraph:
        path = self.path(spec)
        if path.exists():
            try:
                return graph_from_json(gzip.decompress(path.read_bytes()).decode())
            except (BadRequest, OSError, EOFError, UnicodeDecodeError):
                path.unlink()  # Cut short or damaged: captured anew.
        graph = _captured(spec)
        self._folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(gzip.compress(graph_to_json(graph).encode(), 3))
        part.replace(path)
        return graph


def _captured(spec: ModelSpec) -> OpGraph:
    source = resolve_model(spec.reference)
    dtype: torch.dtype = getattr(torch, TORCH_DTYPE[spec.precision])
    args, kwargs = source.example_inputs(spec.global_batch, dtype=dtype)
    return capture(source.build(dtype), args, kwargs, name=spec.reference).graph
