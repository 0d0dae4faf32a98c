"""``meshwright/Placement-v0`` as Gymnasium wants it."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from meshwright.env.placement import (
    ENVIRONMENT_ID,
    MASKED_REWARD,
    GraphObservation,
    PlacementEnv,
)
from meshwright.env.toys import random_instance, toy_instances, toys
from meshwright.errors import BadRequest


@pytest.mark.parametrize("render_mode", [None, "ansi", "rgb_array"])
def test_the_checker_has_nothing_to_say(render_mode: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment = gymnasium.make(ENVIRONMENT_ID, render_mode=render_mode)
        check_env(environment.unwrapped)

    assert isinstance(environment.unwrapped, PlacementEnv)


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("import meshwright.env.placement", ENVIRONMENT_ID),
        ("", f"meshwright.env.placement:{ENVIRONMENT_ID}"),
    ],
)
def test_a_new_process_knows_it_by_import_or_by_its_module(statement: str, name: str) -> None:
    code = f"import gymnasium\n{statement}\nprint(gymnasium.make({name!r}).spec.entry_point)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert "" == done.stderr
    assert "meshwright.env.placement:PlacementEnv\n" == done.stdout


def played(environment: PlacementEnv, seed: int) -> list[object]:
    rng = np.random.default_rng(seed)
    observation, info = environment.reset(seed=seed)
    found: list[object] = [info["instance"]]
    ended = False
    while not ended:
        action = int(rng.choice(np.flatnonzero(environment.action_masks())))
        observation, reward, ended, truncated, info = environment.step(action)
        found += [action, reward, truncated, observation["state"].tolist()]
    return [*found, info["time_s"], info["placed"]]


def test_the_seed_decides_the_episode() -> None:
    environment = PlacementEnv()

    assert played(environment, 3) == played(PlacementEnv(), 3)
    assert len({played(environment, seed)[0] for seed in range(20)}) == len(toy_instances())


def test_it_is_pickled_in_the_middle_of_an_episode() -> None:
    environment = PlacementEnv(render_mode="ansi")
    environment.reset(seed=1, options={"instance": 0})
    environment.step(int(np.flatnonzero(environment.action_masks())[0]))
    copied = pickle.loads(pickle.dumps(environment))

    assert environment.render() == copied.render()
    assert environment.action_masks().tolist() == copied.action_masks().tolist()
    assert environment.np_random.random() == copied.np_random.random()


@pytest.mark.parametrize("number", range(len(toys())))
def test_the_known_optimum_pays_what_it_should(number: int) -> None:
    instance, placed = toys()[number]
    environment = PlacementEnv()
    environment.reset(options={"instance": number})
    ended, reward, info = False, 0.0, {}
    while not ended:
        episode = environment.episode
        assert episode is not None
        decision = len(episode.history)
        if decision < instance.rows.shape[1]:
            size = instance.rows[placed.row, decision]
            action = int(np.flatnonzero(instance.values(decision) == size)[0])
        else:
            action = (*placed.variants, placed.cut)[decision - instance.rows.shape[1]]
        _, reward, ended, _, info = environment.step(action)
    best_s = float(instance.rooms.open(placed.row).time_s.min())

    assert best_s == info["time_s"]
    assert pytest.approx(math.log(instance.reference_s / best_s)) == reward
    assert (placed.row, *placed.variants, placed.cut) == info["placed"]


@pytest.mark.parametrize("action", [None, -1, -48, -49, 3, 47, 48, 10**6])
def test_an_invalid_action_ends_the_episode(action: int | None) -> None:
    """``None`` stands for the first one that is masked; the trap's first decision has three."""
    environment = PlacementEnv()
    environment.reset(options={"instance": 1 if action is None else 2})
    masked = int(np.flatnonzero(~environment.action_masks())[0])
    _, reward, ended, truncated, info = environment.step(masked if action is None else action)

    assert (MASKED_REWARD, True, False, {"masked": True}) == (reward, ended, truncated, info)


