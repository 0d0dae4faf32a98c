"""A whole run on the toys: it learns, goes on bit for bit, and nothing it says can stop it."""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from meshwright.agents.imitation import ImitationConfig
from meshwright.agents.policy import PlacementPolicy
from meshwright.agents.ppo import Iteration, PPOConfig
from meshwright.agents.training import Training, TrainingSettings
from meshwright.agents.weights import load_policy, new_policy, save_policy
from meshwright.env.toys import toy_instances
from meshwright.errors import BadRequest
from meshwright.tracking import LocalTracker, Tracker, read_lines

DOCS = Path(__file__).parents[2] / "docs" / "train.md"
HALVES = ("half", "whole")
TOYS = toy_instances()
SETTINGS = TrainingSettings(
    hidden=16,
    num_envs=32,
    imitation_iterations=4,
    imitation=ImitationConfig(learning_rate=5e-3, num_minibatches=2),
    ppo_iterations=4,
    ppo=PPOConfig(
        baseline="group", group_size=8, num_minibatches=2, num_epochs=1, learning_rate=1e-3
    ),
    expert_iterations=2,
    expert_samples=8,
    validate_every=2,
    validation_samples=4,
)


class Stopped(Exception):
    """Ends a run at some iteration."""


def training(folder: Path, settings: TrainingSettings = SETTINGS, **given: Any) -> Training:
    tracker: Tracker = given.pop("tracker", None) or LocalTracker(folder / "log")
    return Training(settings, TOYS, TOYS, folder=folder, tracker=tracker, **given)


def weights(policy: PlacementPolicy) -> torch.Tensor:
    return torch.cat([item.flatten() for item in policy.state_dict().values()])


@pytest.mark.parametrize("stop_at", [("imitation", 3), ("ppo", 1), ("ppo", 4), ("expert", 1)])
def test_a_run_goes_on_bit_for_bit_in_every_phase(tmp_path: Path, stop_at: tuple[str, int]) -> None:
    def stop(phase: str, found: Iteration) -> None:
        if (phase, found.number) == stop_at:
            raise Stopped

    whole = training(tmp_path / "whole")
    expected = whole.run()
    with pytest.raises(Stopped):
        training(tmp_path / "half").run(stop)
    second = training(tmp_path / "half")
    found = second.run()

    assert torch.equal(weights(whole.policy), weights(second.policy))
    assert torch.equal(weights(expected), weights(found))
    assert whole.progress == second.progress


def test_a_run_tells_every_iteration_and_keeps_the_best(tmp_path: Path) -> None:
    run = training(tmp_path, card={"data": "toys"})
    run.run()
    lines = (tmp_path / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    told = [(line["group"], line["step"]) for line in map(json.loads, lines)]
    gaps = [
        line["sampled_gap_mean"] for line in map(json.loads, lines) if line["group"] == "validation"
    ]
    card = json.loads((tmp_path / "best.json").read_text(encoding="utf-8"))
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_file())

    assert [("imitation", number) for number in (1, 2, 3, 4)] == [
        pair for pair in told if pair[0] == "imitation"
    ]
    assert [2, 4, 6, 8, 10] == [step for group, step in told if group == "validation"]
    assert min(gaps) == pytest.approx(run.progress.best_gap)
    assert "toys" == card["data"]
    assert ["best.json", "best.safetensors", "expert-2.rank0.safetensors", "progress.json"] == left


def test_iterations_told_twice_are_told_apart(tmp_path: Path) -> None:
    """Killed after an iteration beyond the checkpoint, which therefore comes again."""

    def die(phase: str, found: Iteration) -> None:
        if (phase, found.number) == ("imitation", 3):
            raise Stopped

    with pytest.raises(Stopped):
        training(tmp_path / "half").run(die)
    training(tmp_path / "half").run()
    training(tmp_path / "whole").run()
    half, whole = (read_lines(tmp_path / name / "log" / "metrics.jsonl")[0] for name in HALVES)
    twice = [line for line in half if ("imitation", 3) == (line["group"], line["step"])]
    last = {(line["group"], line["step"]): figures(line) for line in half}

    assert [1, 2] == [line["attempt"] for line in twice]
    assert len(whole) + 1 == len(half)
    assert last == {(line["group"], line["step"]): figures(line) for line in whole}


def figures(line: Mapping[str, Any]) -> dict[str, Any]:
    """What an iteration gave, whenever it ran."""
    return {name: value for name, value in line.items() if name not in ("attempt", "iteration_s")}


def test_every_metric_is_defined_in_the_documentation(tmp_path: Path) -> None:
    """By a row with its unit, what is better, and what it is; and no other is."""
    training(tmp_path).run()
    lines, _ = read_lines(tmp_path / "log" / "metrics.jsonl")
    own = {"group", "step", "attempt"}
    told = {f"{line['group']}/{name}" for line in lines for name in {*line} - own}
    text = DOCS.read_text(encoding="utf-8")
    table = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    rows = [row for row in table if "/" in row[0]]
    defined = [name for row in rows for name in re.findall("`([^`]+)`", row[0])]

    assert told == {*defined}
    assert len(defined) == len({*defined})
    assert [] == [row for row in rows if len(row) != 4 or not all(map(str.strip, row))]


