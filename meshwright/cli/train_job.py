"""What ``meshwright train`` does: from its options to a job, and what it says of the outcome."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from meshwright.agents.making import BEST_METRICS, Made, PlannerJob, Start, make_planner
from meshwright.agents.making import require_fresh as require_fresh_folder
from meshwright.agents.planner import PRETRAINED
from meshwright.agents.ranks import rank_and_size
from meshwright.agents.syllabus import (
    Syllabus,
    cluster_syllabus,
    general_syllabus,
    traced_syllabus,
)
from meshwright.agents.training import TrainingSettings
from meshwright.cli.fit_calibrate import corrected_pricing, measures_costs
from meshwright.cli.output import Output
from meshwright.cli.train import Asked, Objective
from meshwright.cluster import parse_cluster
from meshwright.cost.pricing import ANALYTIC, Pricing
from meshwright.env.maker import Maker
from meshwright.env.models import cache_folder
from meshwright.errors import BadRequest, PlannerError
from meshwright.gnn_cost.pretrained_pricing import load_pricing, named_pricing
from meshwright.solvers.reference import rule_time_s
from meshwright.tracking import Mirrored, Tracker, open_tracker, source_of, used

__all__ = ["run_training"]

_LONGEST_WAIT = timedelta(hours=6)
"""Of ranks while one makes the instances."""
_PEER_ENDED = "onnection closed by peer"
"""In what gloo says then."""


def run_training(asked: Asked, out: Output) -> None:
    """Make the planner that was asked for, and say what came of it.

    Raises:
        BadRequest: the folder holds another run, a file cannot be read, nothing can be learned.
    """
    with _ranks() as rank:
        folder = _folder(asked)
        require_fresh_folder(folder, is_resumed=asked.is_resumed)
        if dist.is_initialized():
            dist.barrier()  # Nobody writes there before all have looked.
        torch.set_num_threads(asked.num_threads)
        job = _job(asked, folder, out)
        problems: list[str] = []

        def complain(problem: str) -> None:
            problems.append(problem)
            out.progress(problem)

        tracker: Tracker = Mirrored([], complain=complain)
        run_id = ""
        if rank == 0:
            tracker, run_id = open_tracker(
                folder,
                asked.wandb,
                project=asked.project,
                group=asked.group,
                complain=complain,
                job_type="train",
                best=BEST_METRICS,
            )
        if asked.traces is not None:
            records = source_of(asked.traces, kind="records", num_rows=0)
            used(tracker, "records", records.sha256)
        made = make_planner(
            job,
            tracker=tracker,
            is_resumed=asked.is_resumed,
            budget_s=None if asked.end_s is None else max(0.0, asked.end_s - time.monotonic()),
            say=out.progress if rank == 0 else lambda _: None,
        )
        if made is not None:
            _show(out, made)
            out.document(_document(made, run_id, problems))


@contextmanager
def _ranks() -> Iterator[int]:
    """This process's rank, with a process group where torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield 0
        return
    dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    try:
        yield dist.get_rank()
    except RuntimeError as error:
        if _PEER_ENDED not in str(error):
            raise
        raise PlannerError(
            f"rank {dist.get_rank()}: another rank ended first; see what that one said"
        ) from error
    finally:
        dist.destroy_process_group()


def _folder(asked: Asked) -> Path:
    """Where the run is kept; under a sweep of W&B each has a folder of its own."""
    folder = Path(asked.output)
    is_swept = bool(os.environ.get("WANDB_SWEEP_ID"))
    return folder / os.environ["WANDB_RUN_ID"] if is_swept else folder


def _job(asked: Asked, folder: Path, out: Output) -> PlannerJob:
    start, syllabus = _start(asked), _syllabus(asked)
    return PlannerJob(
        syllabus=syllabus,
        settings=_settings(asked, start),
        maker=Maker(
            cache=cache_folder() if asked.cache is None else Path(asked.cache),
            reference=rule_time_s,
            pricing=_pricing(asked, syllabus, folder, out),
            cluster=None if asked.finetune is None else parse_cluster(asked.finetune),
        ),
        folder=folder,
        reproduce=_command(asked, num_ranks=rank_and_size()[1]),
        start=start,
        num_processes=asked.num_processes or len(os.sched_getaffinity(0)),
    )


def _start(asked: Asked) -> Start | None:
    if asked.init is not None:
        return Start.of(Path(asked.init) / PRETRAINED.name)
    return None if asked.finetune is None else Start.of(PRETRAINED)


def _syllabus(asked: Asked) -> Syllabus:
    if asked.traces is not None:
        return traced_syllabus(Path(asked.traces), asked.num_instances)
    if asked.finetune is not None:
        return cluster_syllabus(parse_cluster(asked.finetune), asked.num_instances)
    return general_syllabus(asked.num_instances)


def _pricing(asked: Asked, syllabus: Syllabus, folder: Path, out: Output) -> Pricing:
    """Those that ``plan`` has for the cluster or the jobs; for all clusters, data sheets.

    Learned prices are corrected by what the store of ``--traces`` measured.
    """
    is_general = asked.traces is None and asked.finetune is None
    name = asked.cost_model or ("analytic" if is_general else "learned")
    if syllabus.cluster is not None:
        return named_pricing(name, syllabus.cluster)
    if name == "analytic":
        if asked.traces is not None and measures_costs(asked.traces):
            out.progress("--cost-model analytic: what the store measured changes no price")
        return ANALYTIC
    weights = None if name == "learned" else Path(name)
    if asked.traces is None:
        return load_pricing(weights)
    specs = (*syllabus.train, *syllabus.validation)
    with _rank_0_first() as is_first:
        return corrected_pricing(
            asked.traces,
            weights=weights,
            folder=folder / "cost-model",
            cluster=None if asked.cluster is None else parse_cluster(asked.cluster),
            devices={part.device for spec in specs for part in spec.cluster.parts},
            say=out.progress if is_first else lambda _: None,
        )


