"""What is learned on and what weights are chosen by: different problems, about different models."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshwright.agents import syllabus
from meshwright.agents.syllabus import Syllabus, cluster_syllabus, traced_syllabus
from meshwright.cluster import parse_cluster
from meshwright.env import traces
from meshwright.env.generator import SPLITS, InstanceSpec, Split, models_of
from meshwright.env.models import ModelSpec
from meshwright.errors import BadRequest
from meshwright.plans.plan import Precision
from tests.cli.small_training import store_of_jobs, tiny_model


def tiny(batch: int) -> ModelSpec:
    return ModelSpec(reference="tiny-mlp", global_batch=batch, precision=Precision.BF16)


def problems(specs: tuple[InstanceSpec, ...]) -> set[tuple[object, ...]]:
    return {(spec.model, spec.cluster, spec.optimizer) for spec in specs}


def require_different(found: Syllabus) -> None:
    everything = (*found.train, *found.validation)
    assert len(problems(everything)) == len(everything)
    trained, validated = ({spec.model for spec in one} for one in (found.train, found.validation))
    assert set() == trained & validated


@pytest.mark.parametrize("cluster", ["64xh100", "1xh100"])
def test_on_one_cluster_no_problem_counts_twice_and_no_trained_model_validates(
    cluster: str,
) -> None:
    found = cluster_syllabus(parse_cluster(cluster), 100)

    require_different(found)
    assert (100, 12) == (len(found.train), len(found.validation))
    assert {spec.model for spec in found.train} <= set(models_of(SPLITS["train"]))
    assert {spec.model for spec in found.validation} <= set(models_of(SPLITS["validation"]))
    assert found.sha256 == cluster_syllabus(parse_cluster(cluster), 100).sha256


def test_where_there_are_fewer_problems_than_asked_for_all_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One model to learn on and one to validate with, each with both optimizers."""
    models = {"train": (tiny(16),), "validation": (tiny(32),)}
    monkeypatch.setattr(syllabus, "models_of", lambda split: models[split.name])
    found = cluster_syllabus(parse_cluster("cpu:4"), 100)

    require_different(found)
    assert (2, 2) == (len(found.train), len(found.validation))


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ({"train": 1, "validation": 64}, "of the 1 models to learn on none fits"),
        ({"train": 64, "validation": 1}, "of the 1 models to validate with none fits"),
    ],
)
def test_a_cluster_that_no_model_fits_is_refused(
    monkeypatch: pytest.MonkeyPatch, batches: dict[str, int], said: str
) -> None:
    def models(split: Split) -> tuple[ModelSpec, ...]:
        return (tiny(batches[split.name]),)

    monkeypatch.setattr(syllabus, "models_of", models)

    with pytest.raises(BadRequest, match=f"--finetune: cpu.*: {said} .*general planner"):
        cluster_syllabus(parse_cluster("cpu:8"))


def test_jobs_of_a_trace_that_differ_in_rows_alone_are_one_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two models on two sizes of cluster, however many rows each may have."""
    monkeypatch.setattr(traces, "_model_of", tiny_model)
    found = traced_syllabus(store_of_jobs(tmp_path / "store"), 20)

    require_different(found)
    assert (2, 2) == (len(found.train), len(found.validation))
