"""Claim: a planner trained on a cluster's own job trace beats the general one on its test jobs.

    meshwright traces import JOBS --store STORE
    OMP_NUM_THREADS=1 python -m benchmarks.planner_on_trace --store STORE --cache FOLDER --runs DIR

Jobs are drawn from the trace by GPU time (``env.traces``), the sizes of their models from the zoo;
no test job's problem is trained on. The general weights are trained further on the training jobs,
once for each seed, and compared with themselves on the test jobs: gaps to the optimum, and the
difference job by job with its interval. Prices are analytic on both sides.

S seeds, I test jobs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.heading import heading
from benchmarks.intervals import difference, gap_figures, win_rates
from benchmarks.planner_instances import deciders_of, write
from meshwright.agents.evaluation import Evaluation, Evaluator
from meshwright.agents.imitation import ImitationConfig
from meshwright.agents.planner import PRETRAINED, PolicyDecider
from meshwright.agents.policy import OnInstances
from meshwright.agents.training import Training, TrainingSettings
from meshwright.env.compiled import compile_instances
from meshwright.env.generator import InstanceSpec
from meshwright.env.instance import Instance
from meshwright.env.maker import Maker
from meshwright.env.traces import TracedJobs
from meshwright.solvers.reference import rule_time_s
from meshwright.tracking import LocalTracker

NUM_ENVS = 256
ITERATIONS = 30


def jobs_of(jobs: TracedJobs, maker: Maker, num_train: int, num_test: int) -> list[list[Instance]]:
    """Distinct jobs worth planning: training, validation (an eighth as many) and test."""
    wanted = [num_train, max(num_train // 8, 1), num_test]
    found: list[list[Instance]] = [[], [], []]
    for spec in _distinct(jobs, 50 * sum(wanted)):
        place = next((i for i, part in enumerate(found) if len(part) < wanted[i]), None)
        if place is None:
            break
        instance = maker.make(spec)
        if instance is not None:
            found[place].append(instance)
    if not all(found):
        raise SystemExit("the trace has too few distinct jobs worth planning; ask for fewer")
    return found


def _distinct(jobs: TracedJobs, most: int) -> Iterator[InstanceSpec]:
    seen: set[str] = set()
    for seed in count():
        if seed == most:
            return
        spec = jobs.draw(seed)
        if spec.name not in seen:
            seen.add(spec.name)
            yield spec


def judged(decider: PolicyDecider, instances: Sequence[Instance], seed: int) -> Evaluation:
    """Gaps of its policy's plans."""
    on_instances = OnInstances(decider.policy, [item.graph for item in instances])
    evaluator = Evaluator(compile_instances(instances), temperature=decider.temperature)
    return evaluator.evaluate(on_instances, seed=seed)


def tuned(
    weights: Path,
    seed: int,
    train: Sequence[Instance],
    validation: Sequence[Instance],
    folder: Path,
    iterations: int,
) -> PolicyDecider:
    """The general policy trained further."""
    settings = TrainingSettings(
        seed=seed,
        num_envs=NUM_ENVS,
        imitation_iterations=iterations,
        imitation=ImitationConfig(learning_rate=3e-4, num_minibatches=4),
        ppo_iterations=0,
        validate_every=max(iterations // 3, 1),
    )
    run = Training(
        settings,
        train,
        validation,
        folder=folder,
        tracker=LocalTracker(folder / "log"),
        start=deciders_of([weights], 1)[0][0].policy,
    )
    return PolicyDecider(run.run(), temperature=settings.sampling_temperature)


def compared(general_SI: NDArray[Any], own_SI: NDArray[Any]) -> dict[str, Any]:
    """Both sides' gaps, and the gain."""
    return {
        "general": gap_figures(general_SI),
        "trained_on_the_trace": gap_figures(own_SI),
        "gain": difference(general_SI, own_SI),
        "trained_against_general": win_rates(own_SI, general_SI),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="records of the job trace")
    parser.add_argument("--cache", type=Path, required=True, help="folder of made instances")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--weights", type=Path, default=PRETRAINED)
    parser.add_argument("--train", type=int, default=60)
    parser.add_argument("--test", type=int, default=60)
    parser.add_argument("--max-gpus", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs = TracedJobs.from_store(options.store, max_gpus=options.max_gpus)
    maker = Maker(cache=options.cache, reference=rule_time_s)
    train, validation, test = jobs_of(jobs, maker, options.train, options.test)
    general = deciders_of([options.weights], 1)[0][0]
    before, after = [], []
    for seed in range(options.seeds):
        folder = options.runs / f"seed-{seed}"
        own = tuned(options.weights, seed, train, validation, folder, options.iterations)
        before.append(judged(general, test, seed))
        after.append(judged(own, test, seed))
    figures = {
        name: compared(
            np.stack([getattr(found, name) for found in before]),
            np.stack([getattr(found, name) for found in after]),
        )
        for name in ("greedy_gap", "sampled_gap")
    }
    document = heading(
        "trained on one cluster's trace the planner gains on that cluster's test jobs",
        jobs_drawn_from=len(jobs.jobs),
        train=len(train),
        test=len(test),
        seeds=options.seeds,
        weights=options.weights.name,
        figures=figures,
    )
    write(document, options.output)


if __name__ == "__main__":
    main()