@pytest.mark.parametrize("action", [-1, 2], ids=["masked", "complete"])
def test_after_its_end_an_episode_takes_no_step_before_reset(action: int) -> None:
    environment = PlacementEnv()
    environment.reset(options={"instance": 2})
    ended = False
    while not ended:
        _, _, ended, _, _ = environment.step(action)
        action = int(environment.action_masks().argmax())

    with pytest.raises(BadRequest, match=r"^the episode has ended; call reset before the next"):
        environment.step(0)
    environment.reset(options={"instance": 2})
    assert 0.0 == environment.step(2)[1]


def test_through_wrappers_masks_are_asked_for_by_name() -> None:
    environment = gymnasium.make(ENVIRONMENT_ID)
    environment.reset(options={"instance": 2})
    mask = environment.get_wrapper_attr("action_masks")()
    vector = gymnasium.make_vec(ENVIRONMENT_ID, num_envs=2, vectorization_mode="sync")
    vector.reset(options={"instance": 2})

    assert [0, 1, 2] == np.flatnonzero(mask).tolist()
    assert [[0, 1, 2]] * 2 == [np.flatnonzero(one).tolist() for one in vector.call("action_masks")]


def test_text_tells_what_is_decided_and_what_comes() -> None:
    environment = PlacementEnv(render_mode="ansi")
    environment.reset(options={"instance": 2})
    begun = environment.render()
    for action in (2, 1, 1):
        environment.step(action)
    ended = environment.render()

    assert "trap: 4 rows, 1 groups\n  next tp: 1 | 2 | 4\n" == begun
    assert "num_microbatches 2" in ended
    assert "a step takes 1 s, 2.00x the reference" in ended


def test_the_picture_grows() -> None:
    environment = PlacementEnv(render_mode="rgb_array")
    environment.reset(options={"instance": 2})
    begun = environment.render()
    environment.step(2)
    later = environment.render()

    assert begun.shape == later.shape
    assert np.uint8 == begun.dtype
    assert (begun != later).any()


@pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=pytest.mark.dist)])
def test_it_works_in_vector_environments(mode: str) -> None:
    vector = gymnasium.make_vec(ENVIRONMENT_ID, num_envs=3, vectorization_mode=mode)
    try:
        observation, _ = vector.reset(seed=0)
        for _ in range(12):
            action = observation["action_mask"].argmax(axis=1)
            observation, reward, ended, truncated, _ = vector.step(action)

            assert (3,) == reward.shape == ended.shape
            assert not truncated.any()
            assert (reward > MASKED_REWARD).all()
        assert (3, 48) == observation["action_mask"].shape
    finally:
        vector.close()


def test_the_graph_wrapper_gives_a_graph_of_its_space() -> None:
    environment = GraphObservation(PlacementEnv())
    observation, _ = environment.reset(seed=0)
    graph = observation["graph"]

    assert isinstance(environment.observation_space, spaces.Dict)
    assert observation in environment.observation_space
    assert len(graph.edge_links) == len(graph.edges)
    assert graph.edge_links.max() < len(graph.nodes)
    assert environment.action_masks().any()


def test_requests_that_make_no_sense_are_refused() -> None:
    environment = PlacementEnv()
    with pytest.raises(BadRequest, match="call reset first"):
        environment.step(0)
    for options, message in (
        ({"instance": 9}, "^no instance 9; there are 3$"),
        ({"instance": -1}, "^no instance -1; there are 3$"),
        ({"instance": 1.7}, "^option instance is 1.7; give a whole number$"),
        ({"instance": None}, "^option instance is None; give a whole number$"),
        ({"number": 1}, "^no option 'number' of reset; there is only 'instance'$"),
    ):
        with pytest.raises(BadRequest, match=message):
            environment.reset(options=options)
    environment.reset(seed=0)
    with pytest.raises(BadRequest, match=r"^the action is 0\.5; give a whole number$"):
        environment.step(0.5)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="render_mode 'human' is none of"):
        PlacementEnv(render_mode="human")
    with pytest.raises(BadRequest, match="give at least one"):
        PlacementEnv([])


def test_an_instance_with_one_plan_pays_for_any_action() -> None:
    instance = random_instance(
        np.random.default_rng(0), num_rows=1, num_variants=1, num_cuts=1, fitting_share=1.0
    )
    environment = PlacementEnv([instance])
    environment.reset(seed=0)
    _, reward, ended, _, info = environment.step(0)

    assert ended
    assert pytest.approx(math.log(instance.reference_s / info["time_s"])) == reward
