"""Runs teach others like them, and never a source that gets worse by it."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.bench.step_figures import TimedRuns
from meshwright.bench.step_teaching import Taught, mean_regret, teach
from meshwright.gnn_cost.steps.correction import STEP_FEATURES

UNITS = np.array(list(STEP_FEATURES.values()))
NAMES = list(STEP_FEATURES)


def runs(ratio_of_source: dict[str, float], *, count: int) -> tuple[TimedRuns, np.ndarray]:
    """Of each source so many, 4 of each job; measured is so much of predicted, 1 s."""
    source = np.repeat(list(ratio_of_source), count)
    total = len(source)
    rng = np.random.default_rng(0)
    micro = rng.uniform(-1, 1, total)
    features = np.zeros((total, len(UNITS)))
    features[:, NAMES.index("log_microbatches")] = micro
    ratio = np.repeat(list(ratio_of_source.values()), count)
    found = TimedRuns(
        other_s=np.ones(total),
        optimizer_s=np.zeros(total),
        num_microbatches=np.ones(total),
        num_devices=np.ones(total),
        measured_s=ratio * np.exp(0.1 * micro),
        source=source,
        gpu=np.full(total, "a100"),
        job=np.char.add(source, (np.arange(total) // 4).astype(np.str_)),
        run_id=np.arange(total).astype(np.str_),
    )
    return found, features


def taught(found: TimedRuns, features: np.ndarray) -> Taught:
    return teach(found, features, np.ones(len(found)), [])


def test_a_source_teaches_its_own_jobs() -> None:
    found, features = runs({"a": 1.2}, count=40)
    got = taught(found, features)

    assert got.document is not None
    own = got.by_job["a"]
    assert own.mape[1] < 0.02 < 0.15 < own.mape[0]
    assert own.regret[1] < own.regret[0]
    assert own.mean_trust > 0.9
    assert {} == got.left_out


def test_few_runs_teach_nothing() -> None:
    found, features = runs({"a": 1.2}, count=20)

    assert taught(found, features).document is None


def test_sources_that_contradict_each_other_teach_nothing() -> None:
    """Alike in every feature, one slower than predicted and one faster: each harms the other."""
    found, features = runs({"a": 1.3, "b": 0.77}, count=40)
    got = taught(found, features)

    assert got.document is None
    assert {"a", "b"} == {name for name, one in got.left_out.items() if one.is_harmed}


@pytest.mark.parametrize("feature", ["log_flop_per_s", "log_devices", "gather_share"])
def test_sources_apart_leave_each_other_alone(feature: str) -> None:
    """On other devices, on more of them, with other ZeRO: trust is 0 there and the factor 1."""
    found, features = runs({"a": 1.3, "b": 0.77}, count=40)
    features[40:, NAMES.index(feature)] += 6 * STEP_FEATURES[feature]
    got = taught(found, features)

    assert got.document is not None
    for one in got.left_out.values():
        assert one.mape[0] == pytest.approx(one.mape[1], abs=0.002)
        assert one.mean_trust < 0.05


def test_regret_is_that_of_the_plan_predicted_fastest() -> None:
    measured_s = np.array([1.0, 1.5, 2.0, 3.0])
    job = np.array(["a", "a", "b", "b"])

    assert pytest.approx(0.25) == mean_regret(np.array([2.0, 1.0, 1.0, 2.0]), measured_s, job)
    assert 0.0 == mean_regret(measured_s, measured_s, job)
    assert 0.0 == mean_regret(measured_s, measured_s, np.array(["a", "b", "c", "d"]))
