"""Distributed steps on real gloo processes against plain PyTorch: the whole grid, as a table.

    python -m benchmarks.equivalence [--precision fp64] [--ranks 2 4 8] [--output FILE]

One row for each model and plan: the largest relative differences of losses (3 steps), gradients and
parameters after 3 AdamW steps; refused plans with the reason.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch

from meshwright.errors import PlanRefused
from meshwright.plans.plan import Precision
from tests.equivalence.processes import Found, lowered, run_on_processes
from tests.equivalence.recipes import MODELS, RECIPES
from tests.equivalence.subject import built_in, plan_of


def rows(num_ranks: int, precision: Precision) -> list[str]:
    runs = []
    refused: dict[str, str] = {}
    for model in MODELS:
        subject = built_in(model, precision=precision)
        for name, recipe in RECIPES.items():
            if recipe.num_devices != num_ranks:
                continue
            try:
                runs.append(lowered(f"{model} | {name}", subject, plan_of(subject, recipe)))
            except PlanRefused as error:
                refused[f"{model} | {name}"] = str(error)
    found = run_on_processes(runs, num_ranks=num_ranks)
    table = [_row(num_ranks, one) for one in found]
    return table + [
        f"| {num_ranks} | {name} | refused: {why} | | |" for name, why in refused.items()
    ]


def _row(num_ranks: int, one: Found) -> str:
    numbers = (one.loss, one.gradients, one.parameters)
    return f"| {num_ranks} | {one.name} | " + " | ".join(f"{n:.1e}" for n in numbers) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="fp64", choices=["fp64", "fp32"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    start = time.perf_counter()
    precision = Precision(options.precision)
    lines = [line for num_ranks in options.ranks for line in rows(num_ranks, precision)]
    table = "\n".join(
        [
            f"Equivalence in {precision} on gloo processes; torch {torch.__version__}, "
            f"Python {platform.python_version()}, {time.perf_counter() - start:.0f} s",
            "",
            "| ranks | model | plan | loss | gradients | parameters |",
            "| --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
        ]
    )
    if options.output is None:
        print(table)
    else:
        options.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
