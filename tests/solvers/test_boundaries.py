"""The Pareto set over time, memory and what passes between segments."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.solvers.boundaries import boundaries_of
from meshwright.solvers.frontier import Frontier
from meshwright.solvers.operator_mixtures import OperatorMixtures
from meshwright.solvers.operators import OperatorProblem
from meshwright.space.pins import parse_pins
from tests.solvers.operator_problems import context_of, with_tp

GPT = "tiny-gpt?num_layers=2&hidden=256&num_heads=4&vocab_size=512&seq_len=128"


@pytest.fixture(scope="module")
def problem() -> OperatorProblem:
    return OperatorProblem(context_of(GPT, 16, "4xh100"), with_tp(2, dp_replicate=2))


def test_a_residual_stream_may_pass_whole_or_cut_along_each_of_its_dims(
    problem: OperatorProblem,
) -> None:
    labels = {boundary.labels for boundary in boundaries_of(problem.graph)}

    assert {(), (("tp", "batch"),), (("tp", "sequence"),), (("tp", "hidden"),)} <= labels


def test_a_boundary_holds_wherever_a_segment_passes_something_on(problem: OperatorProblem) -> None:
    """Hidden is a dim of the residual stream: every block passes it on cut so, and only so."""
    boundary = next(b for b in boundaries_of(problem.graph) if b.labels == (("tp", "hidden"),))
    (found, *_) = problem.pareto(boundary=boundary)

    assert boundary.allowed
    assert all(found.picks[node] in places for node, places in boundary.allowed.items())


def test_no_boundary_beats_the_free_choice_and_memory_costs_time(problem: OperatorProblem) -> None:
    free = problem.solve()
    assert free is not None
    sets = problem.pareto_of_boundaries(at_most=3)

    assert 3 < len(sets)
    for choices in sets.values():
        times_s = [choice.step_s for choice in choices]
        sizes = [choice.memory_bytes for choice in choices]
        assert free.step_s <= times_s[0] * (1 + 1e-3)
        assert sorted(times_s) == pytest.approx(times_s, rel=1e-3)
        assert sorted(sizes, reverse=True) == sizes


def test_the_program_is_free_again_after_a_boundary(problem: OperatorProblem) -> None:
    before = problem.solve()
    problem.pareto_of_boundaries()

    assert problem.solve() == before


def test_mixtures_of_operators_shardings_are_plans() -> None:
    """They are judged exactly, like every plan, and say their operators' exceptions."""
    context = replace(context_of(GPT, 16, "4xh100"), pins=parse_pins(["tp=2"]))
    found = OperatorMixtures(Frontier(context)).propose(context)

    assert found.candidates
    assert all(candidate.cost.fits for candidate in found.candidates)
    times_s = [candidate.time_s for candidate in found.candidates]
    assert sorted(times_s) == times_s
    priced = context.model.cost(found.candidates[0].plan)
    assert priced.time_s == pytest.approx(times_s[0])
