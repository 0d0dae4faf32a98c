"""A planner on instances whose optima are known: how far its plans are from the best there are.

For each instance four plans are judged: the best rule of thumb's, the planner's most probable one,
the best of that and some samples, and what local search makes of those. A *gap* is a plan's time
over the optimum's, less 1. An instance keeps some rows of its space, so a rule of thumb may be
faster than all its plans; its gap is then below 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from meshwright.agents.evaluation import EXACT
from meshwright.agents.local_search import improve
from meshwright.agents.planner import PolicyDecider, sample_plans
from meshwright.bench.metrics import mean_interval
from meshwright.env.decode import best_of, in_words
from meshwright.env.instance import Instance
from meshwright.errors import BadRequest

__all__ = ["WAYS", "GapFigures", "JudgedInstance", "JudgedPlanner", "judge_planner"]

FloatArray = NDArray[np.float64]

WAYS: Mapping[str, str] = MappingProxyType(
    {
        "rule": "best rule of thumb",
        "greedy": "most probable plan",
        "sampled": "best of samples too",
        "searched": "after local search",
    }
)
"""How the plans that are judged come about, and in words."""

_SAY_EVERY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedInstance:
    """What the planner made of one instance."""

    name: str
    optimum_s: float
    time_s: Mapping[str, float]
    """Step times by ``WAYS``; a rule's is infinite where nothing it says fits."""
    evaluations: int
    """Distinct plans that local search looked up, samples included."""
    plan: str
    """The plan after local search, in words."""
    best_plan: str
    """One that takes ``optimum_s``."""

    def gap(self, way: str) -> float:
        """One of ``WAYS`` over the optimum, less 1."""
        return self.time_s[way] / self.optimum_s - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GapFigures:
    """Gaps of n plans in a few numbers; None for what is not finite."""

    n: int
    mean: float | None
    mean_interval: tuple[float, float] | None
    """95 %, by drawing the instances anew; so is the other."""
    p95: float | None
    worst: float | None
    exact_share: float
    """Of instances where nothing is faster, up to rounding."""
    exact_share_interval: tuple[float, float] | None

    @classmethod
    def of(cls, gaps: FloatArray) -> GapFigures:
        """Figures of (N,) gaps, one or more."""
        exact = gaps <= EXACT
        return cls(
            n=len(gaps),
            mean=_finite(gaps.mean()),
            mean_interval=mean_interval(gaps),
            p95=_finite(np.quantile(gaps, 0.95, method="lower")),
            worst=_finite(gaps.max()),
            exact_share=float(exact.mean()),
            exact_share_interval=mean_interval(exact),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedPlanner:
    """What a planner made of a set of instances."""

    instances: tuple[JudgedInstance, ...]
    num_samples: int
    temperature: float
    """Of the samples."""
    max_evaluations: int
    seed: int
    seconds: float
    """Spent on deciding and local search."""

    def gaps(self, way: str) -> FloatArray:
        """(N,) gaps of one of ``WAYS``."""
        return np.array([one.gap(way) for one in self.instances])

    def figures(self) -> dict[str, GapFigures]:
        """By ``WAYS``."""
        return {way: GapFigures.of(self.gaps(way)) for way in WAYS}


def judge_planner(
    decider: PolicyDecider,
    instances: Iterable[Instance],
    *,
    num_samples: int = 64,
    max_evaluations: int = 256,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> JudgedPlanner:
    """Plan every instance, and compare with its optimum; equal for equal seeds.

    Args:
        decider: a policy, and the temperature of its samples.
        instances: with rooms that hold all plans.
        num_samples: plans drawn for each besides the most probable one.
        max_evaluations: distinct plans that local search may look up, samples included.
        seed: of the samples.
        tell: how far it is, now and then, in one line.

    Raises:
        BadRequest: there is no instance, or local search is left nothing to look up.
    """
    if num_samples < 1:
        raise BadRequest(f"--samples: {num_samples} is too few; give 1 or more")
    if max_evaluations <= num_samples + 1:
        raise BadRequest(
            f"--evaluations: {max_evaluations} leaves local search none after {num_samples} "
            f"samples and the most probable plan; give {num_samples + 2} or more"
        )
    found: list[JudgedInstance] = []
    seconds = said_s = 0.0
    for instance in instances:
        began_s = time.monotonic()
        found.append(_judged(decider, instance, num_samples, max_evaluations, seed))
        seconds += time.monotonic() - began_s
        if seconds - said_s >= _SAY_EVERY_S:
            said_s = seconds
            tell(f"{len(found):,} instances planned")
    if not found:
        raise BadRequest(
            "instances: none is worth anything (nothing fits, or there is nothing to choose); ask "
            "for more with --instances"
        )
    return JudgedPlanner(
        instances=tuple(found),
        num_samples=num_samples,
        temperature=decider.temperature,
        max_evaluations=max_evaluations,
        seed=seed,
        seconds=seconds,
    )


def _judged(
    decider: PolicyDecider, instance: Instance, num_samples: int, max_evaluations: int, seed: int
) -> JudgedInstance:
    (greedy,) = sample_plans(decider.policy, instance, num_samples=0, seed=seed)
    sampled = sample_plans(
        decider.policy,
        instance,
        num_samples=num_samples,
        seed=seed,
        temperature=decider.temperature,
    )
    starts = [plan.placed for plan in sampled]
    searched = improve(instance, starts, max_evaluations=max_evaluations)
    optimum_s, best = best_of(instance)
    return JudgedInstance(
        name=instance.name,
        optimum_s=optimum_s,
        time_s={
            "rule": instance.reference_s,
            "greedy": greedy.time_s,
            "sampled": sampled[0].time_s,
            "searched": searched.time_s,
        },
        evaluations=searched.evaluations,
        plan=in_words(instance, searched.placed),
        best_plan=in_words(instance, best),
    )


def _finite(value: float | np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None
