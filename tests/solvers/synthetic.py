"""A landscape whose costs are written down: times and bytes of segments add up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshwright.plans.plan import Recompute
from meshwright.solvers.landscape import Landscape
from meshwright.space.decision import Sharding, Skeleton, Strategy

CLASSES = (0, 1, 1, 1, 1, 2)
"""Class of each segment."""

SKELETONS = tuple(
    Skeleton.of({"tp": tp, "dp_replicate": 4 // (tp * pp)}, num_stages=pp, num_microbatches=micro)
    for tp in (1, 2)
    for pp in (1, 2)
    for micro in (1, 2, 4)
)

STRATEGIES = tuple(
    Strategy(sharding=Sharding(name=name, by_class=()), recompute=recompute)
    for name in ("batch", "tensor")
    for recompute in (Recompute.NONE, Recompute.FULL)
)


@dataclass(frozen=True)
class Costs:
    time_s: NDArray[np.float64]
    excess: NDArray[np.float64]

    @property
    def fits(self) -> NDArray[np.bool_]:
        return self.excess <= 0


@dataclass
class SyntheticSpace:
    """Stages take the sum of their segments; the slowest one is waited for in every micro-batch."""

    seconds: NDArray[np.float64]
    """(strategies, segments)"""
    num_bytes: NDArray[np.float64]
    """(strategies, segments)"""
    num_microbatches: int
    capacity_bytes: float
    calls: list[int] = field(default_factory=list)

    @property
    def num_segments(self) -> int:
        return self.seconds.shape[1]

    @property
    def num_strategies(self) -> int:
        return self.seconds.shape[0]

    def evaluate(self, assignment: NDArray[np.int64], starts: NDArray[np.int64]) -> Costs:
        self.calls.append(len(assignment))
        rows = np.arange(self.num_segments)
        segment_s, segment_bytes = self.seconds[assignment, rows], self.num_bytes[assignment, rows]
        stage = (rows[None, :, None] >= starts[:, None, :]).sum(axis=2) - 1
        count = starts.shape[1]
        stage_s = np.stack([(segment_s * (stage == s)).sum(axis=1) for s in range(count)], axis=1)
        used = np.stack([(segment_bytes * (stage == s)).sum(axis=1) for s in range(count)], axis=1)
        time_s = stage_s.sum(axis=1) + (self.num_microbatches - 1) * stage_s.max(axis=1)
        excess = used.max(axis=1) / self.capacity_bytes - 1
        return Costs(time_s=time_s / self.num_microbatches, excess=excess)


def spaces(seed: int, *, capacity_bytes: float) -> dict[Skeleton, SyntheticSpace]:
    """Random costs by class: recomputing takes a third of the bytes and 20 to 60 % longer."""
    rng = np.random.default_rng(seed)
    found = {}
    for skeleton in SKELETONS:
        base = rng.uniform(1, 3, size=(2, 3))[:, CLASSES]
        num_bytes = rng.uniform(1, 3, size=(2, 3))[:, CLASSES]
        again = rng.uniform(1.2, 1.6, size=(2, 3))[:, CLASSES]
        found[skeleton] = SyntheticSpace(
            seconds=np.stack([base[0], base[0] * again[0], base[1], base[1] * again[1]]),
            num_bytes=np.stack([num_bytes[0], num_bytes[0] / 3, num_bytes[1], num_bytes[1] / 3]),
            num_microbatches=skeleton.num_microbatches,
            capacity_bytes=capacity_bytes,
        )
    return found


def landscape_of(
    found: dict[Skeleton, SyntheticSpace],
    *,
    max_evaluations: int,
    deadline_s: float | None = None,
    skeletons: Sequence[Skeleton] = SKELETONS,
) -> Landscape:
    return Landscape(
        skeletons,
        lambda skeleton: (found[skeleton], STRATEGIES),
        max_evaluations=max_evaluations,
        deadline_s=deadline_s,
    )


def optimum_s(found: dict[Skeleton, SyntheticSpace]) -> float:
    """The best of everything: every assignment, every cut, every skeleton."""
    best = float("inf")
    count = len(CLASSES)
    every = np.array(list(itertools.product(range(len(STRATEGIES)), repeat=count)))
    for skeleton, space in found.items():
        for cut in itertools.combinations(range(1, count), skeleton.num_stages - 1):
            starts = np.tile(np.array([0, *cut]), (len(every), 1))
            costs = space.evaluate(every, starts)
            if costs.fits.any():
                best = min(best, float(costs.time_s[costs.fits].min()))
    return best
