"""``models``, ``clusters`` and ``doctor``."""

from __future__ import annotations

import pytest

from meshwright.cli.doctor import check_gloo
from tests.cli.conftest import Run


def test_one_model(meshwright: Run) -> None:
    found = meshwright("models", "tiny-gpt?num_layers=2", "--json").document

    assert "gpt" == found["family"]
    assert 2 == found["config"]["num_layers"]
    # tokens 256 x 64, positions 32 x 64, two layers of 12 x 64 x 64 + 13 x 64, last norm 2 x 64
    assert 16384 + 2048 + 2 * (49152 + 832) + 128 == found["num_parameters"]


def test_coverage_of_one_model(meshwright: Run) -> None:
    """Operators with their rules, and the sizes that tensor parallelism must divide."""
    found = meshwright("models", "tiny-gpt?num_layers=2", "--json").document["coverage"]
    (attention,) = [segment for segment in found["segments"] if "heads" in segment["sizes"]]

    assert 1.0 == found["covered_fraction"]
    assert all(item["has_rule"] for item in found["operators"])
    assert abs(sum(item["flop_fraction"] for item in found["operators"]) - 1) < 1e-9
    assert 4 == attention["sizes"]["heads"]
    assert 2 == attention["count"]


def test_all_models(meshwright: Run) -> None:
    found = meshwright("models", "--json").document["models"]
    sizes = {item["name"]: item["num_parameters"] for item in found}

    assert 124_439_808 == sizes["gpt2"]
    assert {"llama3-8b", "mixtral-8x7b", "gpt3-175b"} <= set(sizes)


def test_all_devices(meshwright: Run) -> None:
    found = meshwright("clusters", "--json").document["devices"]

    assert {"h100-sxm-80gb", "cpu"} <= {item["name"] for item in found}
    assert [] == [item["name"] for item in found if not item["source"]]


def test_one_cluster(meshwright: Run) -> None:
    found = meshwright("clusters", "12xh100", "--json").document

    assert 12 == found["num_devices"]
    assert 2 == found["num_hosts"]
    assert "12 devices" in meshwright("clusters", "12xh100").out


def test_unknown_device_says_what_is_near(meshwright: Run) -> None:
    answer = meshwright("clusters", "8xh10")

    assert 1 == answer.status
    assert "did you mean h100" in answer.err


@pytest.mark.dist
def test_doctor_finds_this_machine_well(meshwright: Run) -> None:
    answer = meshwright("doctor", "--json")

    assert 0 == answer.status
    assert answer.document["gloo_works"]
    assert [] == answer.document["problems"]
    assert answer.document["num_cores"] >= 1
    assert answer.document["packages"]["torch"]


def test_gloo_check_says_what_failed() -> None:
    assert "ValueError: no network" == check_gloo("raise ValueError('no network')")


def test_gloo_check_ends_in_time() -> None:
    assert "no answer within 0.5 s" == check_gloo("import time; time.sleep(60)", timeout_s=0.5)
