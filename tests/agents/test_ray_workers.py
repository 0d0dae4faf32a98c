"""Rollouts and sweeps on a local Ray cluster, where Ray is installed.

Nearly all the time goes into what worker processes import. So there are few of them, on one cluster
of two CPUs, and this file imports no PyG, which brings half of PyTorch with it.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.agents.ppo import PPO, PPOConfig
from meshwright.agents.ray_workers import RayPPO, concatenated, ray_session, sweep
from meshwright.env.batched import BatchedPlacement
from meshwright.env.instance import MAX_CANDIDATES
from meshwright.env.observation import NUM_STATE
from meshwright.env.toys import toy_instances
from meshwright.errors import BadRequest
from meshwright.tracking import file_sha256

TOYS = toy_instances()
EXAMPLE = Path(__file__).parents[2] / "examples" / "planner_on_ray.py"


class Linear(nn.Module):
    """A logit for every candidate, and the value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(NUM_STATE, MAX_CANDIDATES + 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        found = self.layer(observation["state"])
        return found[:, :-1], found[:, -1]


def made(seed: int = 0) -> PPO:
    environment = BatchedPlacement(TOYS, 16, group_size=8)
    config = PPOConfig(
        baseline="group",
        group_size=8,
        num_steps=environment.max_decisions,
        num_minibatches=2,
        num_epochs=1,
        seed=seed,
    )
    return PPO(Linear(), environment, config, num_iterations=4)


def test_rollouts_are_joined_in_order() -> None:
    one, other = made(0).collect()[0], made(1).collect()[0]
    joined = concatenated([one, other])

    assert len(one.action_N) + len(other.action_N) == len(joined.action_N)
    assert torch.equal(other.action_N, joined.action_N[len(one.action_N) :])
    assert torch.equal(one.observation["state"], joined.observation["state"][: len(one.action_N)])


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(BadRequest, match=r"meshwright\[ray\]"), ray_session():
        pass


def test_without_ray_the_example_says_so_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")

    expected = "skipped: Ray is not installed; run pip install 'meshwright[ray]'\n"
    assert expected == capsys.readouterr().out


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    with ray_session(num_cpus=2):
        yield


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.usefixtures("session")
def test_a_sweep_answers_in_order_and_survives_what_fails() -> None:
    def train(setting: Mapping[str, Any]) -> Mapping[str, float]:
        if setting["x"] == 2:
            raise BadRequest("x is 2; take another")
        return {"gap": float(setting["x"]) ** 2}

    found = sweep(train, [{"x": 1}, {"x": 2}, {"x": 3}])

    assert [{"gap": 1.0}, None, {"gap": 9.0}] == [one.figures for one in found]
    assert ["", "x is 2; take another", ""] == [one.problem for one in found]


def weights(ppo: PPO) -> torch.Tensor:
    return torch.cat([item.flatten() for item in ppo.policy.state_dict().values()])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.usefixtures("session")
def test_workers_play_and_a_run_taken_up_again_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Taken up by workers that have played on since, one of which died: neither must matter."""
    whole = RayPPO(made(), made, num_workers=2)
    alone = made().collect()[0]
    steps = [whole.train_iteration() for _ in range(2)]
    half = weights(whole.ppo)
    whole.save(tmp_path / "half.safetensors")
    whole.train_iteration()
    expected = weights(whole.ppo)
    whole.load(tmp_path / "half.safetensors")
    restored = weights(whole.ppo)
    sys.modules["ray"].kill(whole._workers[0], no_restart=False)
    last = whole.train_iteration()
    whole.close()

    with pytest.raises(BadRequest, match="99 workers need as many CPUs; the cluster has 2"):
        RayPPO(made(), made, num_workers=99)
    assert steps[0].num_env_steps > 1.5 * len(alone.action_N)
    assert 3 == whole.iteration == last.number
    assert torch.equal(half, restored)
    assert torch.equal(expected, weights(whole.ppo))
    assert not torch.equal(half, expected)
    assert steps[0].metrics["first_ratio_error"] < 1e-5


@pytest.mark.slow
@pytest.mark.dist
def test_the_example_makes_a_planner_that_planning_takes(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    words = [sys.executable, str(EXAMPLE), "-o", str(tmp_path / "p")]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()
    plan = ("plan", "tiny-llama", "--cluster", "2x4xt4", "--global-batch", "32", "-O2")
    words = [sys.executable, "-m", "meshwright.cli", *plan, "--planner", str(tmp_path / "p")]
    planned = subprocess.run([*words, "--json"], check=True, capture_output=True, text=True)
    found = json.loads(planned.stdout)["plan"]["provenance"]["planner"]

    assert "4 instances to learn on, 2 to validate with" == said[0]
    assert file_sha256(tmp_path / "p" / "planner.safetensors")[:12] == found
