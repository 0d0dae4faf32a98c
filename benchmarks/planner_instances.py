"""Shared by the benchmarks of the planner: frozen instances, weights, what a policy proposes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from meshwright.agents.evaluation import play
from meshwright.agents.planner import PRETRAINED, PolicyDecider
from meshwright.agents.policy import OnInstances
from meshwright.agents.weights import new_policy
from meshwright.env.batched import BatchedPlacement
from meshwright.env.compiled import compile_instances
from meshwright.env.decode import Placed, best_of
from meshwright.env.frozen import frozen_specs
from meshwright.env.instance import Instance
from meshwright.env.maker import Maker
from meshwright.solvers.reference import rule_time_s

__all__ = [
    "add_options",
    "deciders_of",
    "family_of",
    "instances_of",
    "optima_s",
    "proposals",
    "write",
]

FloatArray = NDArray[np.float64]

_COMPILED_AT_ONCE = 32
UNTRAINED = Path("untrained")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where instances and weights come from, and where the result goes."""
    parser.add_argument("--cache", type=Path, required=True, help="folder of made instances")
    parser.add_argument("--ready", action="store_true", help="only what the cache has; make none")
    parser.add_argument("--limit", type=int, help="of the instances of a set, so many")
    parser.add_argument(
        "--weights",
        type=Path,
        nargs="+",
        default=[PRETRAINED],
        help="one file of each training seed; `untrained` for a policy that learned nothing",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)


def instances_of(
    name: str, cache: Path, *, ready: bool = False, limit: int | None = None
) -> list[Instance]:
    """The instances of a frozen set that are worth something, made where they are missing."""
    maker = Maker(cache=cache, reference=rule_time_s)
    specs = frozen_specs(name)
    if not ready:
        found = [instance for _, instance in maker.many(specs[:limit])]
    else:
        made = (maker.ready(spec) for spec in specs)
        found = [instance for instance in made if instance is not None][:limit]
    if not found:
        raise SystemExit(f"set {name}: no instance in {cache}; leave out --ready to make them")
    return found


def deciders_of(paths: Sequence[Path], num_seeds: int) -> tuple[list[PolicyDecider], str]:
    """One decider for each run, and what the runs differ in."""
    found = [
        PolicyDecider(new_policy(seed=0)) if path == UNTRAINED else PolicyDecider.pretrained(path)
        for path in paths
    ]
    if len(found) > 1:
        return found, "training"
    return found * num_seeds, "sampling"


def optima_s(instances: Sequence[Instance]) -> FloatArray:
    """(I,) exact least times."""
    return np.array([best_of(instance)[0] for instance in instances])


def family_of(instance: Instance) -> str:
    """Its model's name up to the first digit or option: ``llama2``, ``gpt``."""
    return instance.name.split(":")[0].split("?")[0].split("-")[0]


def proposals(
    decider: PolicyDecider, instances: Sequence[Instance], *, num_samples: int, seed: int
) -> list[list[Placed]]:
    """For each instance the greedy plan, then ``num_samples`` samples in the order drawn.

    They are drawn at the temperature of the decider, as whoever plans draws them.
    """
    found: list[list[Placed]] = []
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, len(instances), _COMPILED_AT_ONCE):
        part = instances[begin : begin + _COMPILED_AT_ONCE]
        compiled = compile_instances(part)
        on_part = OnInstances(decider.policy, [item.graph for item in part])
        greedy = BatchedPlacement(compiled, len(part))
        play(on_part, greedy, np.arange(len(part)))
        plans: list[list[Any]] = [[placed] for placed in greedy.placed()]
        if num_samples:
            drawn = BatchedPlacement(compiled, len(part) * num_samples)
            numbers = np.repeat(np.arange(len(part)), num_samples)
            play(on_part, drawn, numbers, generator, temperature=decider.temperature)
            for number, placed in enumerate(drawn.placed()):
                plans[number // num_samples].append(placed)
        found += plans
    return found


def write(document: dict[str, Any], path: Path | None) -> None:
    """To the file, or to the terminal."""
    text = json.dumps(document, indent=2) + "\n"
    if path is None:
        sys.stdout.write(text)
    else:
        path.write_text(text, "utf-8")
