"""Train a small planner with the workers of a Ray cluster, after a sweep over its learning rate.

    pip install 'meshwright[ray]'
    python examples/planner_on_ray.py --address auto --workers 8 -o my-planner
    meshwright plan tiny-llama --cluster 2x4xt4 --global-batch 32 -O2 --planner my-planner

Without --address it starts a local cluster of two workers and throws it away afterwards. For one's
own planner write one's own jobs below, and let it train longer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from meshwright.agents.evaluation import Evaluator
from meshwright.agents.making import PLANNER_NAME
from meshwright.agents.policy import OnInstances, PlacementPolicy, collate
from meshwright.agents.ppo import PPO
from meshwright.agents.ray_workers import RayPPO, ray_session, sweep
from meshwright.agents.training import TrainingSettings
from meshwright.agents.weights import new_policy, save_policy
from meshwright.env.batched import BatchedPlacement
from meshwright.env.clusters import ClusterPart, ClusterSpec
from meshwright.env.compiled import compile_instances
from meshwright.env.generator import InstanceSpec
from meshwright.env.instance import Instance
from meshwright.env.maker import Maker
from meshwright.env.models import ModelSpec
from meshwright.errors import PlannerError
from meshwright.plans import OptimizerName, Precision
from meshwright.solvers.reference import rule_time_s

LEARNED_ON, VALIDATED_BY = ("tiny-mlp", "tiny-gpt"), ("tiny-llama",)
HOSTS_OF_FOUR_T4 = (2, 4)
SWEPT: tuple[dict[str, float], ...] = (
    {"learning_rate": 1e-3},
    {"learning_rate": 3e-3},
)
NUM_ENVS, NUM_ITERATIONS = 256, 8
"""Of each worker; of the sweep and of the training."""
DEFAULTS = TrainingSettings()


def spec_of(model: str, num_hosts: int) -> InstanceSpec:
    """A job: its model with a batch of 32, on hosts of four T4."""
    part = ClusterPart(num_hosts=num_hosts, devices_per_host=4, device="t4")
    return InstanceSpec(
        model=ModelSpec(reference=model, global_batch=32, precision=Precision.BF16),
        cluster=ClusterSpec(parts=(part,)),
        optimizer=OptimizerName.ADAMW,
        max_rows=48,
        max_plans=256,
    )


def made(models: Sequence[str]) -> tuple[Instance, ...]:
    """Instances of the jobs, priced by data sheets; made here, and sent to whoever plays them."""
    specs = [spec_of(model, hosts) for model in models for hosts in HOSTS_OF_FOUR_T4]
    with TemporaryDirectory() as cache:
        maker = Maker(cache=Path(cache), reference=rule_time_s)
        return tuple(instance for _, instance in maker.many(specs))


def begun(instances: Sequence[Instance], learning_rate: float) -> PPO:
    """A trainer that has learned nothing yet; the caller and every worker make their own."""
    policy = new_policy(hidden=32)
    group_size = DEFAULTS.ppo.group_size
    environment = BatchedPlacement(
        instances, NUM_ENVS, group_size=group_size, randomization=DEFAULTS.randomization
    )
    config = replace(DEFAULTS.ppo, learning_rate=learning_rate, num_steps=environment.max_decisions)
    graphs = [instance.graph for instance in instances]
    ppo = PPO(OnInstances(policy, graphs), environment, config, num_iterations=NUM_ITERATIONS)
    policy.standardize(collate(graphs), ppo.collect()[0].observation)
    return ppo


def policy_of(ppo: PPO) -> PlacementPolicy:
    """The weights that it trains."""
    assert isinstance(ppo.policy, OnInstances), "as begun"
    return ppo.policy.policy


def judged(policy: PlacementPolicy, instances: Sequence[Instance]) -> dict[str, float]:
    """How far its plans are from the best ones, as ``meshwright train`` judges."""
    evaluator = Evaluator(
        compile_instances(instances), num_samples=16, temperature=DEFAULTS.sampling_temperature
    )
    graphs = [instance.graph for instance in instances]
    return evaluator.evaluate(OnInstances(policy, graphs), seed=0).metrics


def trained(
    asked: argparse.Namespace, instances: Sequence[Instance], validation: Sequence[Instance]
) -> RayPPO:
    """With the setting of the sweep that comes to the least gap."""

    def figures(setting: Mapping[str, Any]) -> Mapping[str, float]:
        ppo = begun(instances, **setting)
        for _ in range(NUM_ITERATIONS):
            ppo.train_iteration()
        return judged(policy_of(ppo), validation)

    gaps: list[float] = []
    for one in sweep(figures, SWEPT):
        gaps.append(float("inf") if one.figures is None else one.figures["greedy_gap_mean"])
        print(f"{dict(one.setting)}: {one.problem or f'gap {gaps[-1]:.2%}'}")
    make = partial(begun, instances, **SWEPT[gaps.index(min(gaps))])
    run = RayPPO(make(), make, num_workers=asked.workers)
    before = judged(policy_of(run.ppo), validation)["greedy_gap_mean"]
    while run.iteration < NUM_ITERATIONS:
        steps = run.train_iteration().num_env_steps
    run.close()
    after = judged(policy_of(run.ppo), validation)["greedy_gap_mean"]
    print(f"{asked.workers} workers, {steps} decisions: gap {before:.2%} before, {after:.2%} after")
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", help="of a cluster; by default a local one is started")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, help="folder for the planner")
    asked = parser.parse_args()
    if find_spec("ray") is None:
        print("skipped: Ray is not installed; run pip install 'meshwright[ray]'")
        return
    with ray_session(asked.address, num_cpus=asked.workers):
        instances, validation = made(LEARNED_ON), made(VALIDATED_BY)
        print(f"{len(instances)} instances to learn on, {len(validation)} to validate with")
        run = trained(asked, instances, validation)
    if asked.output is not None:
        asked.output.mkdir(parents=True, exist_ok=True)
        policy = policy_of(run.ppo)
        training = {
            "ppo": asdict(run.ppo.config),
            "num_workers": asked.workers,
            "sampling_temperature": DEFAULTS.sampling_temperature,
        }
        card = {"training": training, "validation": {**judged(policy, validation)}}
        save_policy(policy, asked.output / PLANNER_NAME, card)
        print(f"meshwright plan ... --planner {asked.output}")


if __name__ == "__main__":
    try:
        main()
    except PlannerError as error:
        sys.exit(str(error))
