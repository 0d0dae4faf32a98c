"""The operator-level integer program against brute force, and what it answers with."""

from __future__ import annotations

import itertools
import math

import pytest

from meshwright.cluster import parse_cluster
from meshwright.cost.pricing import ANALYTIC, Pricing
from meshwright.plans.plan import JobSpec
from meshwright.solvers.choices import ChoiceGraph
from meshwright.solvers.operators import OperatorProblem, operator_shardings
from meshwright.solvers.planner import make_context
from meshwright.space.decision import Decision, Strategy
from meshwright.space.evaluate import candidate_of_decision
from meshwright.space.search import SearchContext
from tests.cost.graphs import two_linear
from tests.cost.learned import PeakOperators
from tests.solvers.operator_problems import context_of, with_tp

GPT = "tiny-gpt?num_layers=2&hidden=32&num_heads=4&vocab_size=64&seq_len=8"


def linear_context(pricing: Pricing = ANALYTIC) -> SearchContext:
    """Two products on four GPUs."""
    return make_context(
        two_linear(16),
        reference="two",
        cluster=parse_cluster("4xh100"),
        job=JobSpec(global_batch=16),
        pricing=pricing,
    )


def node_costs_s(problem: OperatorProblem) -> list[list[float]]:
    """For each node the seconds of every choice."""
    graph, prices = problem.graph, problem.prices
    parameters = [node for node in graph.nodes if node.is_parameter]
    of_parameter = dict(
        zip((n.value for n in parameters), prices.parameters(parameters), strict=True)
    )
    of_operator = iter(prices.operators_s([node for node in graph.nodes if not node.is_parameter]))
    costs = [
        list(of_parameter[node.value].step_s) if node.is_parameter else next(of_operator)
        for node in graph.nodes
    ]
    for number, result, weight in graph.leaving:
        node = graph.nodes[number]
        for pick, choice in enumerate(node.choices):
            costs[number][pick] += weight * prices.leaving_s(node, choice, result)
    return costs


def links_s(problem: OperatorProblem, graph: ChoiceGraph, picks: tuple[int, ...]) -> float:
    """Redistributions, each once for all readers in a phase of a segment."""
    prices = problem.prices
    paid: dict[object, float] = {}
    total = 0.0
    for link in graph.links:
        source, target = graph.nodes[link.source], graph.nodes[link.target]
        given = source.choices[picks[link.source]].results[link.result]
        choice = target.choices[picks[link.target]]
        assert given is not None
        if link.operand < 0:
            stored = choice.results[0]
            assert stored is not None
            total += sum(prices.gradient_s(link, given, stored))
            continue
        wanted = link.unseen(choice.operands[link.operand])
        partial = {axis for axis, _ in given.partial}
        must = {axis for axis, where in choice.carried if link.operand in where}
        if not must <= partial or (link.is_storing and given.shards != wanted.shards):
            return math.inf
        passes = any(
            where == frozenset({link.operand}) for c in target.choices for _, where in c.carried
        )
        if passes and partial and not must and not choice.labels:
            return math.inf
        key = (link.source, link.result, target.segment_class, link.is_backward, wanted)
        paid[key] = prices.convert_s(link.value, given, wanted)
    return total + sum(paid.values())


def test_the_program_finds_the_optimum_of_all_choices() -> None:
    """Two products and a sum: no combination of choices is faster than the one found."""
    problem = OperatorProblem(
        linear_context(), with_tp(2), allowed={"tp": frozenset({"batch", "hidden", "inner"})}
    )
    found = problem.solve()
    assert found is not None
    costs = node_costs_s(problem)

    def total_s(picks: tuple[int, ...]) -> float:
        return sum(row[pick] for row, pick in zip(costs, picks, strict=True))

    every = list(itertools.product(*(range(len(row)) for row in costs)))
    better = [
        picks
        for picks in every
        if total_s(picks) < found.step_s * (1 - 1e-3)
        and total_s(picks) + links_s(problem, problem.graph, picks) < found.step_s * (1 - 1e-3)
    ]

    assert len(every) > 1000
    assert found.is_proven
    assert [] == better
    cost_s = total_s(found.picks) + links_s(problem, problem.graph, found.picks)
    assert found.step_s == pytest.approx(cost_s, rel=1e-6)


@pytest.mark.parametrize("efficiency", [0.5, 0.01])
def test_the_program_prices_operators_as_the_table_does(efficiency: float) -> None:
    """Learned prices: what the program repeats in every micro-batch is what the table says."""
    pricing = Pricing(operators=PeakOperators(efficiency=efficiency))
    problem = OperatorProblem(linear_context(pricing), with_tp(2))
    found = problem.solve()
    assert found is not None
    plan = problem.plan(found)

    assert plan.exact_s == pytest.approx(plan.repeated_s, rel=1e-6)


def test_one_program_for_equal_segments() -> None:
    """Six layers make a program as large as two do."""
    sizes = {
        OperatorProblem(
            context_of(GPT.replace("num_layers=2", f"num_layers={layers}"), 16, "4xh100"),
            with_tp(2),
        ).program.size
        for layers in (2, 6)
    }

    assert 1 == len(sizes)


def test_a_bound_nothing_meets_has_no_answer() -> None:
    problem = OperatorProblem(context_of(GPT, 16, "4xh100"), with_tp(2))

    assert problem.solve(memory_bytes=problem.program.least_memory_bytes / 2) is None


def test_the_gap_under_a_memory_bound_is_stated() -> None:
    """The dual bound is below what was found, and what was found is within the memory."""
    problem = OperatorProblem(context_of(GPT, 16, "4xh100"), with_tp(2))
    fastest = problem.solve()
    assert fastest is not None
    least = problem.program.least_memory_bytes
    bound = least + 0.3 * (fastest.memory_bytes - least)
    found = problem.solve(memory_bytes=bound)

    assert found is not None
    assert found.memory_bytes <= bound
    assert fastest.step_s * (1 - 1e-3) <= found.step_s
    assert found.bound_s <= found.step_s * (1 + 1e-9)


def test_shardings_become_plans_with_exact_prices() -> None:
    """With exceptions by operator, where lists of labels do not say it."""
    context = context_of(GPT, 16, "4xh100")
    skeleton = with_tp(2, dp_replicate=2)
    shardings = operator_shardings(context, skeleton)

    assert shardings
    assert () == operator_shardings(context, with_tp(1, dp_replicate=4))
    for sharding in shardings:
        strategy = Strategy(sharding=sharding)
        count = len(context.model.segment_classes)
        decision = Decision(skeleton=skeleton, starts=(0,), strategies=(strategy,) * count)
        candidate = candidate_of_decision(context, decision, solver="ilp")

        assert candidate.time_s > 0
        said = [bool(entry.operators) for entry in candidate.plan.segments]
        assert said == [
            bool(sharding.operators_of(e.segment_class)) for e in candidate.plan.segments
        ]
