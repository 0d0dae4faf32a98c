"""Trainings of seconds: three tiny instances, and stores of jobs and costs to learn on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from meshwright.env.clusters import ClusterPart, ClusterSpec
from meshwright.env.files import read_instance
from meshwright.env.generator import InstanceSpec
from meshwright.env.models import ModelSpec
from meshwright.plans.plan import OptimizerName, Precision
from meshwright.profiling.traces.importing import import_traces
from meshwright.records import Kind, Record, RecordStore, record_of_timing, timing_of

__all__ = [
    "SETS",
    "SMALL",
    "all_reduce_of_t4",
    "linear_of_t4",
    "slowest_by_name",
    "store_of_jobs",
    "tiny_model",
]

SMALL = (
    *("--imitation", "2", "--ppo", "2", "--expert", "0", "--validate-every", "1"),
    *("--envs", "32", "--hidden", "8", "--instances", "2", "--processes", "1", "--json"),
)


def _spec_of(model: str, hosts: int, batch: int = 16) -> InstanceSpec:
    parts = (ClusterPart(num_hosts=hosts, devices_per_host=2, device="t4"),)
    return InstanceSpec(
        model=ModelSpec(reference=model, global_batch=batch, precision=Precision.BF16),
        cluster=ClusterSpec(parts=parts),
        optimizer=OptimizerName.ADAMW,
        max_rows=24,
        max_plans=64,
    )


SETS = {
    "train": (_spec_of("tiny-mlp", 2), _spec_of("tiny-mlp", 1)),
    "validation": (_spec_of("tiny-mlp", 1, batch=32),),
}


def tiny_model(family: str, number: int) -> ModelSpec:
    """Stands for the models that a trace names."""
    del family
    batch = 16 << number % 2
    return ModelSpec(reference="tiny-mlp", global_batch=batch, precision=Precision.BF16)


def store_of_jobs(folder: Path, *others: Record) -> Path:
    """A record store with a trace of eight jobs on 2 or 4 T4, and with ``others``."""
    table = folder.with_suffix(".csv")
    rows = [f"{n},{100 + n},{2 + 2 * (n % 2)},t4,gpt" for n in range(8)]
    table.write_text("\n".join(["job_id,duration_s,gpus,gpu_type,model", *rows]), encoding="utf-8")
    store = RecordStore(folder)
    store.append([record for one in import_traces([table]) for record in one.records])
    store.append(others)
    return folder


def linear_of_t4(m: int) -> Record:
    """A linear layer at 15 TFLOP/s, a quarter of what the data sheet says of fp16."""
    return record_of_timing(
        timing_of([2 * m * 4096 * 4096 / 15e12]),
        kind=Kind.OPERATOR,
        name="linear",
        device="t4",
        verb="test",
        method="by formula",
        extra={"direction": "fwd", "dtype": "fp16", "m": m, "n": 4096, "k": 4096},
    )


def all_reduce_of_t4(num_bytes: int) -> Record:
    """Of two devices of a host, at 2 GB/s."""
    return record_of_timing(
        timing_of([num_bytes / 2e9]),
        kind=Kind.COLLECTIVE,
        name="all_reduce",
        device="t4",
        verb="test",
        method="by formula",
        extra={"bytes": num_bytes, "group_size": 2, "hosts": 1, "backend": "nccl"},
    )


def slowest_by_name(cache: Path) -> dict[str, set[float]]:
    """Of each instance that lies in a cache: the time of the slowest plan, by prices."""
    found: dict[str, set[float]] = {}
    for path in (cache / "instances").glob("*.safetensors"):
        instance = read_instance(path)
        rooms = [instance.rooms.open(row).time_s for row in range(len(instance.rows))]
        time_s = max(float(np.max(room[np.isfinite(room)], initial=0.0)) for room in rooms)
        found.setdefault(instance.name, set()).add(time_s)
    return found
