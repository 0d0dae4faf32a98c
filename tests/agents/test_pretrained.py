"""The planner that comes with the package."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.agents.evaluation import Evaluator
from meshwright.agents.planner import PRETRAINED, PolicyDecider
from meshwright.agents.policy import OnInstances, PlacementPolicy
from meshwright.agents.syllabus import general_syllabus
from meshwright.agents.weights import load_policy, new_policy
from meshwright.env.compiled import compile_instances
from meshwright.env.files import write_instance
from meshwright.env.graph import NUM_NODE_FEATURES
from meshwright.env.toys import toy_instances
from meshwright.errors import BadRequest
from tests.agents import held_out

SAMPLING_SEEDS = range(5)
"""Which samples are drawn moves a mean over so few instances; this many are averaged."""

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_is_small_and_says_how_to_make_it_again() -> None:
    """Its command names the very instances that the card tells the hash of."""
    _, card = load_policy(PRETRAINED)
    words = shlex.split(str(card["reproduce"]))
    count = int(words[words.index("--instances") + 1]) if "--instances" in words else None
    syllabus = general_syllabus(count)

    assert 5_000_000 > PRETRAINED.stat().st_size
    assert ["meshwright", "train"] == words[:2]
    assert {"name": syllabus.name, "sha256": syllabus.sha256} == card["instances"]
    assert "finished" == card["status"]


def test_it_plans_what_it_did_not_train_on_far_better_than_untrained_policies() -> None:
    """Weights were chosen by the set these are of.

    Greedy: how many times slower than the best plan, as a logarithm; sampled: the gap.
    """
    instances = list(held_out.stored().values())
    compiled = compile_instances(instances)
    decider = PolicyDecider.pretrained()
    evaluator = Evaluator(compiled, num_samples=16, temperature=decider.temperature)

    def losses(policy: PlacementPolicy) -> tuple[float, float]:
        on_all = OnInstances(policy, [item.graph for item in instances])
        found = [evaluator.evaluate(on_all, seed=seed) for seed in SAMPLING_SEEDS]
        greedy = float(np.log1p(found[0].greedy_gap).mean())
        return greedy, float(np.mean([item.sampled_gap for item in found]))

    greedy, sampled = losses(decider.policy)
    untrained = [losses(new_policy(seed=seed)) for seed in range(3)]

    assert 0.05 >= sampled
    assert min(other for other, _ in untrained) > 2 * greedy
    assert min(other for _, other in untrained) > 3 * sampled


def test_the_stored_instances_are_of_every_family_of_their_set_and_of_this_version() -> None:
    families = {name.split("-", 2)[2] for name in held_out.stored()}

    assert {"gpt", "llama", "moe", "gpt-moe", "bert", "resnet", "mlp"} == families


def test_a_stored_instance_of_an_older_version_says_how_to_make_it_again(tmp_path: Path) -> None:
    toy = toy_instances()[0]
    narrow = replace(toy.graph, node_features=toy.graph.node_features[:, 1:])
    write_instance(replace(toy, graph=narrow), tmp_path / "old.safetensors")
    num_features = NUM_NODE_FEATURES - 1

    with pytest.raises(
        BadRequest, match=rf"old\.safetensors: {num_features} features .*; make all again: python"
    ):
        held_out.stored(tmp_path)
    (tmp_path / "old.safetensors").write_bytes(b"rubbish")
    with pytest.raises(BadRequest, match=r"^[^\n]*; make all again: python [^\n]*$"):
        held_out.stored(tmp_path)
    with pytest.raises(BadRequest, match="no instances; make them: python"):
        held_out.stored(tmp_path / "none")
