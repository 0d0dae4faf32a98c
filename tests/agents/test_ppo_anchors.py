"""PPO with the published settings on CartPole; the full runs are ``benchmarks.ppo_anchors``."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.ppo_anchors import trainer

NUM_STEPS = 50_000

pytestmark = pytest.mark.usefixtures("one_thread")


def test_cart_pole_is_learned_and_equal_seeds_learn_equally() -> None:
    """Whoever acts at random stays up for about 22 steps; 500 are the most."""
    whole, again = (trainer("CartPole-v1", seed=3, num_steps=NUM_STEPS) for _ in range(2))
    found = [whole.train_iteration() for _ in range(whole.num_iterations)]
    repeated = [again.train_iteration() for _ in range(6)]
    returns = [one for item in found for one in item.episode_returns]

    assert found[:6] == repeated
    assert 15 < np.mean(returns[:20]) < 40
    assert np.mean(returns[-100:]) >= 150
