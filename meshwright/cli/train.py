"""``meshwright train``: make the learned planner, or fit it to one cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from meshwright.cli.options import JsonOption, parse_duration_s
from meshwright.cli.output import output_for
from meshwright.cli.tracked import PROJECT, GroupOption, ProjectOption, WandbOption
from meshwright.cluster import parse_cluster
from meshwright.errors import BadRequest
from meshwright.strict_json import one_line
from meshwright.tracking import WandbMode, require_wandb

__all__ = ["Asked", "Objective", "train"]

_FOLDER = "meshwright-planner"
_TRAINED_SHARE = 0.95
"""Of a budget; the rest is for the iteration it ends in, and for judging the weights."""
_LARGEST = {"--hidden": 1024, "--envs": 2**20, "--processes": 256, "--threads": 256}


class Objective(StrEnum):
    """What training raises."""

    MEAN = "mean"
    MAX = "max"


class Encoder(StrEnum):
    """What reads model and cluster."""

    GRAPH = "graph"
    MLP = "mlp"


_IterationsOption = Annotated[int | None, typer.Option(help="Iterations of this phase.")]
_OutputOption = Annotated[
    str, typer.Option("--output", "-o", metavar="DIR", help="Folder of the planner.")
]
_SeedOption = Annotated[int, typer.Option(help="Equal seeds and options give bit-equal weights.")]
_ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with what -o holds.")]
_BudgetOption = Annotated[
    str | None, typer.Option(help="Longest time, such as 90m; the best so far is kept.")
]
_InstancesOption = Annotated[
    int | None, typer.Option(help="Planning problems to learn on; all of the frozen set.")
]
_TracesOption = Annotated[
    str | None, typer.Option(metavar="DIR", help="Learn on jobs like those of this record store.")
]
_ClusterOption = Annotated[
    str | None, typer.Option(metavar="C", help="Where collectives of --traces were measured.")
]
_FinetuneOption = Annotated[
    str | None, typer.Option(metavar="CLUSTER", help="Fit a planner to this cluster alone.")
]
_InitOption = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Go on with this planner; --finetune: the package's."),
]
_PricesOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|DIR",
        help="What prices: analytic (usual), learned (usual with --traces and --finetune), "
        "or a fit's folder.",
    ),
]
_ObjectiveOption = Annotated[
    Objective, typer.Option(help="Of PPO: the mean of rollouts, or the best of a group.")
]
_EncoderOption = Annotated[
    Encoder | None, typer.Option(help="With messages over the graph (usual), or without.")
]
_RandomizationOption = Annotated[
    float | None, typer.Option(help="How far costs are off in PPO (standard deviation).")
]
_RateOption = Annotated[float | None, typer.Option(help="Of PPO.")]
_HiddenOption = Annotated[int | None, typer.Option(help="Width of the network.")]
_EnvsOption = Annotated[int | None, typer.Option(help="Environments of each process.")]
_EveryOption = Annotated[int | None, typer.Option(help="Iterations.")]
_ProcessesOption = Annotated[
    int | None, typer.Option(help="That make instances; all cores by default.")
]
_ThreadsOption = Annotated[int, typer.Option(help="Of the processor; more may change bits.")]
_CacheOption = Annotated[
    str | None, typer.Option(metavar="DIR", help="Where instances are kept, for all runs.")
]


def train(
    output: _OutputOption = _FOLDER,
    seed: _SeedOption = 0,
    resume: _ResumeOption = False,
    budget: _BudgetOption = None,
    instances: _InstancesOption = None,
    traces: _TracesOption = None,
    cluster: _ClusterOption = None,
    finetune: _FinetuneOption = None,
    init: _InitOption = None,
    cost_model: _PricesOption = None,
    imitation: _IterationsOption = None,
    ppo: _IterationsOption = None,
    expert: _IterationsOption = None,
    objective: _ObjectiveOption = Objective.MAX,
    encoder: _EncoderOption = None,
    randomization: _RandomizationOption = None,
    learning_rate: _RateOption = None,
    hidden: _HiddenOption = None,
    envs: _EnvsOption = None,
    validate_every: _EveryOption = None,
    processes: _ProcessesOption = None,
    threads: _ThreadsOption = 1,
    cache: _CacheOption = None,
    wandb: WandbOption = WandbMode.DISABLED,
    project: ProjectOption = PROJECT,
    group: GroupOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make the learned planner: imitation of exact optima, then PPO; expert iteration if asked.

    Without options it makes the one that comes with the package. torchrun trains on all its ranks.
    """
    began_s = time.monotonic()
    asked = Asked(
        output=output, seed=seed, is_resumed=resume,
        end_s=None if budget is None else began_s + _TRAINED_SHARE * parse_duration_s(budget),
        num_instances=instances, traces=traces, cluster=cluster, finetune=finetune, init=init,
        cost_model=cost_model, iterations={"imitation": imitation, "ppo": ppo, "expert": expert},
        objective=objective, encoder=encoder, randomization=randomization,
        learning_rate=learning_rate, hidden=hidden, num_envs=envs, validate_every=validate_every,
        num_processes=processes, num_threads=threads, cache=cache,
        wandb=wandb, project=project, group=group,
    )  # fmt: skip
    with output_for(as_json=json_output) as out:
        asked.check()
        from meshwright.cli.train_job import run_training

        run_training(asked, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options."""

    output: str
    seed: int
    is_resumed: bool
    end_s: float | None
    """``time.monotonic()`` at which training ends."""
    num_instances: int | None
    traces: str | None
    cluster: str | None
    finetune: str | None
    init: str | None
    cost_model: str | None
    iterations: Mapping[str, int | None]
    """By phase."""
    objective: Objective
    encoder: Encoder | None
    randomization: float | None
    learning_rate: float | None
    hidden: int | None
    num_envs: int | None
    validate_every: int | None
    num_processes: int | None
    num_threads: int
    cache: str | None
    wandb: WandbMode
    project: str
    group: str | None

    def check(self) -> None:
        """Refuse what cannot be, before anything large is imported.

        Raises:
            BadRequest: numbers out of range, or options that contradict each other.
        """
        for name, value, least in (
            ("--seed", self.seed, 0),
            ("--instances", self.num_instances, 1),
            ("--hidden", self.hidden, 4),
            ("--envs", self.num_envs, 1),
            ("--validate-every", self.validate_every, 1),
            ("--processes", self.num_processes, 1),
            ("--threads", self.num_threads, 1),
            *((f"--{name}", value, 0) for name, value in self.iterations.items()),
        ):
            most = _LARGEST.get(name, 2**31)
            if value is not None and not least <= value <= most:
                raise BadRequest(f"{name}: {value} is not from {least} to {most}")
        for name, rate in (
            ("--randomization", self.randomization),
            ("--learning-rate", self.learning_rate),
        ):
            if rate is not None and not 0 <= rate < 1:
                raise BadRequest(f"{name}: {rate} is not from 0 to below 1")
        if self.traces is not None and self.finetune is not None:
            raise BadRequest("--traces and --finetune: give one of them")
        if self.cluster is not None and self.traces is None:
            raise BadRequest("--cluster: says where --traces was measured; for one use --finetune")
        if self.traces is not None and not Path(self.traces).is_dir():
            raise BadRequest(
                f"--traces: {one_line(self.traces)}: no folder; give the store that `meshwright "
                "traces import` wrote"
            )
        for text in (self.cluster, self.finetune):
            if text is not None:
                parse_cluster(text)
        require_wandb(self.wandb)
