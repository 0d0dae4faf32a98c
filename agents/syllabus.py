"""What a planner learns on and what its weights are chosen by, in words: two lists of instances.

In general the frozen sets of ``env.frozen``; or the jobs of a trace; or models on one cluster.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from meshwright.cluster.model import Cluster
from meshwright.env.clusters import ClusterPart, ClusterSpec
from meshwright.env.frozen import frozen_specs, specs_sha256
from meshwright.env.generator import SPARE, SPLITS, InstanceSpec, models_of, state_bytes
from meshwright.env.models import ModelSpec
from meshwright.env.traces import TracedJobs
from meshwright.errors import BadRequest
from meshwright.plans.plan import OptimizerName

__all__ = ["Syllabus", "cluster_syllabus", "general_syllabus", "traced_syllabus"]

_DRAWN = 400
"""Instances of a trace or a cluster where no number is given."""

_LEAST_VALIDATION = 8
_VALIDATION_SHARE = 0.125
_DEVICES_PER_SAMPLE = 4
_MAX_ROWS = 192
_MAX_PLANS = 1024
_SGD_SHARE = 0.15
_TRIES_PER_INSTANCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Syllabus:
    """Instances to learn on, and others to choose weights by."""

    name: str
    train: tuple[InstanceSpec, ...]
    validation: tuple[InstanceSpec, ...]
    cluster: Cluster | None = None
    """Where all of them run; ``None``: each says it."""

    @property
    def sha256(self) -> str:
        """Of all specifications in order, and of the cluster."""
        words = f"{specs_sha256(self.train)} {specs_sha256(self.validation)} {self.cluster or ''}"
        return hashlib.sha256(words.encode()).hexdigest()


def general_syllabus(count: int | None = None) -> Syllabus:
    """The frozen training and validation sets; of each the first ones where ``count`` is given.

    Raises:
        BadRequest: what is drawn is not what was frozen.
    """
    return Syllabus(
        name="general",
        train=_of_frozen("train", count),
        validation=_of_frozen("validation", None if count is None else _num_validation(count)),
    )


def traced_syllabus(folder: Path, count: int | None = None) -> Syllabus:
    """Jobs like those of the trace in the record store ``folder``, by their share of GPU time.

    Raises:
        BadRequest: the store cannot be read, or holds no such jobs.
    """
    jobs = TracedJobs.from_store(folder)
    return _drawn("traces", jobs.draw, count or _DRAWN)


def cluster_syllabus(cluster: Cluster, count: int | None = None) -> Syllabus:
    """Models on all of ``cluster``: of the training split to learn on, others to validate with.

    Those that validate are of the validation split: on none of them were general weights trained.

    Raises:
        BadRequest: no model of one of the splits fits the cluster.
    """
    count = count or _DRAWN
    return Syllabus(
        name="cluster",
        train=_different(_draw_on(cluster, "train"), count),
        validation=_different(_draw_on(cluster, "validation"), _num_validation(count)),
        cluster=cluster,
    )


def _draw_on(cluster: Cluster, split: str) -> Callable[[int], InstanceSpec]:
    """What a seed stands for: one of the split's models that fit."""
    where = _described(cluster)
    size = sum(host.num_devices for host in cluster.hosts)
    held_bytes = sum(host.num_devices * host.device.memory_bytes for host in cluster.hosts)
    models = models_of(SPLITS[split])
    fitting = [
        model
        for model in models
        if size <= model.global_batch * _DEVICES_PER_SAMPLE
        and held_bytes >= SPARE * state_bytes(model, OptimizerName.SGD)
    ]
    if not fitting:
        purpose = {"train": "to learn on", "validation": "to validate with"}[split]
        raise BadRequest(
            f"--finetune: {cluster.name}: of the {len(models)} models {purpose} none fits its "
            f"memory with a batch for {size} devices; plan with the general planner"
        )

    def drawn(seed: int) -> InstanceSpec:
        rng = np.random.default_rng((zlib.crc32(b"cluster"), seed))
        model = fitting[int(rng.integers(len(fitting)))]
        needed = SPARE * state_bytes(model, OptimizerName.ADAMW)
        is_roomy = held_bytes >= needed and rng.random() > _SGD_SHARE
        return InstanceSpec(
            model=model,
            cluster=where,
            optimizer=OptimizerName.ADAMW if is_roomy else OptimizerName.SGD,
            max_rows=int(rng.choice((64, 96, 128, _MAX_ROWS))),
            max_plans=_MAX_PLANS,
        )

    return drawn


def _of_frozen(name: str, count: int | None) -> tuple[InstanceSpec, ...]:
    return frozen_specs(name, count)


def _num_validation(count: int) -> int:
    return max(_LEAST_VALIDATION, round(count * _VALIDATION_SHARE))


def _drawn(name: str, draw_one: Callable[[int], InstanceSpec], count: int) -> Syllabus:
    """``count`` different problems of rising seeds; a few whole models of them validate.

    Raises:
        BadRequest: they are about fewer than two models.
    """
    found = _different(draw_one, count + _num_validation(count))
    by_model = Counter(spec.model for spec in found)
    if len(by_model) < 2:
        raise BadRequest(
            f"instances: {name} gives {len(found)} about one model, but those to judge by must be "
            "about others than those to learn on; ask for more, or use the general planner"
        )
    held_out: set[ModelSpec] = set()
    in_order = sorted(by_model, key=lambda model: zlib.crc32(msgspec.json.encode(model)))
    for model in in_order[:-1]:
        held_out.add(model)
        if sum(by_model[one] for one in held_out) >= len(found) * _VALIDATION_SHARE:
            break
    return Syllabus(
        name=name,
        train=tuple(spec for spec in found if spec.model not in held_out),
        validation=tuple(spec for spec in found if spec.model in held_out),
    )


def _different(draw_one: Callable[[int], InstanceSpec], count: int) -> tuple[InstanceSpec, ...]:
    """The first ``count`` different problems of rising seeds; fewer where there are not so many.

    However many rows are kept of it, the problem is the same.
    """
    found: dict[tuple[object, ...], InstanceSpec] = {}
    for seed in range(_TRIES_PER_INSTANCE * count):
        spec = draw_one(seed)
        found.setdefault((spec.model, spec.cluster, spec.optimizer), spec)
        if len(found) == count:
            break
    return tuple(found.values())


def _described(cluster: Cluster) -> ClusterSpec:
    """The cluster's hosts; links are those of the cluster itself."""
    parts: list[ClusterPart] = []
    for host in cluster.hosts:
        same = parts and (parts[-1].device, parts[-1].devices_per_host) == (
            host.device.name,
            host.num_devices,
        )
        num_hosts = parts.pop().num_hosts + 1 if same else 1
        parts.append(
            ClusterPart(
                num_hosts=num_hosts, devices_per_host=host.num_devices, device=host.device.name
            )
        )
    return ClusterSpec(parts=tuple(parts))
