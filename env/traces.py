"""Instances like the jobs of one cluster, from records of what ran there.

Of a job trace come how many GPUs a job has, of which type, and what kind of model it trains; the
sizes of the model are drawn, since traces do not tell them. What operators and collectives cost
there is in the ``Pricing`` that the caller makes of the same records and hands to the ``Maker``.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np

from meshwright.cluster.catalog import find_device
from meshwright.env.clusters import DEVICES, ClusterPart, ClusterSpec, memory_bytes
from meshwright.env.generator import SPARE, InstanceSpec, state_bytes
from meshwright.env.models import TRAINING_FAMILIES, ModelSpec, draw_model
from meshwright.errors import BadClusterFile, BadRequest
from meshwright.plans.plan import OptimizerName
from meshwright.profiling.traces.jobs import JobMixture, SampledJob
from meshwright.records import Kind, RecordStore

__all__ = ["TracedJobs", "families_of"]

_MODELS = 8
"""Of each family, so that capturing one serves many jobs."""
_SAMPLED = 4096
"""Jobs that stand for a trace."""
_TRIES = 200
_MAX_ROWS = (48, 64, 96, 128, 192)
_MAX_PLANS = 1024

_WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "mixtral|moe|expert": ("moe", "gpt-moe"),
        "llama|mistral|qwen": ("llama",),
        "bert": ("bert",),
        r"\bt5|translat|^transformer": ("t5",),
        "gpt|opt|bloom|language|^lm": ("gpt", "llama"),
        r"vit\b|swin|deit": ("vit",),
        "clip": ("clip",),
        "recommend|dlrm|ctr": ("dlrm",),
        "unet|diffusion|gan": ("unet",),
        "resnet|vgg|inception|alexnet|googlenet|mobilenet|densenet|wrn": ("resnet",),
    }
)
"""Words in what a trace calls a model, and the families of the zoo that come nearest."""


def families_of(model: str) -> tuple[str, ...]:
    """Families of the zoo like what a trace calls ``model``; all trained ones for other words."""
    for words, families in _WORDS.items():
        if re.search(words, model.lower()):
            return families
    return TRAINING_FAMILIES


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedJobs:
    """The jobs of a trace as a source of instances."""

    jobs: tuple[SampledJob, ...]
    """Each as often as its share of GPU time."""
    devices: tuple[str, ...]
    """Types for jobs of which the trace names none."""

    @classmethod
    def from_store(cls, folder: Path, *, max_gpus: int = 1024) -> TracedJobs:
        """The jobs that ``meshwright traces import`` has put into the record store ``folder``.

        Raises:
            BadRequest: it cannot be read, or holds no job.
        """
        records, _ = RecordStore(folder).query(kind=Kind.JOB)
        return cls.of(JobMixture.from_records(records), max_gpus=max_gpus)

    @classmethod
    def of(cls, mixture: JobMixture, *, max_gpus: int = 1024) -> TracedJobs:
        """The jobs of ``mixture`` that have at most ``max_gpus``.

        Raises:
            BadRequest: there is none, or of none is known how long it ran.
        """
        rng = np.random.default_rng(zlib.crc32(b"jobs"))
        jobs = mixture.sample(rng, _SAMPLED, max_gpus=max_gpus, by_gpu_time=True)
        named = Counter(job.gpu_type for job in mixture.jobs if _is_known(job.gpu_type))
        return cls(jobs=jobs, devices=tuple(sorted(named)) or DEVICES)

    def draw(self, seed: int) -> InstanceSpec:
        """The instance that ``seed`` stands for.

        Raises:
            BadRequest: of many jobs none had GPUs enough for a model of its kind.
        """
        rng = np.random.default_rng((zlib.crc32(b"traces"), seed))
        for _ in range(_TRIES):
            job = self.jobs[int(rng.integers(len(self.jobs)))]
            model = _model_of(str(rng.choice(families_of(job.model))), int(rng.integers(_MODELS)))
            cluster = self._cluster(job, rng)
            needed = SPARE * state_bytes(model, OptimizerName.ADAMW)
            if memory_bytes(cluster) >= needed and job.num_gpus <= 4 * model.global_batch:
                return InstanceSpec(
                    model=model,
                    cluster=cluster,
                    optimizer=OptimizerName.ADAMW,
                    max_rows=int(rng.choice(_MAX_ROWS)),
                    max_plans=_MAX_PLANS,
                )
        raise BadRequest(
            f"traces: of {_TRIES} jobs none has GPUs enough for a model of its kind; "
            "import a trace of larger jobs"
        )

    def _cluster(self, job: SampledJob, rng: np.random.Generator) -> ClusterSpec:
        """As many hosts as the type usually fills, the last of them perhaps smaller."""
        device = job.gpu_type if _is_known(job.gpu_type) else str(rng.choice(self.devices))
        per_host = find_device(device, where="traces").devices_per_host
        full, rest = divmod(job.num_gpus, per_host)
        sizes = [(full, per_host)] if full else []
        sizes += [(1, rest)] if rest else []
        return ClusterSpec(
            parts=tuple(
                ClusterPart(num_hosts=count, devices_per_host=size, device=device)
                for count, size in sizes
            )
        )


@cache
def _is_known(device: str) -> bool:
    try:
        find_device(device, where="traces")
    except BadClusterFile:
        return False
    return True


@lru_cache(maxsize=1024)
def _model_of(family: str, number: int) -> ModelSpec:
    rng = np.random.default_rng((zlib.crc32(f"traces {family}".encode()), number))
    return draw_model(rng, (family,))
