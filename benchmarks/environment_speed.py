"""Claim: the batched environment takes at least 50,000 decisions a second on one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.environment_speed [-o FILE]

Decisions are drawn among the valid ones; observations of the next ones are built. Instances have
rows, groups, variants and cuts as those made of models (``env.toys.random_instance``). Environments
that wait for others do not count. Seconds are the processor's, of one thread, so that others on the
machine do not count.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.heading import heading
from meshwright.env.batched import BatchedPlacement
from meshwright.env.toys import random_instance

NUM_INSTANCES = 200
NUM_ROWS = 200
NUM_ENVS = (64, 1024, 4096)
REPEATS = 9


def decisions_per_s(environment: BatchedPlacement, seed: int) -> float:
    rng = np.random.default_rng(seed)
    start_s = time.process_time()
    observation: Any = environment.reset(seed=seed)
    spent_s = time.process_time() - start_s
    count = 0
    while np.isnan(environment.time_s()).any():
        mask = observation["action_mask"]
        action = (mask * rng.random(mask.shape)).argmax(axis=1)
        start_s = time.process_time()
        found = environment.step(action)
        spent_s += time.process_time() - start_s
        observation = found.observation
        count += int(found.is_valid_B.sum())
    return count / spent_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", type=Path)
    chosen = parser.parse_args()
    rng = np.random.default_rng(0)
    instances = [
        random_instance(rng, num_rows=NUM_ROWS, num_groups=3, num_variants=6, num_cuts=4)
        for _ in range(NUM_INSTANCES)
    ]
    claim = "50,000 decisions a second on one thread, observations included"
    result: dict[str, Any] = heading(
        claim, n=REPEATS, num_instances=NUM_INSTANCES, num_rows=NUM_ROWS
    )
    for num_envs in NUM_ENVS:
        environment = BatchedPlacement(instances, num_envs, group_size=8, randomization=0.1)
        rates = [decisions_per_s(environment, seed) for seed in range(REPEATS + 1)][1:]
        result[f"decisions_per_s of {num_envs} environments"] = {
            "median": round(float(np.median(rates))),
            "least": round(min(rates)),
            "most": round(max(rates)),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.o is not None:
        chosen.o.write_text(text + "\n")


if __name__ == "__main__":
    main()
