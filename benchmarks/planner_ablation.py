"""Claim: what each part of the training brings, all else equal.

    OMP_NUM_THREADS=1 python -m benchmarks.planner_ablation --cache FOLDER --runs FOLDER -o FILE

Short trainings of equal length (iterations of imitation and PPO together, equally many
environments), one part changed at a time:

    whole           imitation, then PPO with a group baseline whose best return counts (MEX, as
                    ships), masks, randomized prices, graph
    mask off        every candidate may be taken; one that leaves nothing that fits ends the
                    episode with a fixed penalty (decisions with one answer are still not asked)
    imitation off   PPO for all iterations
    ppo off         imitation for all iterations
    group off       a learned value as baseline, one rollout of an instance
    randomization off
    mlp             the encoder sends no messages over the graph
    mex off         the mean return of a group is the baseline

Gaps to the optimum on the frozen validation set: greedy, and the best of 64 samples. ``mask off``
is judged with masks, as every policy is used; how many of its greedy plans would not fit without
them is told too. What is done is in the output file: run again, the program goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.heading import heading
from benchmarks.intervals import interquartile_mean, interval
from benchmarks.planner_instances import instances_of, write
from meshwright.agents.evaluation import Evaluator, play
from meshwright.agents.policy import OnInstances
from meshwright.agents.training import Training, TrainingSettings
from meshwright.env.batched import BatchedPlacement, Transition
from meshwright.env.compiled import compile_instances
from meshwright.env.instance import Float32Array, Instance, IntArray
from meshwright.env.placement import MASKED_REWARD
from meshwright.tracking import LocalTracker

ITERATIONS = 60
NUM_ENVS = 512
FIGURES = ("greedy_gap_mean", "sampled_gap_mean", "sampled_exact_fraction")


class Unmasked(BatchedPlacement):
    """Shows every candidate; who takes one that leaves nothing that fits, fails."""

    def step(self, action_B: IntArray) -> Transition:
        action = np.asarray(action_B, dtype=np.int64)
        fails = ~self._is_done & ~np.isfinite(self._best[self._every, action])
        safe = np.where(fails, self._best.argmin(axis=1), action)
        found = super().step(safe)
        if not fails.any():
            return found
        reward, ended = found.reward_B.copy(), found.terminated_B.copy()
        reward[fails], ended[fails] = MASKED_REWARD, True
        if self.restarts:
            self._begin(np.flatnonzero(fails))
        else:
            self._is_done[fails] = True
            self._time_s[fails] = np.inf
        return found._replace(observation=self._observe(), reward_B=reward, terminated_B=ended)

    def _see_rows(self, which: IntArray, mask: Any, features: Float32Array) -> None:
        found, node = self.compiled, self._node[which]
        for place, first, count in zip(
            which, found.first_child[node], found.num_children[node], strict=True
        ):
            child = np.arange(first, first + count)
            slot = found.slot[child]
            mask[place, slot] = True
            features[place, slot] = found.candidates[child]
            self._child[place, slot] = child
            self._best[place, slot] = found.best_s[child]

    def _see_room(self, which: IntArray, mask: Any, features: Float32Array) -> IntArray:
        decision = super()._see_room(which, mask, features)
        found, instance, level = self.compiled, self._instance[which], self._level[which]
        is_cut = level == found.num_groups[instance]
        width = np.where(is_cut, found.num_cuts[instance], found.num_variants[instance])
        group = np.where(is_cut, found.room_candidates.shape[1] - 1, level)
        for place, own, count, number in zip(which, instance, width, group, strict=True):
            mask[place, :count] = True
            features[place, :count] = found.room_candidates[own, number, :count]
        return decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One part changed."""

    settings: TrainingSettings
    is_masked: bool = True


