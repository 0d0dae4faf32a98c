"""A row becomes a run, or says what makes no sense."""

from __future__ import annotations

import pytest

from meshwright.bench.runs import run_of_row
from meshwright.errors import BadRequest
from tests.bench.given_runs import row, run


def test_whole_numbers_and_empty_cells() -> None:
    found = run(cp=0, ep=None, head_dim=None, zero_stage=0.0, vocab=1024)

    assert 4 == found.layers
    assert isinstance(found.layers, int)
    assert found.cp is None
    assert found.head_dim is None
    assert 0 == found.zero_stage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 2.5}, "layers is 2.5"),
        ({"layers": -1}, "layers is -1"),
        ({"tp": float("inf")}, "tp is inf"),
        ({"tp": float("nan")}, "tp is nan"),
        ({"zero_stage": 4}, "zero_stage is 4"),
        ({"step_time_s": -1.0}, "step_time_s is -1.0"),
        ({"oom": "maybe"}, "oom is 'maybe'"),
        ({"hidden": "wide"}, "hidden is 'wide'"),
        ({"run_id": None}, "run_id is missing"),
        ({"layers": 1e9}, "layers is 1000000000; more than 1024 is not modeled"),
        ({"hidden": 2.0**19}, "hidden is 524288; more than 262144 is"),
        ({"experts": 5000}, "experts is 5000; more than 4096 is"),
        ({"seq_len": 2.0**25}, "seq_len is 33554432; more than 16777216 is"),
        ({"params_b": 1e9}, "params_b is 1000000000; more than 100000 is"),
    ],
)
def test_senseless_values_are_named(changes: dict[str, str | float], message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        run_of_row(row(**changes))

    assert str(caught.value).startswith(message)


def test_time_from_samples_per_second() -> None:
    """32 samples at 64 a second take half a second; a run out of memory took none."""
    assert 0.5 == run(step_time_s=None, samples_per_s=64.0).measured_s
    assert run(step_time_s=None, samples_per_s=64.0, oom=True).measured_s is None
    assert run(step_time_s=None).measured_s is None


def test_plans_of_one_job() -> None:
    """Runs that differ in degrees are of one job; those that differ in the batch are not."""
    first, second = run(), run(dp=4, pp=1)

    assert first.job_key == second.job_key
    assert first.plan_key != second.plan_key
    assert first.job_key != run(global_batch=64).job_key
    assert first.plan_key == run(cp=1, ep=None).plan_key
