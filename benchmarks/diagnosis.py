"""Claim: from per-rank times alone the diagnosis names the trouble in >= 95 % of synthetic sets.

    python -m benchmarks.diagnosis [--sets 100] [--output benchmarks/results/diagnosis.json]

A set is a table of 4 to 256 ranks and 60 to 300 iterations with normal, lognormal or exponential
noise, ranks that differ by 0.4 %, a first step three times as long; synchronous steps or a chain of
neighbors. One trouble is put in (or none): a rank slow from some iteration on, growing slower,
late at regular intervals or once; a delay that travels as an idle wave; two slow ranks. The answer
is right where kind, ranks, iteration (to 3; of a growing delay to a fifth of the run), delay (to
25 %), period and waves all are. Alarms in healthy sets are counted apart. Two harder lots follow,
an eighth as many: noise three times as large, and noise with heavy tails (Student's t of 3 degrees
of freedom), which holds delays of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.heading import heading
from meshwright.profiling.traces.diagnosis import diagnose
from tests.profiling.traces.troubled_tables import KINDS, answer_of, troubled_set

__all__ = ["confusion"]


_HARDER: dict[str, dict[str, Any]] = {
    "noise_times_three": {"scale": 3.0},
    "heavy_tails": {"noises": ("heavy",)},
}


def confusion(num_sets: int, *, seed: int = 0, **noise: Any) -> dict[str, Any]:
    """Answers by the kind put in, and how many are right; ``num_sets`` of each kind."""
    table: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    seconds, healthy_alarms = [], 0
    for index, kind in enumerate(KINDS):
        for number in range(num_sets):
            times, trouble = troubled_set(
                np.random.default_rng([seed, index, number]), kind, **noise
            )
            begin_s = time.perf_counter()
            found = diagnose(times)
            seconds.append(time.perf_counter() - begin_s)
            table[kind][answer_of(found, trouble)] += 1
            if kind == "none":
                healthy_alarms += not found.healthy
    right = sum(table[kind][kind] for kind in KINDS)
    return {
        "sets": num_sets * len(KINDS),
        "right": right,
        "right_fraction": right / (num_sets * len(KINDS)),
        "healthy_sets": num_sets,
        "healthy_sets_with_an_alarm": healthy_alarms,
        "answers_by_kind": {kind: dict(answers.most_common()) for kind, answers in table.items()},
        "diagnosis_median_s": float(np.median(seconds)),
        "diagnosis_max_s": max(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sets", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = {
        **heading("the diagnosis names what was put into synthetic step times"),
        **confusion(options.sets, seed=options.seed),
        "harder": {
            name: confusion(max(1, options.sets // 8), seed=options.seed + 1, **noise)
            for name, noise in _HARDER.items()
        },
    }
    text = json.dumps(result, indent=2) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
