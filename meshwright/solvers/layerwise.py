"""Layer-wise solvers: every segment its own sharding, ZeRO stage and recompute.

``LayerwiseDP`` cuts stages and mixes strategies by dynamic programming and prices of memory, then
polishes (``solvers.mixture``). ``LayerwiseILP`` takes the stages of the best of these and solves
the mixture on them as an integer program, which also says how far from the best it can be
(``solvers.mixture_ilp``).
"""

from __future__ import annotations

import time

from meshwright.solvers.frontier import Found, Frontier
from meshwright.solvers.mixture_ilp import IntegerMixture, integer_mixture
from meshwright.solvers.refit import judged, refitted
from meshwright.space.search import Candidate, SearchContext, SolveResult, SolveStatus

__all__ = ["LayerwiseDP", "LayerwiseILP"]

_NUM_JUDGED = 4
"""Mixtures priced exactly."""

_NUM_PROGRAMS = 3
"""Skeletons solved as integer programs."""

_PROGRAM_LIMIT_S = 4.0
_PROGRAM_GAP = 5e-4


class LayerwiseDP:
    """Mixtures by dynamic programming; a ``Proposer``."""

    def __init__(self, frontier: Frontier | None = None) -> None:
        """``frontier``: shared with others of the same search; an own one by default."""
        self._frontier = frontier

    @property
    def name(self) -> str:
        """``dp``."""
        return "dp"

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """The best mixtures of the best skeletons, fastest first."""
        start_s = time.monotonic()
        frontier = self._frontier or Frontier(context)
        before = frontier.evaluations
        found = frontier.mixtures(deadline_s)
        # What mixes shardings is estimated and may turn out not to fit; the others stay.
        narrow = _narrow(found)[:_NUM_JUDGED]
        wide = [one for one in found if one.mixture.fits and one not in narrow][:_NUM_JUDGED]
        candidates: list[Candidate] = []
        for one in (*narrow, *wide):

            def again(spare: float, one: Found = one) -> Found:
                return frontier.roomier(one, spare, deadline_s)

            candidates += refitted(context, one.space, one, again, solver=self.name)
        uniform = [frontier.uniform_of(one.space.skeleton) for one in narrow]
        candidates += judged(
            context, [u.decision for u in uniform if u is not None and u.fits], self.name
        )
        candidates.sort(key=lambda candidate: candidate.time_s)
        status = SolveStatus.DONE if frontier.is_complete else SolveStatus.STOPPED
        return SolveResult(
            candidates=tuple(candidates),
            evaluations=frontier.evaluations - before + len(candidates),
            seconds=time.monotonic() - start_s,
            status=status if candidates else SolveStatus.NOTHING_FITS,
            bound_s=frontier.survey().bound_s,
        )


class LayerwiseILP:
    """Mixtures by integer programming; a ``Proposer``."""

    def __init__(self, frontier: Frontier | None = None) -> None:
        """``frontier``: shared with others of the same search; an own one by default."""
        self._frontier = frontier

    @property
    def name(self) -> str:
        """``ilp``."""
        return "ilp"

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """The best mixtures on the stages of the best skeletons, and how far off they can be."""
        start_s = time.monotonic()
        frontier = self._frontier or Frontier(context)
        candidates: list[Candidate] = []
        notes: dict[str, str] = {}
        evaluations = number = 0
        is_complete = True
        for one in _narrow(frontier.mixtures(deadline_s))[:_NUM_PROGRAMS]:
            left_s = None
            if deadline_s is not None:
                left_s = min(_PROGRAM_LIMIT_S, (deadline_s - time.monotonic()) / 3)
                if left_s <= 0:
                    is_complete = False
                    break

            def again(
                spare: float, one: Found = one, left_s: float | None = left_s
            ) -> IntegerMixture:
                return integer_mixture(
                    one.space,
                    one.mixture.starts,
                    time_limit_s=left_s,
                    relative_gap=_PROGRAM_GAP,
                    spare=spare,
                )

            solved = again(0.0)
            evaluations += solved.evaluations
            if solved.mixture is None or not solved.mixture.fits:
                continue
            number += 1
            candidates += refitted(context, one.space, solved, again, solver=self.name)
            gap = solved.mixture.time_s / solved.bound_s - 1 if solved.bound_s > 0 else 0.0
            notes[str(number)] = f"within {max(gap, 0.0):.2%} of the best on its stages"
        candidates.sort(key=lambda candidate: candidate.time_s)
        status = SolveStatus.DONE if is_complete else SolveStatus.STOPPED
        return SolveResult(
            candidates=tuple(candidates),
            evaluations=evaluations + len(candidates),
            seconds=time.monotonic() - start_s,
            status=status if candidates else SolveStatus.NOTHING_FITS,
            notes=notes,
            bound_s=frontier.survey().bound_s,
        )


def _narrow(found: list[Found]) -> list[Found]:
    """Those with one way of sharding."""
    return [one for one in found if len(one.space.costs.shardings) == 1 and one.mixture.fits]
