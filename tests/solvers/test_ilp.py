"""The HiGHS wrapper on programs solved by hand."""

from __future__ import annotations

import math

import pytest

from meshwright.solvers.ilp import IntegerProgram, IntegerStatus


def knapsack(capacity: float) -> IntegerProgram:
    """Values 6, 10, 12 at weights 1, 2, 3."""
    program = IntegerProgram()
    items = [program.variable(cost=-value) for value in (6.0, 10.0, 12.0)]
    program.row(zip(items, (1.0, 2.0, 3.0), strict=True), upper=capacity)
    return program


def test_knapsack_takes_the_last_two() -> None:
    """Of weight 5 the best is 10 + 12."""
    found = knapsack(5.0).minimize()

    assert found.status is IntegerStatus.OPTIMAL
    assert found.values.tolist() == [0.0, 1.0, 1.0]
    assert found.objective == pytest.approx(-22.0)
    assert found.bound == pytest.approx(-22.0)


def test_a_row_changed_afterwards_counts() -> None:
    """With weight 3 left, 6 + 10 beats 12."""
    program = knapsack(5.0)
    program.set_row(0, upper=3.0)

    found = program.minimize()

    assert [found.is_set(item) for item in range(3)] == [True, True, False]


def test_a_fixed_variable_stays() -> None:
    program = knapsack(5.0)
    program.fix(0, 1.0)

    assert program.minimize().objective == pytest.approx(-18.0)


def test_nothing_possible_is_an_answer() -> None:
    program = IntegerProgram()
    program.choose_one([program.variable(), program.variable()])
    program.row([(0, 1.0), (1, 1.0)], upper=0.0)

    found = program.minimize()

    assert found.status is IntegerStatus.INFEASIBLE
    assert not found.is_found
    assert found.objective == math.inf


def test_continuous_variables_need_no_integers() -> None:
    """At most 2.5 of it, at a gain of 1 each."""
    program = IntegerProgram()
    program.variable(cost=-1.0, upper=2.5, is_integer=False)

    found = program.minimize()

    assert found.objective == pytest.approx(-2.5)
    assert found.values.tolist() == [2.5]
