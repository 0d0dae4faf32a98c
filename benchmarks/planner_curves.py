"""Claim: the portfolio with the agent beats the portfolio without it at small budgets.

    OMP_NUM_THREADS=1 python -m benchmarks.planner_curves --cache FOLDER [-o FILE]

Two parts. *Tables*: best so far at 16 ... 4,096 distinct plans looked up, on stored instances whose
optimum is known, the agent's samples and its local search against the searchers of
``benchmarks.searchers``. Half of the agent's look-ups at most, and 65, go to its samples. DP and
exhaustive search would look at all plans of an instance (``plans_per_instance``) and be exact.

*Contexts*: whole planning problems, every plan priced as ``meshwright plan`` does it, segments free
of groups. Every solver alone and the portfolios, within 0.1, 1 and 10 s, and at equal evaluations;
the gap is to the best that anybody found in this run. ``portfolio with`` asks in the order of
``solvers.planner.proposers_of``, as ``meshwright plan`` does: the agent after the rules, for a
share of the time. At *equal evaluations* agent and searches anneal and walk 256 plans, besides what
the agent prices for its masks and on the rows it enters; without it the searches get as many as all
that. Each gets a fresh context: cost tables are built within its time; what is known of the graph
itself is worked out before. Solvers that look at the clock seldom take longer than they were given:
``median_s`` tells.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.heading import heading
from benchmarks.intervals import difference, gap_figures, win_rates
from benchmarks.planner_gap import where_it_loses
from benchmarks.planner_instances import (
    add_options,
    deciders_of,
    instances_of,
    optima_s,
    proposals,
    write,
)
from benchmarks.searchers import Problem, available, best_by_budget, is_random
from meshwright.agents.local_search import improve
from meshwright.agents.planner import PolicyDecider
from meshwright.env.frozen import frozen_specs
from meshwright.env.generator import InstanceSpec, context_of
from meshwright.env.instance import Instance
from meshwright.env.models import Programs
from meshwright.errors import PlannerError
from meshwright.solvers.exhaustive import Exhaustive
from meshwright.solvers.frontier import Frontier
from meshwright.solvers.guided import Guided
from meshwright.solvers.layerwise import LayerwiseDP, LayerwiseILP
from meshwright.solvers.local_search import local_searches
from meshwright.solvers.planner import proposers_of
from meshwright.solvers.rules import RULES
from meshwright.space.search import Proposer, SearchContext, fitting

FloatArray = NDArray[np.float64]

BUDGETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SECONDS = (0.1, 1.0, 10.0)
EVALUATIONS = 256
PATIENCE_S = 60.0
"""Longest time that counting evaluations may take."""
_MOST_SAMPLES = 64


# --- Tables ---------------------------------------------------------------------------------------


def agent_curves(
    deciders: Sequence[PolicyDecider], instances: Sequence[Instance], budgets: Sequence[int]
) -> FloatArray:
    """(S, I, budgets) times of the agent and its local search."""
    found = np.empty((len(deciders), len(instances), len(budgets)))
    for seed, decider in enumerate(deciders):
        plans = proposals(decider, instances, num_samples=_MOST_SAMPLES, seed=seed)
        for place, (instance, drawn) in enumerate(zip(instances, plans, strict=True)):
            for number, budget in enumerate(budgets):
                starts = drawn[: max(budget // 2, 1)]
                best = improve(instance, starts, max_evaluations=budget)
                found[seed, place, number] = best.time_s
    return found


def curves(
    deciders: Sequence[PolicyDecider],
    instances: Sequence[Instance],
    budgets: Sequence[int],
    num_seeds: int,
) -> dict[str, Any]:
    """Gaps of everybody at each budget; against whom the agent wins and loses."""
    optimum_I = optima_s(instances)
    times = {"agent": agent_curves(deciders, instances, budgets)}
    runs = {name: num_seeds if is_random(name) else 1 for name in available()}
    for name, count in runs.items():
        times[name] = np.empty((count, len(instances), len(budgets)))
    for place, instance in enumerate(instances):
        problem = Problem(instance)
        for name, count in runs.items():
            for seed in range(count):
                times[name][seed, place] = best_by_budget(name, problem, budgets, seed=seed)
    gaps = {name: values / optimum_I[:, None] - 1 for name, values in times.items()}
    rows = []
    for number, budget in enumerate(budgets):
        own_SI = gaps["agent"][:, :, number]
        for name, gap_SIX in gaps.items():
            row = {"searcher": name, "evaluations": budget, **gap_figures(gap_SIX[:, :, number])}
            if name != "agent":
                row["agent_against_it"] = win_rates(
                    *np.broadcast_arrays(own_SI, gap_SIX[:, :, number])
                )
            rows.append(row)
    at = list(budgets).index(min(budgets, key=lambda budget: abs(budget - EVALUATIONS)))
    plans = [math.prod(item.room_shape) * len(item.rows) for item in instances]
    return {
        "n": len(instances),
        "plans_per_instance": float(np.median(plans)),
        "rows": rows,
        f"agent_at_{budgets[at]}": where_it_loses(gaps["agent"][:, :, at].mean(axis=0), instances),
    }


# --- Contexts -------------------------------------------------------------------------------------

Solvers = Callable[[SearchContext], Sequence[Proposer]]


def solvers_by_seconds(decider: PolicyDecider) -> dict[str, Solvers]:
    """Who is asked with a deadline, in order."""
    agent = Guided(decider)
    found: dict[str, Solvers] = {
        "agent": lambda _: (agent,),
        "rules": lambda _: RULES,
        "uniform": lambda _: (Exhaustive(),),
        "DP": lambda context: (LayerwiseDP(Frontier(context)),),
        "ILP": lambda context: (LayerwiseILP(Frontier(context)),),
        "portfolio without": proposers_of,
        "portfolio with": lambda context: proposers_of(context, (agent,)),
    }
    for number, search in enumerate(local_searches()):
        found[search.name] = lambda _, number=number: (local_searches()[number],)  # type: ignore[misc]
    return found


def by_evaluations(
    make: Callable[[], SearchContext], decider: PolicyDecider
) -> dict[str, dict[str, float]]:
    """Rules, agent and searches; rules and searches with as many evaluations; the agent alone."""

    def searches(count: int) -> Sequence[Proposer]:
        return [search.with_evaluations(max(count // 3, 1)) for search in local_searches()]

    half = EVALUATIONS // 2
    agent = Guided(decider, max_evaluations=half)
    both = asked(make(), (*RULES, agent, *searches(half)), PATIENCE_S)
    count = int(both["evaluations"])
    return {
        "portfolio with": both,
        "portfolio without": asked(make(), (*RULES, *searches(count)), PATIENCE_S),
        "agent": asked(make(), (Guided(decider, max_evaluations=EVALUATIONS),), PATIENCE_S),
    }


def asked(
    context: SearchContext, proposers: Sequence[Proposer], seconds: float | None
) -> dict[str, float]:
    """The best of all that fits, and what it took."""
    start_s = time.monotonic()
    deadline_s = None if seconds is None else start_s + seconds
    best_s, evaluations = math.inf, 0
    for proposer in proposers:
        if deadline_s is not None and time.monotonic() > deadline_s:
            break
        result = proposer.propose(context, deadline_s)
        evaluations += result.evaluations
        plans = fitting(result.candidates)
        best_s = min(best_s, plans[0].time_s if plans else math.inf)
    return {
        "best_s": best_s,
        "evaluations": evaluations,
        "seconds": time.monotonic() - start_s,
    }


def on_context(
    make: Callable[[int], SearchContext], decider: PolicyDecider, seconds: Sequence[float]
) -> list[dict[str, Any]]:
    """Every solver at every budget on one problem; ``make`` gives a fresh context of a seed."""
    warm = make(0)
    Guided(PolicyDecider(decider.policy, num_samples=1), max_evaluations=8).propose(warm)
    rows: list[dict[str, Any]] = []
    for budget in seconds:
        for name, solvers in solvers_by_seconds(decider).items():
            context = make(0)
            found = asked(context, solvers(context), budget)
            rows.append({"budget": f"{budget:g} s", "solver": name, **found})
    for name, found in by_evaluations(lambda: make(0), decider).items():
        rows.append({"budget": "equal evaluations", "solver": name, **found})
    return rows


def told(problems: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Gaps to the best known by budget and solver; the portfolio with the agent against without."""
    known = {name: min(row["best_s"] for row in rows) for name, rows in problems.items()}
    names = [name for name, best_s in known.items() if math.isfinite(best_s)]
    gaps: dict[tuple[str, str], list[float]] = {}
    rows_of: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for name in names:
        for row in problems[name]:
            key = (row["budget"], row["solver"])
            gaps.setdefault(key, []).append(row["best_s"] / known[name] - 1)
            rows_of.setdefault(key, []).append(row)
    table, pairs = [], []
    for (budget, solver), values in gaps.items():
        own = rows_of[budget, solver]
        table.append(
            {
                "budget": budget,
                "solver": solver,
                **gap_figures(np.array([values])),
                "median_s": float(np.median([row["seconds"] for row in own])),
                "median_evaluations": float(np.median([row["evaluations"] for row in own])),
            }
        )
        if solver == "portfolio with":
            with_I, without_I = np.array([values]), np.array([gaps[budget, "portfolio without"]])
            both = np.isfinite(with_I) & np.isfinite(without_I)
            row = {"budget": budget, "portfolio": solver, **win_rates(with_I, without_I)}
            if both.any():
                row |= {"with_less_without": difference(with_I[both][None], without_I[both][None])}
            lost = [names[i] for i in np.flatnonzero(with_I[0] > without_I[0] + 1e-6)]
            pairs.append({**row, "loses_on": lost})
    return {"n": len(names), "portfolio_with_against_without": pairs, "rows": table}


