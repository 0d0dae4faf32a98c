"""The reference time: the best rule of thumb."""

from __future__ import annotations

import math

import pytest

from meshwright.solvers.exhaustive import Exhaustive
from meshwright.solvers.reference import rule_time_s
from meshwright.solvers.rules import RULES
from tests.env.contexts import tiny_context


def test_the_best_rule_that_fits_is_the_reference() -> None:
    context = tiny_context("cpu:4")
    times_s = [
        candidate.time_s
        for rule in RULES
        for candidate in rule.propose(context).candidates
        if candidate.cost.fits
    ]

    assert len(times_s) > 1
    assert min(times_s) == rule_time_s(context)


def test_where_no_rule_fits_uniform_plans_take_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    context = tiny_context("cpu:4")
    monkeypatch.setattr("meshwright.solvers.reference.RULES", ())
    uniform_s = [c.time_s for c in Exhaustive().propose(context).candidates if c.cost.fits]

    assert len(uniform_s) > 1
    assert min(uniform_s) == rule_time_s(context)


def test_nothing_fits_no_memory() -> None:
    assert math.inf == rule_time_s(tiny_context("cpu:4", 1000))
