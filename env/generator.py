"""What instances are drawn from: splits, and specifications that a seed and a split give.

A split has a list of models, drawn once from its own seed, and draws clusters for them, so that
capturing a model serves many instances. What is tested on is not trained on, nor are weights chosen
by it: no model, whatever its batch, and in some splits no family, no device type and no cluster of
that size.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType

import msgspec
import numpy as np

from meshwright.cluster.model import Cluster
from meshwright.cost.pricing import ANALYTIC, Pricing
from meshwright.env.clusters import (
    DEVICES,
    HELD_OUT_DEVICES,
    ClusterSpec,
    cluster_of,
    draw_cluster,
)
from meshwright.env.models import (
    HELD_OUT_FAMILIES,
    TRAINING_FAMILIES,
    ModelSpec,
    Programs,
    draw_model,
    parameters_of,
)
from meshwright.errors import BadRequest
from meshwright.plans.plan import JobSpec, OptimizerName, OptimizerSpec, Precision
from meshwright.space.contexts import make_context
from meshwright.space.search import SearchContext

__all__ = ["SPLITS", "InstanceSpec", "Split", "context_of", "draw", "models_of"]

_TRAINING, _VALIDATION, _EVERYTHING = "train", "validation", "any"
TRAINING_DEVICES = 64
"""Clusters are trained on up to this size."""

_SGD_SHARE = 0.15
SPARE = 1.25
"""A cluster has so many times the bytes of parameters, gradients and optimizer state: with less,
hardly any plan fits."""
_DEVICES_PER_SAMPLE = 4
"""Of the batch: more would stand idle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What a set of instances may hold."""

    name: str
    families: tuple[str, ...] = TRAINING_FAMILIES
    devices: tuple[str, ...] = DEVICES
    sizes: tuple[int, int] = (1, TRAINING_DEVICES)
    """Least and greatest number of devices."""
    num_models: int
    in_turn: bool = False
    """Its models are of the families by turns, not of families drawn."""
    max_rows: tuple[int, ...] = (48, 64, 96, 128, 192)
    """Rows of an instance at most: one of these, each as likely."""
    max_plans: int = 1024
    """Of a room."""


_EVERY = (
    Split(name=_TRAINING, num_models=96),
    Split(name=_VALIDATION, num_models=20),
    Split(name="test-in", num_models=24, max_rows=(192,)),
    Split(
        name="test-family",
        families=("t5", "t5", *HELD_OUT_FAMILIES),  # only the sizes of T5 are drawn
        num_models=16,
        in_turn=True,
        max_rows=(192,),
    ),
    Split(name="test-gpu", devices=HELD_OUT_DEVICES, num_models=16, max_rows=(192,)),
    *(
        Split(
            name=f"test-size-{times}x",
            sizes=(times * TRAINING_DEVICES, times * TRAINING_DEVICES),
            num_models=16,
            max_rows=(192,),
        )
        for times in (2, 8)
    ),
    Split(
        name=_EVERYTHING,
        families=(*TRAINING_FAMILIES, *HELD_OUT_FAMILIES),
        devices=(*DEVICES, *HELD_OUT_DEVICES),
        sizes=(1, 16384),
        num_models=1024,
        max_rows=(4096,),
    ),
)

SPLITS: Mapping[str, Split] = MappingProxyType({split.name: split for split in _EVERY})
"""By name. ``any``: whatever planning may meet, too large to be stored."""


class InstanceSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One planning problem in words: what ``draw`` gives and JSON holds."""

    model: ModelSpec
    cluster: ClusterSpec
    optimizer: OptimizerName
    max_rows: int
    max_plans: int

    @property
    def name(self) -> str:
        """``MODEL:BATCH:CLUSTER``."""
        return f"{self.model.reference}:{self.model.global_batch}:{self.cluster.name}"

    @property
    def sha256(self) -> str:
        """Of its JSON."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


def split_of(name: str) -> Split:
    """The split of this name; BadRequest where there is none."""
    if name not in SPLITS:
        raise BadRequest(f"instances: no split {name!r}; use one of {', '.join(SPLITS)}")
    return SPLITS[name]


@lru_cache(maxsize=4096)
def model_of(split: Split, number: int) -> ModelSpec:
    """One of the models of ``split``.

    One that validates is not trained on; one that tests differs from both in more than its batch.
    """
    rng = np.random.default_rng((zlib.crc32(split.name.encode()), number, 1))
    families = split.families
    if split.in_turn:
        families = (families[number % len(families)],)
    while True:
        model = draw_model(rng, families)
        if split.name in (_TRAINING, _EVERYTHING):
            return model
        if split.name == _VALIDATION and model not in _models(_TRAINING):
            return model
        if split.name != _VALIDATION and model.reference not in _seen_references():
            return model


@cache
def _models(name: str) -> frozenset[ModelSpec]:
    return frozenset(models_of(SPLITS[name]))


@cache
def _seen_references() -> frozenset[str]:
    return frozenset(
        model.reference for name in (_TRAINING, _VALIDATION) for model in _models(name)
    )


def models_of(split: Split) -> tuple[ModelSpec, ...]:
    """All models of ``split``."""
    return tuple(model_of(split, number) for number in range(split.num_models))


def draw(seed: int, split: str = "train") -> InstanceSpec:
    """The instance that ``seed`` stands for in a split; the same on every machine.

    Its cluster holds parameters, gradients and optimizer state with a quarter to spare, and has at
    most four devices for each sample of the batch.

    Raises:
        BadRequest: no such split.
    """
    among = split_of(split)
    rng = np.random.default_rng((zlib.crc32(split.encode()), seed, 0))
    while True:
        model = model_of(among, int(rng.integers(among.num_models)))
        sgd = bool(rng.random() < _SGD_SHARE)
        optimizer = OptimizerName.SGD if sgd else OptimizerName.ADAMW
        low, high = among.sizes
        high = min(high, model.global_batch * _DEVICES_PER_SAMPLE)
        if high < low:
            continue
        cluster = draw_cluster(
            rng,
            among.devices,
            sizes=(low, high),
            least_memory_bytes=SPARE * state_bytes(model, optimizer),
        )
        if cluster is not None:
            return InstanceSpec(
                model=model,
                cluster=cluster,
                optimizer=optimizer,
                max_rows=int(rng.choice(among.max_rows)),
                max_plans=among.max_plans,
            )


def state_bytes(model: ModelSpec, optimizer: OptimizerName) -> int:
    """Parameters, gradients and optimizer state, with a master copy where precision is low."""
    element = {Precision.FP64: 8, Precision.FP32: 4}.get(model.precision, 2)
    master = 4 if element == 2 else 0
    moments = 2 * max(element, 4) if optimizer is OptimizerName.ADAMW else 0
    return parameters_of(model.reference) * (2 * element + master + moments)


def context_of(
    spec: InstanceSpec,
    programs: Programs,
    *,
    pricing: Pricing = ANALYTIC,
    cluster: Cluster | None = None,
) -> SearchContext:
    """What a planner would be asked for ``spec``.

    Args:
        spec: model, cluster and limits.
        programs: where captured models are kept.
        pricing: what the cost model prices with.
        cluster: stands for that of ``spec``, which describes it as well as it can.

    Raises:
        PlannerError: its model or cluster cannot be had.
    """
    return make_context(
        programs.get(spec.model),
        reference=spec.model.reference,
        cluster=cluster or cluster_of(spec.cluster),
        cluster_name=spec.cluster.name,
        job=JobSpec(
            global_batch=spec.model.global_batch,
            precision=spec.model.precision,
            optimizer=OptimizerSpec(name=spec.optimizer),
        ),
        level="O2",
        pricing=pricing,
    )
