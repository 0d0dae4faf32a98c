"""A planner from start to end: instances made, a policy trained, weights with a card written.

The folder holds ``planner.safetensors`` and its card ``planner.json``, ``specs.jsonl`` with the
instances in words, ``training/`` to go on from, and ``asked.json``, what the run was asked for: it
goes on with that alone. Under torchrun every rank trains; rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch.distributed as dist

from meshwright.agents.evaluation import Evaluation, play
from meshwright.agents.policy import OnInstances, PlacementPolicy
from meshwright.agents.ppo import Iteration
from meshwright.agents.ranks import mean_over_ranks, rank_and_size
from meshwright.agents.syllabus import Syllabus
from meshwright.agents.training import PHASES, Training, TrainingSettings
from meshwright.agents.weights import load_policy, save_policy
from meshwright.env.batched import BatchedPlacement
from meshwright.env.curriculum import Curriculum
from meshwright.env.decode import in_words
from meshwright.env.frozen import specs_lines, specs_sha256
from meshwright.env.instance import Instance
from meshwright.env.maker import Maker
from meshwright.env.thinned import thinned
from meshwright.errors import BadRequest
from meshwright.records import describe_software
from meshwright.strict_json import (
    JsonValue,
    dump_json,
    load_json,
    one_line,
    write_bytes_atomically,
    write_text_atomically,
)
from meshwright.tracking import Tracker, file_sha256, made, used
from meshwright.units import format_seconds

__all__ = [
    "BEST_METRICS",
    "PLANNER_NAME",
    "Made",
    "PlannerJob",
    "Start",
    "make_planner",
    "require_fresh",
]

PLANNER_NAME = "planner.safetensors"

BEST_METRICS: Mapping[str, str] = {
    "validation/greedy_gap_mean": "min",
    "validation/sampled_gap_mean": "min",
    "validation/sampled_exact_fraction": "max",
}
"""Which value of a metric sums up a run, for ``tracking.open_mirror``."""

_TRAINING, _ASKED, _SPECS = "training", "asked.json", "specs.jsonl"
_OWN_KEYS = ("card_version", "kind", "sha256", "policy_version", "columns", "settings")
_SAY_EVERY_S = 10.0
_MAX_COPIES, _MAX_TRAINED = 5, 2000
"""Thinned copies of an instance, as long as all together are no more than so many: about 2 GB."""
_SHOWN_METRICS = ("agreement", "entropy", "mean_return")


class _Stopped(Exception):
    """The budget is spent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A planner to go on from."""

    policy: PlacementPolicy
    sha256: str
    """Of its weights."""

    @classmethod
    def of(cls, path: Path) -> Start:
        """The planner in a file.

        Raises:
            BadRequest: it is missing, damaged or of another version.
        """
        return cls(policy=load_policy(path)[0], sha256=file_sha256(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What came of it."""

    path: Path
    """Of the weights."""
    status: str
    """``finished``, or ``budget``."""
    num_instances: tuple[int, int]
    """To learn on, and to validate with; of those asked for some are worth nothing."""
    evaluation: Evaluation
    """Of the weights on the validation instances."""
    before: Evaluation | None
    """Of what it started from."""
    seconds: float


