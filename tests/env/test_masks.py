"""Masks against enumeration: nothing that fits is hidden, and no episode gets stuck."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.env.batched import BatchedPlacement
from meshwright.env.decode import best_of
from meshwright.env.episode import Episode
from meshwright.env.instance import ROW_DECISIONS, Instance
from meshwright.env.placement import PlacementEnv
from meshwright.env.toys import random_instance, toys
from tests.env.contexts import rooms_of, tiny_instance

Plan = tuple[int, ...]
"""Sizes of a row, variants, cut."""


def plans_of(instance: Instance) -> dict[Plan, float]:
    """Every plan that fits, as the slots of its decisions, and its time."""
    values = [instance.values(decision).tolist() for decision in range(len(ROW_DECISIONS))]
    found = {}
    for row, time_s in zip(instance.rows.tolist(), rooms_of(instance), strict=True):
        slots = [known.index(size) for known, size in zip(values, row, strict=True)]
        for place in zip(*np.nonzero(np.isfinite(time_s)), strict=True):
            found[(*slots, *(int(p) for p in place))] = float(time_s[place])
    return found


def drawn_instance(seed: int) -> Instance:
    rng = np.random.default_rng(seed)
    return random_instance(
        rng,
        num_rows=int(rng.integers(1, 20)),
        num_groups=int(rng.integers(1, 4)),
        num_variants=int(rng.integers(1, 4)),
        num_cuts=int(rng.integers(1, 4)),
        fitting_share=float(rng.choice([0.05, 0.3, 1.0])),
    )


def walked(instance: Instance, rng: np.random.Generator) -> tuple[Episode, Plan]:
    """A finished episode whose masks were compared with enumeration at every step."""
    plans = plans_of(instance)
    episode = Episode(instance)
    while True:
        prefix = tuple(choice.slot for choice in episode.history)
        left = [plan for plan in plans if plan[: len(prefix)] == prefix]
        if episode.is_done:
            return episode, prefix
        expected = {plan[len(prefix)] for plan in left}

        assert expected == set(np.flatnonzero(episode.valid).tolist())
        assert len(expected) > 1
        episode.choose(int(rng.choice(sorted(expected))))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_masks_are_those_of_enumeration(seed: int) -> None:
    instance = drawn_instance(seed)
    episode, plan = walked(instance, np.random.default_rng(seed))

    assert plans_of(instance)[plan] == episode.time_s


def test_masks_of_a_priced_model_are_those_of_enumeration() -> None:
    """With so little memory two thirds of the rows fit nowhere."""
    instance = tiny_instance(300_000)
    rng = np.random.default_rng(0)
    for _ in range(5):
        episode, plan = walked(instance, rng)

        assert plans_of(instance)[plan] == episode.time_s


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_the_optimum_is_never_hidden(seed: int) -> None:
    instance = drawn_instance(seed)
    best_s, placed = best_of(instance)
    values = [instance.values(decision).tolist() for decision in range(len(ROW_DECISIONS))]
    row = instance.rows[placed.row].tolist()
    slots = [known.index(size) for known, size in zip(values, row, strict=True)]
    slots += [*placed.variants, placed.cut]
    episode = Episode(instance)
    while not episode.is_done:
        episode.choose(slots[len(episode.history)])

    assert best_s == episode.time_s
    assert placed == episode.placed


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_both_environments_see_and_do_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    instances = [drawn_instance(seed + number) for number in range(4)]
    batched = BatchedPlacement(instances, len(instances))
    found = batched.reset_to(np.arange(len(instances)))
    environments = [PlacementEnv(instances) for _ in instances]
    seen = [env.reset(options={"instance": n})[0] for n, env in enumerate(environments)]
    infos: list[dict[str, object]] = [{} for _ in instances]
    is_valid = [not env.episode.is_done for env in environments if env.episode]
    for _ in range(batched.max_decisions):
        for number, observation in enumerate(seen):
            for name in found:
                np.testing.assert_allclose(
                    found[name][number], observation[name], rtol=1e-5, atol=1e-6, err_msg=name
                )
        action = np.array([rng.choice(np.flatnonzero(mask)) for mask in found["action_mask"]])
        moved = batched.step(action)
        found = dict(moved.observation)

        assert is_valid == moved.is_valid_B.tolist()
        for number, env in enumerate(environments):
            if is_valid[number]:
                seen[number], reward, ended, _, infos[number] = env.step(action[number])

                assert np.isclose(reward, moved.reward_B[number], rtol=1e-5, atol=1e-6)
                assert ended == moved.terminated_B[number]
                is_valid[number] = not ended
    assert not any(is_valid)
    for number, placed in enumerate(batched.placed()):
        if infos[number]:
            assert placed is not None
            assert infos[number]["placed"] == (placed.row, *placed.variants, placed.cut)


def test_enumeration_finds_the_toys_optima() -> None:
    for instance, placed in toys():
        best = min(plans_of(instance).items(), key=lambda item: item[1])
        row = [
            int(instance.values(decision)[slot])
            for decision, slot in zip(range(len(ROW_DECISIONS)), best[0], strict=False)
        ]

        assert instance.rows[placed.row].tolist() == row
        assert (*placed.variants, placed.cut) == best[0][len(ROW_DECISIONS) :]
