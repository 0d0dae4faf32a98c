"""Claim: policy and 64 samples plan within 1 % of the optimum, with local search within 0.5 %.

    OMP_NUM_THREADS=1 python -m benchmarks.planner_gap --cache FOLDER [--sets test-in] [-o FILE]

Over the frozen test instances, whose optima are known because all their plans are priced. An
instance keeps some of its rows (192): ``rule_beats_optimum`` says how often the best rule of thumb
is faster than all of its plans. Every searcher looks up equally many distinct plans
(``benchmarks.searchers``); samples of the policy count, repeated ones too. ``best of their rows``
takes the best plan of all rows that samples are on, as ``agents.planner.PolicyDecider`` does; its
evaluations are the mean number of plans that fit on these. Deterministic methods have one run. Runs
differ in the seed of training where several ``--weights`` are given, else in that of sampling:
``runs_differ_in`` says which.

S runs, I instances.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.heading import heading
from benchmarks.intervals import difference, gap_figures, win_rates
from benchmarks.planner_instances import (
    add_options,
    deciders_of,
    family_of,
    instances_of,
    optima_s,
    proposals,
    write,
)
from benchmarks.searchers import Problem, available, best_by_budget, is_random
from meshwright.agents.evaluation import EXACT
from meshwright.agents.local_search import improve
from meshwright.agents.planner import PolicyDecider, best_of_rows
from meshwright.env.decode import Placed
from meshwright.env.instance import Instance

FloatArray = NDArray[np.float64]

NUM_SAMPLES = 64
AFTER_SAMPLES = 50
"""Look-ups of the short local search."""
BUDGETS = (NUM_SAMPLES + 1, NUM_SAMPLES + 1 + AFTER_SAMPLES, 256)
BARS = {
    f"policy, {NUM_SAMPLES} samples": {"mean": 0.01},
    "policy, samples, local search": {"mean": 0.005, "p95": 0.02, "exact_share": 0.8},
}
_OF_ROWS = ", best of their rows"
_WORST = 10


def policy_times(
    deciders: Sequence[PolicyDecider],
    instances: Sequence[Instance],
    num_samples: int = NUM_SAMPLES,
    budgets: Sequence[int] = BUDGETS,
) -> dict[tuple[str, int], FloatArray]:
    """Method and evaluations to (S, I) times; run s draws with seed s."""
    found: dict[tuple[str, int], list[list[float]]] = {}
    of_rows: list[list[float]] = []
    priced: list[int] = []
    for seed, decider in enumerate(deciders):
        of_rows.append([])
        rows: dict[tuple[str, int], list[float]] = {}
        plans = proposals(decider, instances, num_samples=num_samples, seed=seed)
        for instance, drawn in zip(instances, plans, strict=True):
            times = [time_of(instance, placed) for placed in drawn]
            rows.setdefault(("policy, greedy", 1), []).append(times[0])
            samples = (f"policy, {num_samples} samples", len(times))
            rows.setdefault(samples, []).append(min(times))
            entered = {placed.row for placed in drawn}
            of_rows[-1].append(best_of_rows(instance, entered)[0].time_s)
            priced.append(sum(num_fitting(instance, row) for row in entered))
            for budget in budgets:
                if budget > len(times):
                    searched = improve(instance, drawn, max_evaluations=budget).time_s
                    rows.setdefault(("policy, samples, local search", budget), []).append(searched)
        for method, values in rows.items():
            found.setdefault(method, []).append(values)
    found[f"policy, {num_samples} samples{_OF_ROWS}", round(np.mean(priced))] = of_rows
    return {method: np.array(values) for method, values in found.items()}


def num_fitting(instance: Instance, row: int) -> int:
    """Plans of a row that fit."""
    return int(np.isfinite(instance.rooms.open(row).time_s).sum())


def time_of(instance: Instance, placed: Placed) -> float:
    """By the stored table."""
    return float(instance.rooms.open(placed.row).time_s[(*placed.variants, placed.cut)])


def searcher_times(
    instances: Sequence[Instance], budgets: Sequence[int], num_seeds: int
) -> dict[tuple[str, int], FloatArray]:
    """Method and evaluations to (S, I) times; rules of thumb count as one evaluation."""
    found: dict[tuple[str, int], FloatArray] = {
        ("rules", 1): np.array([[instance.reference_s for instance in instances]])
    }
    runs = {name: num_seeds if is_random(name) else 1 for name in available()}
    for name, count in runs.items():
        for budget in budgets:
            found[name, budget] = np.full((count, len(instances)), np.inf)
    for place, instance in enumerate(instances):
        problem = Problem(instance)
        for name, count in runs.items():
            for seed in range(count):
                times = best_by_budget(name, problem, budgets, seed=seed)
                for budget, time_s in zip(budgets, times.tolist(), strict=True):
                    found[name, budget][seed, place] = time_s
    return found


def compared(
    times: Mapping[tuple[str, int], FloatArray], optimum_I: FloatArray
) -> list[dict[str, Any]]:
    """One row a method: its gaps; of searchers also against the policy at equal evaluations."""
    gaps = {key: values / optimum_I - 1 for key, values in times.items()}
    ours = {
        evaluations: gap
        for (name, evaluations), gap in gaps.items()
        if name.startswith("policy") and not name.endswith(_OF_ROWS)
    }
    rows = []
    for (name, evaluations), gap_SI in gaps.items():
        row = {"method": name, "evaluations": evaluations, **gap_figures(gap_SI)}
        if not name.startswith("policy") and evaluations in ours:
            own_SI, other_SI = np.broadcast_arrays(ours[evaluations], gap_SI)
            row["policy_against_it"] = win_rates(own_SI, other_SI)
            if np.isfinite(other_SI).all():
                row["policy_less_it"] = difference(own_SI, other_SI)
        rows.append(row)
    return rows


def where_it_loses(
    gap_I: FloatArray, instances: Sequence[Instance]
) -> dict[str, list[dict[str, Any]]]:
    """Gaps by family of models, and the worst instances."""
    families = [family_of(instance) for instance in instances]
    by_family = [
        {
            "family": name,
            "instances": families.count(name),
            "mean": float(gap_I[np.array(families) == name].mean()),
            "exact_share": float((gap_I[np.array(families) == name] <= EXACT).mean()),
        }
        for name in sorted(set(families))
    ]
    worst = np.argsort(-gap_I, kind="stable")[:_WORST].tolist()
    return {
        "families": sorted(by_family, key=lambda row: -float(row["mean"])),
        "worst": [{"instance": instances[i].name, "gap": float(gap_I[i])} for i in worst],
    }


def measured(
    name: str,
    instances: Sequence[Instance],
    deciders: Sequence[PolicyDecider],
    *,
    num_seeds: int,
    num_samples: int = NUM_SAMPLES,
    budgets: Sequence[int] = BUDGETS,
    against_rules: bool = False,
) -> dict[str, Any]:
    """Everything about one set; ``against_rules``: gaps to the best known, rules included."""
    optimum_I = optima_s(instances)
    rule_I = np.array([instance.reference_s for instance in instances])
    rule_beats_optimum = float((rule_I < optimum_I * (1 - EXACT)).mean())
    optimum_I = np.minimum(optimum_I, rule_I) if against_rules else optimum_I
    times = policy_times(deciders, instances, num_samples, budgets)
    times |= searcher_times(instances, budgets, num_seeds)
    rows = compared(times, optimum_I)
    last = times["policy, samples, local search", max(budgets)] / optimum_I - 1
    return {
        "set": name,
        "n": len(instances),
        "gap_to": "best known" if against_rules else "optimum",
        "rule_beats_optimum": rule_beats_optimum,
        "bars_met": _bars_met(rows),
        "methods": rows,
        "after_local_search": where_it_loses(last.mean(axis=0), instances),
    }


def _bars_met(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    found = {}
    for method, bars in BARS.items():
        named = [row for row in rows if row["method"] == method]
        if not named:
            continue
        row = max(named, key=lambda row: int(row["evaluations"]))
        for figure, bar in bars.items():
            value = row[figure]
            met = value is not None and (value >= bar if "share" in figure else value <= bar)
            found[f"{method}: {figure} {bar}"] = bool(met)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--sets", nargs="+", default=["test-in"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    deciders, differ_in = deciders_of(options.weights, options.seeds)
    document = heading(
        "policy and 64 samples plan within 1 % of the optimum, with local search within 0.5 %",
        runs_differ_in=differ_in,
        weights=[path.name for path in options.weights],
        exact="the optimum of every instance is known: DP and exhaustive search have gap 0",
    )
    document["sets"] = []
    for name in options.sets:
        instances = instances_of(name, options.cache, ready=options.ready, limit=options.limit)
        document["sets"].append(measured(name, instances, deciders, num_seeds=options.seeds))
        write(document, options.output)


if __name__ == "__main__":
    main()