def require_fresh(folder: Path, *, is_resumed: bool) -> None:
    """Check that a run may begin in a folder, or go on there.

    Raises:
        BadRequest: it holds one, and that is not to go on; or it holds none to go on with.
    """
    is_there = (folder / _ASKED).exists()
    if is_there and not is_resumed:
        raise BadRequest(
            f"{one_line(str(folder))}: holds a planner's training already; go on with it by "
            "--resume, or give another -o"
        )
    if is_resumed and not is_there:
        raise BadRequest(
            f"{one_line(str(folder))}: holds no planner's training to go on with; give its folder "
            "by -o, or leave out --resume to begin one"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerJob:
    """One planner to be made."""

    syllabus: Syllabus
    settings: TrainingSettings
    maker: Maker
    """Of instances."""
    folder: Path
    reproduce: str
    """The command line, for the card."""
    start: Start | None = None
    """Goes on with these weights."""
    num_processes: int = 1
    """That make instances."""

    @property
    def facts(self) -> dict[str, JsonValue]:
        """What decides the weights besides the settings and the number of ranks, for the card."""
        return {
            "instances": {"name": self.syllabus.name, "sha256": self.syllabus.sha256},
            "cost_model": {
                "name": self.maker.pricing.label,
                "sha256": self.maker.pricing.sha256,
            },
            "started_from": "" if self.start is None else self.start.sha256,
        }


def make_planner(
    job: PlannerJob,
    *,
    tracker: Tracker,
    is_resumed: bool = False,
    budget_s: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Made | None:
    """Train a planner and write it into the job's folder.

    Args:
        job: what to make.
        tracker: told everything.
        is_resumed: go on with what the folder holds.
        budget_s: after which training ends; the best weights so far are kept.
        say: told how far it is, in lines.

    Returns:
        ``None`` on other ranks than 0.

    Raises:
        BadRequest: the folder holds another run, or no instance is worth anything.
    """
    started_s = time.monotonic()
    status = "failed"
    try:
        _begin(job, is_resumed=is_resumed)
        _tell_inputs(job, tracker)
        train, validation = _instances(job, say)
        count = len(train)
        train = _with_thinned(train, job.settings.seed)
        run = Training(
            job.settings,
            train,
            validation,
            folder=job.folder / _TRAINING,
            tracker=tracker,
            card={**job.facts, "reproduce": job.reproduce, "software": _software()},
            start=None if job.start is None else job.start.policy,
            curriculum=Curriculum(train).active if job.start is None else None,
        )
        before = None if job.start is None else run.validate()
        end_s = None if budget_s is None else started_s + budget_s
        try:
            run.run(_Clock(job.settings, run, end_s, say))
            status = "finished"
        except _Stopped:
            status = "budget"
        if run.rank != 0:
            return None
        path, policy = _written(job, run, status)
        evaluation = run.evaluator.evaluate(
            OnInstances(policy, [item.graph for item in validation]), seed=job.settings.seed
        )
        _tell_outcome(job, tracker, run, path, policy, validation, evaluation)
        return Made(
            path=path,
            status=status,
            num_instances=(count, len(validation)),
            evaluation=evaluation,
            before=before,
            seconds=time.monotonic() - started_s,
        )
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        tracker.finish(status)


def _begin(job: PlannerJob, *, is_resumed: bool) -> None:
    if rank_and_size()[0] != 0:
        return  # By now rank 0 may have written what the check is about.
    require_fresh(job.folder, is_resumed=is_resumed)
    path = job.folder / _ASKED
    asked = dump_json({**job.facts, "settings": asdict(job.settings)})
    if path.exists() and load_json(path.read_bytes(), error=BadRequest, name=str(path)) != (
        load_json(asked, error=BadRequest, name="settings")
    ):
        raise BadRequest(
            f"{path}: its run had other settings, instances or prices; go on with those, or give "
            "another -o"
        )
    job.folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(asked, path)
    specs = (*job.syllabus.train, *job.syllabus.validation)
    write_bytes_atomically(specs_lines(specs), job.folder / _SPECS)


def _instances(
    job: PlannerJob, say: Callable[[str], None]
) -> tuple[tuple[Instance, ...], tuple[Instance, ...]]:
    """Those worth something; under torchrun rank 0 makes them and all read them."""
    rank, size = rank_and_size()
    both = (job.syllabus.train, job.syllabus.validation)
    say(f"making {len(both[0])} instances to learn on and {len(both[1])} to validate with")
    if size > 1:
        if rank == 0:
            for _ in job.maker.many(
                [*both[0], *both[1]], num_processes=job.num_processes, progress=say
            ):
                pass
        dist.barrier()
    train, validation = (
        tuple(
            instance
            for _, instance in job.maker.many(specs, num_processes=job.num_processes, progress=say)
        )
        for specs in both
    )
    if not train or not validation:
        raise BadRequest(
            f"instances: of {len(both[0])} to learn on {len(train)} are worth something, of "
            f"{len(both[1])} to validate with {len(validation)} (nothing fits the others, or "
            "there is nothing to choose); ask for more with --instances"
        )
    say(f"{len(train)} and {len(validation)} are worth something")
    return train, validation


def _with_thinned(instances: Sequence[Instance], seed: int) -> tuple[Instance, ...]:
    """The instances and thinned copies of each, by turns until there are enough."""
    found = list(instances)
    for turn in range(_MAX_COPIES):
        if len(found) + len(instances) > _MAX_TRAINED:
            break
        for number, instance in enumerate(instances):
            copy = thinned(instance, np.random.default_rng((seed, turn, number)))
            found += [] if copy is None else [copy]
    return tuple(found)


class _Clock:
    """Says how far training is, and ends it when the budget is spent and some weights are kept."""

    def __init__(
        self,
        settings: TrainingSettings,
        run: Training,
        end_s: float | None,
        say: Callable[[str], None],
    ) -> None:
        self._settings, self._run, self._say = settings, run, say
        self._end_s = end_s
        self._began_s = time.monotonic()
        self._said_s = float("-inf")

    def __call__(self, phase: str, found: Iteration) -> None:
        now_s = time.monotonic()
        count = self._settings.iterations(phase)
        if now_s - self._said_s >= _SAY_EVERY_S or found.number == count:
            self._said_s = now_s
            words = [
                f"{name.replace('_', ' ')} {found.metrics[name]:.3g}"
                for name in _SHOWN_METRICS
                if name in found.metrics
            ]
            gap = self._run.progress.best_gap
            words += [] if gap is None else [f"best gap {gap:.2%}"]
            spent = format_seconds(now_s - self._began_s)
            self._say(f"{phase}: {found.number} of {count}, {', '.join(words)}, {spent}")
        is_last = phase == self._last_phase() and found.number == count
        is_late = self._end_s is not None and now_s > self._end_s
        can_stop = is_late and not is_last and self._run.best_path.exists()
        if mean_over_ranks(float(can_stop)) > 0:
            raise _Stopped

    def _last_phase(self) -> str:
        return [phase for phase in PHASES if self._settings.iterations(phase)][-1]


def _written(job: PlannerJob, run: Training, status: str) -> tuple[Path, PlacementPolicy]:
    """The best weights, with their card, where a planner is looked for."""
    policy, card = load_policy(run.best_path)
    kept = {key: value for key, value in card.items() if key not in _OWN_KEYS}
    path = job.folder / PLANNER_NAME
    save_policy(policy, path, {**kept, "num_ranks": run.num_ranks, "status": status})
    return path, policy


def _software() -> JsonValue:
    found: JsonValue = msgspec.to_builtins(describe_software())
    return found


# What is told ---------------------------------------------------------------------------------


def _tell_inputs(job: PlannerJob, tracker: Tracker) -> None:
    tracker.config({**job.facts, "reproduce": job.reproduce})
    syllabus = job.syllabus
    facts: dict[str, JsonValue] = {"name": syllabus.name, "sha256": syllabus.sha256}
    for name, specs in (("train", syllabus.train), ("validation", syllabus.validation)):
        facts |= {name: len(specs), f"{name}_sha256": specs_sha256(specs)}
    tracker.artifact(
        f"instances-{syllabus.sha256[:12]}",
        kind="dataset",
        files=(job.folder / _SPECS,),
        metadata=facts,
    )
    if job.maker.pricing.sha256:
        used(tracker, "cost-model", job.maker.pricing.sha256)
    if job.start is not None:
        used(tracker, "planner", job.start.sha256)


def _tell_outcome(
    job: PlannerJob,
    tracker: Tracker,
    run: Training,
    path: Path,
    policy: PlacementPolicy,
    validation: Sequence[Instance],
    evaluation: Evaluation,
) -> None:
    count = len(validation)
    environment = BatchedPlacement(run.evaluator.compiled, count)
    on_validation = OnInstances(policy, [item.graph for item in validation])
    time_s = play(on_validation, environment, np.arange(count))
    gaps: list[list[JsonValue]] = []
    plans: list[list[JsonValue]] = []
    for number, (instance, placed) in enumerate(zip(validation, environment.placed(), strict=True)):
        optimum_s = float(run.evaluator.optimum_I[number])
        greedy, sampled = evaluation.greedy_gap[number], evaluation.sampled_gap[number]
        gaps.append([instance.name, float(greedy), float(sampled), optimum_s, instance.reference_s])
        if placed is not None:
            plans.append([instance.name, float(time_s[number]), in_words(instance, placed)])
    tracker.table(
        "validation/gaps", ("instance", "greedy", "sampled", "optimum_s", "reference_s"), gaps
    )
    tracker.table("validation/plans", ("instance", "time_s", "plan"), plans)
    figures: dict[str, JsonValue] = {**evaluation.metrics}
    tracker.summary(figures)
    sha256 = file_sha256(path)
    sources = [job.syllabus.sha256, job.maker.pricing.sha256]
    sources += [] if job.start is None else [job.start.sha256]
    tracker.artifact(
        "meshwright-planner",
        kind="model",
        files=[path, path.with_suffix(".json")],
        metadata={**figures, "sha256": sha256},
        made_from=[item for item in sources if item],
    )
    made(tracker, "planner", sha256)