def variants(iterations: int = ITERATIONS, num_envs: int = NUM_ENVS) -> dict[str, Variant]:
    """By name; every one trains for ``iterations``."""
    whole = TrainingSettings(
        num_envs=num_envs,
        imitation_iterations=iterations // 2,
        ppo_iterations=iterations - iterations // 2,
        validate_every=iterations,
    )
    whole = replace(whole, ppo=replace(whole.ppo, group_size=8, num_minibatches=4))

    def with_ppo(**changed: Any) -> Variant:
        return Variant(settings=replace(whole, ppo=replace(whole.ppo, **changed)))

    return {
        "whole": Variant(settings=whole),
        "mask off": Variant(settings=whole, is_masked=False),
        "imitation off": Variant(
            settings=replace(whole, imitation_iterations=0, ppo_iterations=iterations)
        ),
        "ppo off": Variant(
            settings=replace(whole, imitation_iterations=iterations, ppo_iterations=0)
        ),
        "group off": with_ppo(baseline="value", group_size=1),
        "randomization off": Variant(settings=replace(whole, randomization=0.0)),
        "mlp": Variant(settings=replace(whole, encoder="mlp")),
        "mex off": with_ppo(baseline="group"),
    }


def trained(
    variant: Variant,
    seed: int,
    instances: Sequence[Instance],
    validation: Sequence[Instance],
    folder: Path,
) -> dict[str, Any]:
    """One training and what its last weights do on the validation set."""
    patched: AbstractContextManager[Any] = nullcontext()
    if not variant.is_masked:
        patched = patch("meshwright.agents.training.BatchedPlacement", Unmasked)
    start_s = time.process_time()
    decisions = [0]
    with patched:
        run = Training(
            replace(variant.settings, seed=seed),
            instances,
            validation,
            folder=folder,
            tracker=LocalTracker(folder / "log"),
        )
        run.run(lambda _, iteration: decisions.append(iteration.num_env_steps))
    on_validation = OnInstances(run.policy, [item.graph for item in validation])
    compiled = compile_instances(validation)
    found = Evaluator(compiled, temperature=variant.settings.sampling_temperature).evaluate(
        on_validation, seed=seed
    )
    unmasked = Unmasked(compiled, len(validation))
    time_I = play(on_validation, unmasked, np.arange(len(validation)))
    return {
        "seed": seed,
        **{name: found.metrics[name] for name in FIGURES},
        "does_not_fit_without_mask": float((~np.isfinite(time_I)).mean()),
        "train_cpu_s": time.process_time() - start_s,
    }


def told(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Interquartile mean over seeds of each variant and its interval, worst last."""
    found = []
    for name in dict.fromkeys(str(row["variant"]) for row in rows):
        ours = [row for row in rows if row["variant"] == name]
        line: dict[str, Any] = {"variant": name, "seeds": len(ours)}
        for figure in (*FIGURES, "does_not_fit_without_mask"):
            values = np.array([[float(row[figure])] for row in ours])
            line[figure] = interquartile_mean(values)
            line[f"{figure}_interval_over_seeds"] = interval(values, interquartile_mean)
        found.append(line)
    return sorted(found, key=lambda line: float(line["sampled_gap_mean"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder of made instances")
    parser.add_argument("--ready", action="store_true", help="only what the cache has; make none")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--variants", nargs="+", default=list(variants()))
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    limits = {"train": options.train, "validation": options.validation}
    sets = {
        name: instances_of(name, options.cache, ready=options.ready, limit=limit)
        for name, limit in limits.items()
    }
    setup = {name: len(found) for name, found in sets.items()} | {"iterations": options.iterations}
    rows: list[dict[str, Any]] = []
    if options.output.exists():
        before = json.loads(options.output.read_text("utf-8"))
        if before["setup"] != setup:
            raise SystemExit(f"{options.output}: holds runs of {before['setup']}, not of {setup}")
        rows = before["rows"]
    known = {(row["variant"], row["seed"]) for row in rows}
    every = variants(options.iterations)
    for seed in range(options.seeds):
        for name in options.variants:
            if (name, seed) in known:
                continue
            folder = options.runs / f"{name.replace(' ', '-')}-{seed}"
            row = trained(every[name], seed, sets["train"], sets["validation"], folder)
            rows.append({"variant": name, **row})
            document = heading(
                "what each part of the training brings, all else equal",
                setup=setup,
                summary=told(rows),
                rows=rows,
            )
            write(document, options.output)


if __name__ == "__main__":
    main()