def contexts_part(
    specs: Sequence[InstanceSpec],
    programs: Programs,
    decider: PolicyDecider,
    seconds: Sequence[float],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """``told`` of all problems so far, reported after each."""
    problems: dict[str, list[dict[str, Any]]] = {}
    for spec in specs:

        def make(seed: int, spec: InstanceSpec = spec) -> SearchContext:
            return replace(context_of(spec, programs), seed=seed)

        try:
            problems[spec.name] = on_context(make, decider, seconds)
        except PlannerError:
            continue
        report(told(problems))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--set", default="test-in")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--seconds", type=float, nargs="+", default=list(SECONDS))
    parser.add_argument("--contexts", type=int, default=36)
    options = parser.parse_args()
    torch.set_num_threads(1)
    deciders, differ_in = deciders_of(options.weights, options.seeds)
    document = heading(
        "the portfolio with the agent beats the portfolio without it at small budgets",
        set=options.set,
        runs_differ_in=differ_in,
        weights=[path.name for path in options.weights],
    )
    if options.limit != 0:
        instances = instances_of(
            options.set, options.cache, ready=options.ready, limit=options.limit
        )
        document["tables"] = curves(deciders, instances, options.budgets, options.seeds)
        write(document, options.output)
    specs = frozen_specs(options.set)
    specs = specs[:: max(len(specs) // max(options.contexts, 1), 1)][: options.contexts]

    def report(found: dict[str, Any]) -> None:
        document["contexts"] = found
        write(document, options.output)

    contexts_part(
        sorted(specs, key=lambda spec: spec.model.reference),
        Programs(Path(options.cache)),
        deciders[0],
        options.seconds,
        report,
    )


if __name__ == "__main__":
    main()
