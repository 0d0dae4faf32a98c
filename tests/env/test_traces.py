"""Instances like the jobs of a trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from meshwright.env.clusters import DEVICES, num_devices
from meshwright.env.models import TRAINING_FAMILIES, family_of
from meshwright.env.traces import TracedJobs, families_of
from meshwright.errors import BadRequest
from meshwright.profiling.traces.importing import import_traces
from meshwright.profiling.traces.jobs import Job, JobMixture
from meshwright.records import RecordStore


def mixture(*jobs: tuple[int, str, str]) -> JobMixture:
    return JobMixture(
        jobs=tuple(
            Job(
                num_gpus=gpus,
                duration_s=3600.0,
                submit_s=None,
                cluster="one",
                gpu_type=gpu,
                model=model,
            )
            for gpus, gpu, model in jobs
        ),
        gaps_s=np.zeros(0),
    )


@pytest.mark.parametrize(
    ("model", "families"),
    [
        ("ResNet-50 (batch size 32)", ("resnet",)),
        ("vgg19", ("resnet",)),
        ("Transformer (batch size 16)", ("t5",)),
        ("LM (batch size 5)", ("gpt", "llama")),
        ("Recommendation (batch size 512)", ("dlrm",)),
        ("CycleGAN", ("unet",)),
        ("Mixtral-8x7B", ("moe", "gpt-moe")),
        ("BERT-large", ("bert",)),
        ("A3C", TRAINING_FAMILIES),
    ],
)
def test_families_by_what_traces_call_models(model: str, families: tuple[str, ...]) -> None:
    assert families == families_of(model)


def test_instances_have_the_gpus_of_the_jobs() -> None:
    """12 A100 stand on a host of 8 and one of 4."""
    jobs = TracedJobs.of(mixture((12, "a100-sxm-80gb", "gpt-small"), (6, "h100-sxm-80gb", "bert")))
    specs = [jobs.draw(seed) for seed in range(30)]
    by_size = {num_devices(spec.cluster): spec for spec in specs}

    assert specs == [jobs.draw(seed) for seed in range(30)]
    assert {6, 12} == set(by_size)
    parts = by_size[12].cluster.parts
    assert [(1, 8), (1, 4)] == [(part.num_hosts, part.devices_per_host) for part in parts]
    assert {"a100-sxm-80gb"} == {part.device for part in parts}
    assert {"bert"} == {
        family_of(spec.model.reference) for spec in specs if num_devices(spec.cluster) == 6
    }


def test_an_imported_trace_is_drawn_from(tmp_path: Path) -> None:
    table = tmp_path / "jobs.csv"
    table.write_text(
        "job_id,duration_s,gpus,gpu_type,model\n"
        "a,100,8,h100,gpt\n"
        "b,100,4,,resnet50\n"
        "c,100,2048,h100,gpt\n",
        encoding="utf-8",
    )
    store = RecordStore(tmp_path / "records")
    store.append(record for one in import_traces([table]) for record in one.records)
    jobs = TracedJobs.from_store(tmp_path / "records")
    specs = [jobs.draw(seed) for seed in range(20)]

    assert ("h100-sxm-80gb",) == jobs.devices
    assert {4, 8} == {num_devices(spec.cluster) for spec in specs}
    assert {"h100-sxm-80gb"} == {part.device for spec in specs for part in spec.cluster.parts}


def test_jobs_of_unknown_types_get_any() -> None:
    jobs = TracedJobs.of(mixture((4, "unknown", "resnet50")))
    drawn = {part.device for seed in range(20) for part in jobs.draw(seed).cluster.parts}

    assert DEVICES == jobs.devices
    assert len(drawn) > 5


def test_a_store_without_jobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="import a job trace"):
        TracedJobs.from_store(tmp_path)


def test_jobs_too_small_for_their_models_are_refused() -> None:
    """The smallest DLRM takes 8.6 GB with AdamW, a P4 has 8."""
    jobs = TracedJobs.of(mixture((1, "p4", "dlrm")))

    with pytest.raises(BadRequest, match="none has GPUs enough"):
        jobs.draw(0)
