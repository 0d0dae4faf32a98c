"""Many episodes at once: rewards, waiting, groups, randomized prices, what is known of the best."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.env.batched import RANDOMIZED, BatchedPlacement
from meshwright.env.decode import best_of
from meshwright.env.instance import MAX_CANDIDATES
from meshwright.env.observation import NUM_CANDIDATE, NUM_STATE
from meshwright.env.toys import random_instance, toy_instances, toys
from meshwright.errors import BadRequest


def play(
    environment: BatchedPlacement, observation: dict[str, np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Returns of all episodes played at random, and the steps it took."""
    returns = np.zeros(environment.num_envs)
    count = 0
    while np.isnan(environment.time_s()).any():
        mask = observation["action_mask"]
        found = environment.step((mask * rng.random(mask.shape)).argmax(axis=1))
        returns += found.reward_B
        observation = dict(found.observation)
        count += 1
    return returns, count


def random_instances(count: int) -> list:
    rng = np.random.default_rng(7)
    return [
        random_instance(
            rng,
            num_rows=40,
            num_groups=int(rng.integers(1, 5)),
            num_variants=int(rng.integers(1, 5)),
            num_cuts=int(rng.integers(1, 5)),
        )
        for _ in range(count)
    ]


def test_following_the_best_reaches_the_optimum_of_every_instance() -> None:
    instances = [*random_instances(20), *toy_instances()]
    environment = BatchedPlacement(instances, len(instances))
    observation = environment.reset_to(np.arange(len(instances)))
    for _ in range(environment.max_decisions):
        best_s = environment.best_time_s()
        best_s[~observation["action_mask"]] = np.inf
        observation = dict(environment.step(best_s.argmin(axis=1)).observation)

    assert [best_of(instance)[0] for instance in instances] == environment.time_s().tolist()
    placed = environment.placed()
    for number, (_, wanted) in enumerate(toys()):
        assert wanted == placed[len(instances) - len(toys()) + number]


def test_compiled_instances_keep_their_rooms_without_a_copy() -> None:
    instances = [*random_instances(6), *toy_instances()]
    found = BatchedPlacement(instances, 1).compiled
    shared = 0
    for given_one, kept in zip(instances, found.instances, strict=True):
        for row in range(len(given_one.rows)):
            room = kept.rooms.open(row).time_s

            np.testing.assert_array_equal(given_one.rooms.open(row).time_s, room)
            shared += np.shares_memory(room, found.tables)
    assert shared > 20


def test_observations_have_the_stated_shapes() -> None:
    environment = BatchedPlacement(toy_instances(), 6, group_size=2)
    observation = environment.reset(seed=0)

    assert (6, MAX_CANDIDATES, NUM_CANDIDATE) == observation["candidates"].shape
    assert (6, NUM_STATE) == observation["state"].shape
    assert (6, MAX_CANDIDATES) == observation["action_mask"].shape
    assert np.float32 == observation["candidates"].dtype == observation["state"].dtype
    assert np.isfinite(environment.best_time_s()[observation["action_mask"]]).all()
    assert np.isinf(environment.best_time_s()[~observation["action_mask"]]).all()


def test_a_reward_is_the_speed_over_the_reference() -> None:
    """The pipeline cut by memory takes 2 s where the rule of thumb takes 4 s."""
    environment = BatchedPlacement(toy_instances()[:1], 1)
    environment.reset_to(np.zeros(1, np.int64))
    rewards = []
    while np.isnan(environment.time_s()).any():
        found = environment.step(environment.best_time_s().argmin(axis=1))
        rewards.append(float(found.reward_B[0]))

    assert pytest.approx(np.log(4.0 / 2.0)) == rewards[-1]
    assert {0.0} == set(rewards[:-1])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_groups_play_one_instance_and_the_seed_decides(seed: int) -> None:
    instances = random_instances(10)
    environment = BatchedPlacement(instances, 32, group_size=4, randomization=0.1)
    observation = environment.reset(seed=seed)
    first, _ = play(environment, observation, np.random.default_rng(seed))
    again = environment.reset(seed=seed)
    second, _ = play(environment, again, np.random.default_rng(seed))

    blocks = observation["instance"].reshape(-1, 4)
    assert (blocks == blocks[:, :1]).all()
    assert observation["instance"].tolist() == again["instance"].tolist()
    assert first.tolist() == second.tolist()


def test_randomized_prices_differ_between_groups_and_not_within() -> None:
    environment = BatchedPlacement(toy_instances()[2:], 64, group_size=32, randomization=0.3)
    rewards, _ = play(environment, environment.reset(seed=3), np.random.default_rng(0))
    nominal = np.log(environment.instances[0].reference_s / environment.time_s())
    by_plan = [dict(), dict()]
    for env, placed in enumerate(environment.placed()):
        by_plan[env // 32].setdefault(placed, set()).add(round(rewards[env] - nominal[env], 9))

    assert {1} == {len(errors) for group in by_plan for errors in group.values()}
    assert len({next(iter(errors)) for errors in by_plan[0].values()}) > 1
    both = [plan for plan in by_plan[0].keys() & by_plan[1].keys() if by_plan[0][plan] != {0.0}]
    assert both
    assert all(by_plan[0][plan] != by_plan[1][plan] for plan in both)


def test_prices_err_as_far_as_sigma_says() -> None:
    """A plan's error is normal with sigma times the length of its traits."""
    environment = BatchedPlacement(random_instances(1), 4096, randomization=0.2)
    rewards, _ = play(environment, environment.reset(seed=5), np.random.default_rng(0))
    error = rewards - np.log(environment.instances[0].reference_s / environment.time_s())
    traits = environment.traits()
    length = np.linalg.norm(traits, axis=1)

    assert (4096, len(RANDOMIZED)) == traits.shape
    has_some = length > 0
    assert 0.2 == pytest.approx((error[has_some] / length[has_some]).std(), rel=0.05)
    assert not error[~has_some].any()


def test_what_ended_waits_for_the_others() -> None:
    environment = BatchedPlacement([*random_instances(3), *toy_instances()], 12)
    observation = environment.reset(seed=1)
    ended = np.zeros(12, dtype=bool)
    for _ in range(environment.max_decisions):
        mask = observation["action_mask"]
        assert mask.any(axis=1).all()
        found = environment.step(mask.argmax(axis=1))

        assert (~ended).tolist() == found.is_valid_B.tolist()
        assert not (ended & found.terminated_B).any()
        assert not found.reward_B[ended].any()
        ended |= found.terminated_B
        observation = dict(found.observation)
    assert ended.all()


def test_restarting_episodes_never_wait() -> None:
    environment = BatchedPlacement(toy_instances(), 5, restarts=True)
    observation = environment.reset(seed=1)
    ended = 0
    for _ in range(30):
        found = environment.step(observation["action_mask"].argmax(axis=1))
        observation = dict(found.observation)
        ended += int(found.terminated_B.sum())

        assert found.is_valid_B.all()
        assert (observation["action_mask"].sum(axis=1) > 1).all()
    assert ended >= 10


def test_a_masked_action_is_refused() -> None:
    environment = BatchedPlacement(toy_instances(), 2)
    observation = environment.reset(seed=0)
    action = (~observation["action_mask"]).argmax(axis=1)
    with pytest.raises(BadRequest, match=r"environment 0: action \d+ is masked"):
        environment.step(action)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 3, "group_size": 2}, "3 environments do not make groups of 2"),
        ({"num_envs": 4, "group_size": 2, "restarts": True}, "restarts needs group_size 1"),
    ],
)
def test_environments_make_whole_groups(options: dict, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        BatchedPlacement(toy_instances(), **options)
