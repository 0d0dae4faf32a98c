"""Training a planner: imitation of exact optima, then PPO, then expert iteration.

Each phase goes on with the weights of the one before. Every so often the policy plans the
validation set; the weights with the least mean gap of the best of samples are kept. The folder of a
run holds what it goes on from, bit for bit: ``progress.json`` names the files of the phase (one of
each rank), ``best`` is a policy with its card. Under torchrun every rank plays and learns; rank 0
validates and writes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from meshwright.agents.evaluation import Evaluation, Evaluator
from meshwright.agents.expert import SearchTeacher
from meshwright.agents.imitation import ExactTeacher, Imitation, ImitationConfig
from meshwright.agents.policy import OnInstances, PlacementPolicy, collate
from meshwright.agents.ppo import PPO, Iteration, PPOConfig, tensors
from meshwright.agents.ranks import broadcast_state, rank_and_size
from meshwright.agents.weights import load_policy, new_policy, save_policy
from meshwright.env.batched import BatchedPlacement
from meshwright.env.compiled import Compiled, compile_instances
from meshwright.env.instance import Instance
from meshwright.errors import BadRequest
from meshwright.strict_json import (
    JsonValue,
    convert,
    dump_json,
    load_json,
    write_text_atomically,
)
from meshwright.tracking import Mirrored, Tracker

__all__ = ["PHASES", "Curriculum", "Training", "TrainingSettings"]

PHASES = ("imitation", "ppo", "expert")

Curriculum = Callable[[float], NDArray[np.int64]]
"""Numbers of the training instances to draw from when so much of the run (0 to 1) is done."""

_PROGRESS = "progress.json"
_BEST = "best.safetensors"


def _ppo_defaults() -> PPOConfig:
    return PPOConfig(
        learning_rate=3e-4,
        gamma=1.0,
        num_minibatches=8,
        num_epochs=2,
        clip_value_loss=False,
        entropy_weight=0.003,
        value_weight=0.1,
        max_gradient_norm=1.0,
        baseline="best",
        group_size=16,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """Everything that decides a run besides its instances; equal settings give equal weights."""

    seed: int = 0
    hidden: int = 64
    num_rounds: int = 2
    encoder: Literal["graph", "mlp"] = "graph"
    num_envs: int = 2048
    """Of each rank; for PPO and expert iteration a whole number of groups."""
    imitation_iterations: int = 150
    imitation: ImitationConfig = field(
        default_factory=lambda: ImitationConfig(learning_rate=2e-3, unknown_fraction=0.5)
    )
    temperature: float = 0.05
    """Of the targets of imitation, in units of relative time."""
    optimal_fraction: float = 0.25
    """Of the episodes of imitation, that follow the optimum and not the policy."""
    ppo_iterations: int = 50
    ppo: PPOConfig = field(default_factory=_ppo_defaults)
    """``num_steps`` and ``seed`` are set by the run; baseline ``best`` is the MEX objective:
    the best of a group counts, as it does in planning."""
    randomization: float = 0.1
    """Standard deviation of what the cost model is off by, drawn anew for each group."""
    expert_iterations: int = 0
    expert: ImitationConfig = field(default_factory=lambda: ImitationConfig(learning_rate=1e-4))
    expert_samples: int = 16
    expert_evaluations: int = 256
    validate_every: int = 10
    """Iterations; the last one of a phase is validated too."""
    validation_samples: int = 64
    sampling_temperature: float = 1.5
    """Of these samples; goes on the card, for whoever plans."""

    def iterations(self, phase: str) -> int:
        """How many of a phase."""
        return int(getattr(self, f"{phase}_iterations"))


class _Phase(Protocol):
    iteration: int
    num_iterations: int

    def train_iteration(self) -> Iteration: ...
    def save(self, path: Path) -> None: ...
    def load(self, path: Path) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Progress:
    """``progress.json``."""

    settings: dict[str, Any]
    num_ranks: int
    phase: str
    iteration: int
    best_gap: float | None
    best_at: str


class Training:
    """A run in a folder; made anew over the same folder it goes on."""

    def __init__(
        self,
        settings: TrainingSettings,
        instances: Sequence[Instance],
        validation: Sequence[Instance],
        *,
        folder: Path,
        tracker: Tracker,
        card: Mapping[str, JsonValue] | None = None,
        start: PlacementPolicy | None = None,
        curriculum: Curriculum | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            settings: of the run.
            instances: to learn on; their rooms are read, so they should be stored.
            validation: to choose weights by.
            folder: of the run; holds one run.
            tracker: told of every iteration; its failure does not stop the run.
            card: what stands on the card of the weights besides settings and figures.
            start: goes on with these weights (fine-tuning) and not with random ones.
            curriculum: which instances to draw from, and when.

        Raises:
            BadRequest: the folder holds a run with other settings, or a damaged one; no instances.
        """
        if not instances or not validation:
            raise BadRequest("training needs instances to learn on and some to validate with")
        self.settings = settings
        self.instances = instances
        self.folder = folder
        self.card = dict(card or {})
        self.curriculum = curriculum
        self.rank, self.num_ranks = rank_and_size()
        self.tracker = Mirrored([tracker], complain=lambda text: warnings.warn(text, stacklevel=2))
        self.compiled: Compiled = compile_instances(instances)
        self.policy = start or new_policy(
            hidden=settings.hidden,
            num_rounds=settings.num_rounds,
            encoder=settings.encoder,
            seed=settings.seed,
        )
        if start is None:
            self._standardize()
        broadcast_state(self.policy)
        self.on_training = OnInstances(self.policy, [item.graph for item in instances])
        self.on_validation = OnInstances(self.policy, [item.graph for item in validation])
        self.evaluator = Evaluator(
            compile_instances(validation),
            num_samples=settings.validation_samples,
            temperature=settings.sampling_temperature,
        )
        self.progress = self._read_progress()

    def run(self, on_iteration: Callable[[str, Iteration], None] | None = None) -> PlacementPolicy:
        """Train to the end, or go on to it, and give the policy with the least validation gap.

        Args:
            on_iteration: told of every iteration after its checkpoint.
        """
        self.tracker.config({"training": self.progress.settings})
        for phase in PHASES[PHASES.index(self.progress.phase) :]:
            self._run_phase(phase, on_iteration)
        if self.rank == 0:
            self.tracker.summary(
                {"best_gap": self.progress.best_gap, "best_at": self.progress.best_at}
            )
        if self.num_ranks > 1:
            torch.distributed.barrier()
        return load_policy(self.best_path)[0]

    @property
    def best_path(self) -> Path:
        """The weights with the least validation gap, once there are some."""
        return self.folder / _BEST

    # Phases -------------------------------------------------------------------------------------

    def _run_phase(self, name: str, on_iteration: Callable[[str, Iteration], None] | None) -> None:
        if self.settings.iterations(name) == 0:
            return
        phase, environment = self._phase(name)
        if self.progress.phase == name and self.progress.iteration:
            phase.load(self._phase_file(name, self.progress.iteration))
        while phase.iteration < phase.num_iterations:
            self._follow_curriculum(name, phase, environment)
            started_s = time.perf_counter()
            found = phase.train_iteration()
            metrics = dict(found.metrics)
            metrics["iteration_s"] = time.perf_counter() - started_s
            metrics["num_env_steps"] = float(found.num_env_steps)
            if found.episode_returns:
                metrics["mean_return"] = float(np.mean(found.episode_returns))
            is_last = phase.iteration == phase.num_iterations
            if self.rank == 0:
                self.tracker.metrics(name, metrics, step=found.number)
            if is_last or phase.iteration % self.settings.validate_every == 0:
                self._checkpoint(name, phase)
            if on_iteration is not None:
                on_iteration(name, found)

    def _phase(self, name: str) -> tuple[_Phase, BatchedPlacement]:
        settings, count = self.settings, self.settings.num_envs
        number = PHASES.index(name)
        seed = settings.seed * len(PHASES) + number
        iterations = settings.iterations(name)
        if name == "imitation":
            environment = BatchedPlacement(self.compiled, count)
            exact = ExactTeacher(
                environment,
                self.instances,
                temperature=settings.temperature,
                optimal_fraction=settings.optimal_fraction,
            )
            config = replace(settings.imitation, seed=seed)
            pupil = Imitation(self.on_training, exact, config, num_iterations=iterations)
            return pupil, environment
        if name == "expert":
            size = settings.expert_samples
            environment = BatchedPlacement(self.compiled, count, group_size=size)
            searching = SearchTeacher(
                environment,
                self.instances,
                num_samples=size,
                max_evaluations=settings.expert_evaluations,
            )
            config = replace(settings.expert, seed=seed)
            pupil = Imitation(self.on_training, searching, config, num_iterations=iterations)
            return pupil, environment
        environment = BatchedPlacement(
            self.compiled,
            count,
            group_size=settings.ppo.group_size,
            randomization=settings.randomization,
            restarts=settings.ppo.baseline == "value",
        )
        ppo = replace(settings.ppo, seed=seed, num_steps=environment.max_decisions)
        return PPO(self.on_training, environment, ppo, num_iterations=iterations), environment

    def _follow_curriculum(self, name: str, phase: _Phase, environment: BatchedPlacement) -> None:
        if self.curriculum is None:
            return
        before = PHASES[: PHASES.index(name)]
        done = phase.iteration + sum(self.settings.iterations(one) for one in before)
        total = sum(self.settings.iterations(one) for one in PHASES)
        environment.drawn_from = np.asarray(self.curriculum(done / total), np.int64)

    # Validation and checkpoints -----------------------------------------------------------------

    def validate(self) -> Evaluation:
        """Gaps of the present weights on the validation set."""
        return self.evaluator.evaluate(self.on_validation, seed=self.settings.seed)

    def _checkpoint(self, name: str, phase: _Phase) -> None:
        before = self.progress
        phase.save(self._phase_file(name, phase.iteration))
        best_gap, best_at = before.best_gap, before.best_at
        if self.rank == 0:
            found = self.validate()
            gap = found.metrics["sampled_gap_mean"]
            if best_gap is None or gap < best_gap:
                best_gap, best_at = gap, f"{name} {phase.iteration}"
                figures: dict[str, JsonValue] = {**found.metrics, "at": best_at}
                card: dict[str, JsonValue] = {"training": before.settings, "validation": figures}
                save_policy(self.policy, self.folder / _BEST, {**card, **self.card})
            self.tracker.metrics(
                "validation",
                {**found.metrics, "best_gap": best_gap},
                step=self._num_done(name, phase),
            )
        self.progress = replace(
            before, phase=name, iteration=phase.iteration, best_gap=best_gap, best_at=best_at
        )
        if self.num_ranks > 1:
            torch.distributed.barrier()
        if self.rank == 0:
            write_text_atomically(dump_json(asdict(self.progress)), self.folder / _PROGRESS)
        if before.iteration and (before.phase, before.iteration) != (name, phase.iteration):
            self._phase_file(before.phase, before.iteration).unlink(missing_ok=True)

    def _num_done(self, name: str, phase: _Phase) -> int:
        before = PHASES[: PHASES.index(name)]
        return phase.iteration + sum(self.settings.iterations(one) for one in before)

    def _phase_file(self, name: str, iteration: int) -> Path:
        return self.folder / f"{name}-{iteration}.rank{self.rank}.safetensors"

    def _read_progress(self) -> _Progress:
        path = self.folder / _PROGRESS
        settings = load_json(dump_json(asdict(self.settings)), error=BadRequest, name="settings")
        assert isinstance(settings, dict), "settings are a dataclass"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            return _Progress(
                settings=settings,
                num_ranks=self.num_ranks,
                phase=PHASES[0],
                iteration=0,
                best_gap=None,
                best_at="",
            )
        text = path.read_bytes()
        value = load_json(text, error=BadRequest, name=str(path))
        found = convert(value, _Progress, error=BadRequest, name=str(path))
        if found.settings != settings or found.num_ranks != self.num_ranks:
            raise BadRequest(
                f"{path}: its run had other settings or another number of ranks; go on with those, "
                f"or begin anew in another folder"
            )
        if found.phase not in PHASES:
            raise BadRequest(f"{path}: there is no phase {found.phase!r}; begin anew elsewhere")
        return found

    def _standardize(self) -> None:
        """Figures of the inputs from one episode of random decisions in every environment."""
        environment = BatchedPlacement(self.compiled, min(self.settings.num_envs, 1024))
        generator = torch.Generator().manual_seed(self.settings.seed)
        observation = tensors(environment.reset(seed=self.settings.seed))
        seen = []
        valid_B = torch.ones(environment.num_envs, dtype=torch.bool)
        for _ in range(environment.max_decisions):
            seen.append({name: item[valid_B] for name, item in observation.items()})
            mask_BA = observation["action_mask"].float()
            action_B = torch.multinomial(mask_BA, 1, generator=generator).squeeze(-1)
            step = environment.step(action_B.numpy())
            observation = tensors(step.observation)
            valid_B = valid_B & ~torch.from_numpy(step.terminated_B)
        graphs = collate([item.graph for item in self.instances])
        states = {name: torch.cat([item[name] for item in seen]) for name in observation}
        self.policy.standardize(graphs, states)
