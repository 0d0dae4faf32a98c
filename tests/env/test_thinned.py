"""Instances with rows left out are instances of their own, with the prices they had."""

from __future__ import annotations

import numpy as np

from meshwright.env.decode import best_of
from meshwright.env.instance import ROW_FEATURES
from meshwright.env.thinned import thinned
from meshwright.env.toys import random_instance, toy_instances


def test_rows_that_are_left_cost_what_they_did() -> None:
    rng = np.random.default_rng(0)
    whole = random_instance(rng, num_rows=80)
    found = [one for _ in range(30) if (one := thinned(whole, rng)) is not None]
    rows = [tuple(row) for row in whole.rows.tolist()]
    step = ROW_FEATURES.index("log_step_s")

    assert len(found) > 15
    for one in found:
        assert 8 <= len(one.rows) < len(whole.rows)
        assert 0.0 == float(one.row_features[:, step].min())
        assert best_of(whole)[0] <= best_of(one)[0]
        for number, row in enumerate(one.rows.tolist()):
            expected = whole.rooms.open(rows.index(tuple(row))).time_s
            assert np.array_equal(expected, one.rooms.open(number).time_s)
    assert len({best_of(one)[0] for one in found}) > 3


def test_what_leaves_too_little_is_none() -> None:
    rng = np.random.default_rng(0)

    assert [None] * 10 == [thinned(toy_instances()[0], rng) for _ in range(10)]