@contextmanager
def _rank_0_first() -> Iterator[bool]:
    """Whether this is rank 0; others enter when it is done, so what it wrote they find."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if not is_first:
        dist.barrier()
    yield is_first
    if is_first and dist.is_initialized():
        dist.barrier()


def _settings(asked: Asked, start: Start | None) -> TrainingSettings:
    settings = TrainingSettings(seed=asked.seed)
    if start is not None:
        shape = start.policy.settings
        settings = replace(
            settings,
            hidden=shape.hidden,
            num_rounds=shape.num_rounds,
            encoder=shape.encoder,
            imitation_iterations=settings.imitation_iterations // _FEWER,
            ppo_iterations=settings.ppo_iterations // _FEWER,
            imitation=replace(
                settings.imitation, learning_rate=settings.imitation.learning_rate / _SLOWER
            ),
        )
    changes: dict[str, Any] = {
        f"{phase}_iterations": count for phase, count in asked.iterations.items()
    }
    changes |= {"num_envs": asked.num_envs, "randomization": asked.randomization}
    changes |= {"validate_every": asked.validate_every}
    network = {"hidden": asked.hidden, "encoder": asked.encoder and str(asked.encoder)}
    for name, value in network.items():
        if start is None:
            changes[name] = value
        elif value not in (None, getattr(settings, name)):
            raise BadRequest(
                f"--{name}: {value} is not what the planner that is gone on with has, "
                f"{getattr(settings, name)}; leave it out"
            )
    ppo = settings.ppo
    if asked.objective is Objective.MEAN:
        ppo = replace(ppo, baseline="group")
    if asked.learning_rate is not None:
        ppo = replace(ppo, learning_rate=asked.learning_rate)
    given = {name: value for name, value in changes.items() if value is not None}
    settings = replace(settings, ppo=ppo, **given)
    if settings.ppo_iterations and settings.num_envs % ppo.group_size:
        raise BadRequest(
            f"--envs: {settings.num_envs} is no whole number of groups of {ppo.group_size}"
        )
    if not any(settings.iterations(phase) for phase in asked.iterations):
        raise BadRequest("--imitation, --ppo and --expert are all 0: there is nothing to do")
    return settings


_FEWER = 4
"""Of the iterations, where a planner that can plan already is gone on with."""

_SLOWER = 4
"""Learning rate of imitation then."""


def _command(asked: Asked, *, num_ranks: int) -> str:
    """The command line of the card: names of files and folders, for paths are somebody's."""
    words = ["meshwright", "train"]
    if num_ranks > 1:
        words = ["torchrun", "--nproc-per-node", str(num_ranks), "-m", "meshwright.cli", "train"]
    words += ["--seed", str(asked.seed)]
    named = {
        "traces": asked.traces,
        "cluster": asked.cluster,
        "finetune": asked.finetune,
        "init": asked.init,
        "cost-model": asked.cost_model,
    }
    for name, text in named.items():
        if text is not None:
            words += [f"--{name}", os.path.basename(os.path.abspath(text))]
    plain: dict[str, object] = {
        "instances": asked.num_instances,
        **asked.iterations,
        "randomization": asked.randomization,
        "learning-rate": asked.learning_rate,
        "hidden": asked.hidden,
        "envs": asked.num_envs,
        "validate-every": asked.validate_every,
        "encoder": asked.encoder,
    }
    for name, value in plain.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    if asked.objective is not Objective.MAX:
        words += ["--objective", str(asked.objective)]
    if asked.num_threads != 1:
        words += ["--threads", str(asked.num_threads)]
    return shlex.join(words)


# The outcome ----------------------------------------------------------------------------------


def _show(out: Output, made: Made) -> None:
    table = Table("plans", "mean gap", "95th percentile", "best found")
    rows = [("", made.evaluation)] if made.before is None else []
    if made.before is not None:
        rows = [("before: ", made.before), ("now: ", made.evaluation)]
    for title, evaluation in rows:
        found = evaluation.metrics
        for kind, words in (("greedy", "most probable"), ("sampled", "best of samples too")):
            table.add_row(
                title + words,
                f"{found[f'{kind}_gap_mean']:.2%}",
                f"{found[f'{kind}_gap_p95']:.2%}",
                f"{found[f'{kind}_exact_fraction']:.1%}",
            )
    out.show(table)
    trained, validated = made.num_instances
    out.say(f"learned on {trained} instances; gaps to the optima of {validated} others")
    if made.status == "budget":
        out.say("stopped by the budget; --resume goes on")
    folder = made.path.parent
    out.say(f"written to {folder}; use it with `meshwright plan --planner {folder}`")


def _document(made: Made, run_id: str, problems: list[str]) -> dict[str, Any]:
    return {
        "folder": str(made.path.parent),
        "run_id": run_id,
        "status": made.status,
        "seconds": made.seconds,
        "num_instances": made.num_instances[0],
        "num_validation": made.num_instances[1],
        "validation": made.evaluation.metrics,
        "before": None if made.before is None else made.before.metrics,
        "tracking_problems": problems,
    }
