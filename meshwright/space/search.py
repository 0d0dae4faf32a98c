"""What every solver shares: the context of a search, a candidate, and what a search returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from meshwright.cluster.model import Cluster
from meshwright.cost.model import StepCostModel
from meshwright.cost.step import StepCost
from meshwright.plans.plan import GraphReference, JobSpec, ParallelPlan
from meshwright.space.decision import Decision, Skeleton, Strategy
from meshwright.space.module_pins import ModulePins, module_pins
from meshwright.space.pins import NO_PINS, Pins

__all__ = [
    "Candidate",
    "Decided",
    "Decider",
    "Progress",
    "Proposer",
    "SearchContext",
    "SolveResult",
    "SolveStatus",
]

Progress = Callable[[str], None]
"""Told in one line what the search is doing."""


class SolveStatus(StrEnum):
    """How a search ended."""

    DONE = "done"
    """The whole space was searched."""
    STOPPED = "stopped"
    """Some of the space was left out to save time."""
    SAMPLED = "sampled"
    """As many plans of the space were tried as the solver always tries."""
    NOTHING_FITS = "nothing_fits"
    NOT_APPLICABLE = "not_applicable"
    """The solver has no plan for such a graph or cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchContext:
    """What a search is about; its cost model remembers the tables it built."""

    model: StepCostModel
    reference: GraphReference
    cluster: Cluster
    cluster_name: str
    """As the user wrote it; goes into the plan."""
    job: JobSpec
    level: str
    """``O1`` or ``O2``."""
    batch: int
    """Samples that the batch axes may divide; 1 where the data have no batch."""
    can_split_step: bool
    """Micro-batches give the same loss as the whole batch."""
    pins: Pins = NO_PINS
    """What the user has decided."""
    allow_unrunnable: bool = False
    """Plans the runtime cannot carry yet may win."""
    seed: int = 0
    """Of searches that draw lots."""
    progress: Progress | None = field(default=None, compare=False)

    def allows(self, skeleton: Skeleton) -> bool:
        """Whether plans on the skeleton can respect the user's pins."""
        sizes = skeleton.sizes
        if not self.pins.allows_skeleton(skeleton) or not self.module_pins.allows_sizes(sizes):
            return False
        if self.pins.sequence_parallel and self.sequence_size % sizes["tp"]:
            return False
        hosts = self.cluster.hosts
        return all(
            host < len(hosts) and skeleton.num_devices_per_stage <= hosts[host].num_devices
            for _, host in self.pins.hosts
        )

    @property
    def module_pins(self) -> ModulePins:
        """The user's pins of modules, resolved to segments."""
        return module_pins(self.model, self.pins)

    @property
    def sequence_size(self) -> int:
        """Parts the sequence divides into; 1 where the data have none."""
        sequence = self.model.labels.sequence
        return 1 if sequence is None else self.model.analysis.class_size[sequence]

    def allows_strategy(self, strategy: Strategy) -> bool:
        """Whether a segment without pins of its own may use the strategy."""
        return self.pins.allows_strategy(strategy)

    def report(self, text: str) -> None:
        """Tell whoever listens."""
        if self.progress is not None:
            self.progress(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan and what it costs."""

    plan: ParallelPlan
    cost: StepCost
    solver: str

    @property
    def time_s(self) -> float:
        """Predicted step time."""
        return self.cost.time_s


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveResult:
    """What a proposer found."""

    candidates: tuple[Candidate, ...]
    """Best first; those that do not fit may be among them, last."""
    evaluations: int
    """Plans priced."""
    seconds: float
    status: SolveStatus
    notes: Mapping[str, str] = field(default_factory=dict)
    """Why a kind of plan is not among the candidates."""
    bound_s: float | None = None
    """No plan of the solver's space is faster; ``None``: it knows no bound."""

    @property
    def is_proven(self) -> bool:
        """The best candidate is the best of the solver's space."""
        if self.bound_s is None or not self.candidates or not self.candidates[0].cost.fits:
            return False
        return self.candidates[0].time_s <= self.bound_s * (1 + 1e-9)


class Proposer(Protocol):
    """Proposes plans for a context."""

    @property
    def name(self) -> str:
        """For provenance and reports."""
        ...

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """Plans worth considering.

        Args:
            context: what to plan.
            deadline_s: ``time.monotonic()`` after which to return what there is.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What a decider came to."""

    decisions: tuple[Decision, ...] = ()
    """Worth pricing, the most promising first; none where it has nothing to say."""
    evaluations: int = 0
    """Plans it priced on the way."""
    is_complete: bool = True
    """No deadline cut it short."""


class Decider(Protocol):
    """Decides without judging exactly: an agent, whose decisions a search starts from."""

    @property
    def name(self) -> str:
        """For provenance and reports."""
        ...

    def decide(self, context: SearchContext, deadline_s: float | None = None) -> Decided:
        """Decisions worth pricing.

        Args:
            context: what to plan; the same decisions for the same ``context.seed``.
            deadline_s: ``time.monotonic()`` after which to return what there is.
        """
        ...


def fitting(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that fit, fastest first."""
    return tuple(sorted((c for c in candidates if c.cost.fits), key=lambda c: c.time_s))