@pytest.mark.parametrize("baseline", ["group", "best", "value"])
def test_the_toys_are_learned_without_a_teacher(tmp_path: Path, baseline: str) -> None:
    """Two of the three: the trap hides its optimum behind what looks worst."""
    ppo = PPOConfig(
        baseline=baseline,  # type: ignore[arg-type]
        group_size=1 if baseline == "value" else 8,
        gamma=1.0,
        num_minibatches=2,
        num_epochs=2,
        learning_rate=1e-2,
        entropy_weight=0.01,
    )
    settings = replace(
        SETTINGS,
        num_envs=64,
        imitation_iterations=0,
        expert_iterations=0,
        ppo_iterations=40,
        validate_every=20,
        ppo=ppo,
        randomization=0.0,
    )
    run = Training(
        settings, TOYS[:2], TOYS[:2], folder=tmp_path, tracker=LocalTracker(tmp_path / "log")
    )
    before = run.validate().greedy_gap.max()
    run.run()
    after = run.validate()

    assert before > 0.1
    assert [0.0, 0.0] == after.greedy_gap.tolist()


class Broken:
    """Fails at everything it is told."""

    def _fail(self, *args: object, **kwargs: object) -> None:
        raise OSError("the disk is full")

    config = metrics = table = artifact = summary = finish = _fail


def test_a_tracker_that_fails_stops_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Broken failed and is off"):
        found = training(tmp_path / "broken", tracker=Broken()).run()
    expected = training(tmp_path / "whole").run()

    assert torch.equal(weights(expected), weights(found))


def test_a_curriculum_decides_what_is_played(tmp_path: Path) -> None:
    asked: list[float] = []
    seen: set[int] = set()

    def curriculum(done: float) -> np.ndarray:
        asked.append(done)
        return np.array([0]) if done < 0.5 else np.array([1, 2])

    run = training(tmp_path, curriculum=curriculum)
    network = run.on_training.forward

    def watched(observation: Mapping[str, torch.Tensor]) -> Any:
        if asked[-1] < 0.5:
            seen.update(observation["instance"].tolist())
        return network(observation)

    run.on_training.forward = watched  # type: ignore[method-assign]
    run.run()

    assert [number / 10 for number in range(10)] == pytest.approx(asked)
    assert {0} == seen


def test_another_run_in_the_folder_is_not_overwritten(tmp_path: Path) -> None:
    training(tmp_path).run()

    with pytest.raises(BadRequest, match="other settings or another number of ranks"):
        training(tmp_path, replace(SETTINGS, seed=1))
    (tmp_path / "progress.json").write_text("{", encoding="utf-8")
    with pytest.raises(BadRequest, match=r"progress\.json"):
        training(tmp_path)


def test_fine_tuning_begins_with_the_weights_it_is_given(tmp_path: Path) -> None:
    start = training(tmp_path / "first").run()
    before = weights(start).clone()
    settings = replace(SETTINGS, imitation_iterations=0, expert_iterations=0)
    run = training(tmp_path / "second", settings, start=start)

    assert torch.equal(before, weights(run.policy))
    run.run()
    assert not torch.equal(before, weights(run.policy))


def test_a_policy_is_read_as_it_was_written_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    written = new_policy(hidden=8, encoder="mlp", seed=3)
    save_policy(written, path, {"note": "a test"})
    found, card = load_policy(path)
    changes: Sequence[tuple[Mapping[str, Any], str]] = (
        ({"policy_version": 99}, "policy_version is 99"),
        ({"columns": {}}, "looks at other decisions"),
        ({"settings": {**card["settings"], "hidden": 16}}, "do not fit the settings"),  # type: ignore[dict-item]
        ({"settings": {**card["settings"], "hidden": 10**6}}, "no policy is so wide"),  # type: ignore[dict-item]
        ({"settings": {}}, "settings"),
    )

    assert torch.equal(weights(written), weights(found))
    assert "a test" == card["note"]
    for change, message in changes:
        path.with_suffix(".json").write_text(json.dumps({**card, **change}), encoding="utf-8")
        with pytest.raises(BadRequest, match=message):
            load_policy(path)
    with pytest.raises(BadRequest, match="choose 'graph' or 'mlp'"):
        new_policy(encoder="cnn")


def rank(number: int, folder: str) -> None:
    """One of two processes that learn together."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    run = training(Path(folder) / "run", tracker=LocalTracker(f"{folder}/log{number}"))
    start = {name: item.clone() for name, item in run.policy.state_dict().items()}
    rollout = run._phase("ppo")[0].collect()[0].action_N  # type: ignore[attr-defined]
    run.run()
    torch.save(
        {"start": start, "end": run.policy.state_dict(), "rollout": rollout},
        f"{folder}/rank{number}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_play_apart_and_learn_as_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=rank, args=(number, str(tmp_path))) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    one, other = (torch.load(tmp_path / f"rank{number}.pt") for number in range(2))
    files = sorted(path.name for path in (tmp_path / "run").iterdir())

    assert [0, 0] == [process.exitcode for process in processes]
    for name, item in one["end"].items():
        assert torch.equal(item, other["end"][name]), name
    assert not all(torch.equal(item, one["start"][name]) for name, item in one["end"].items())
    assert not torch.equal(one["rollout"][:32], other["rollout"][:32])
    assert ["expert-2.rank0.safetensors", "expert-2.rank1.safetensors"] == files[2:4]
