"""Every uniform plan: one strategy for all segments, on every skeleton that can be best.

The space is the product of

* the axes inside a stage: ``tp`` within a host, where some dimension divides, with the sequence or
  without; context parallelism and experts;
* every number of stages that divides the devices left, cut evenly by time, or by memory where that
  does not fit;
* data parallelism over the rest, as far as the batch divides; ZeRO 0 to 3 over all of it or over
  what a host holds;
* every number of micro-batches; recompute none, selective, full.

Skeletons are tried in order of an estimate (``survey``). The best plans are then priced exactly,
under each schedule.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from meshwright.solvers.survey import Survey, scope_of, survey
from meshwright.space.evaluate import candidate_of_decision
from meshwright.space.schedules import with_schedules
from meshwright.space.search import Candidate, SearchContext, SolveResult, SolveStatus

__all__ = ["Exhaustive"]

_SHORTLIST = 12


class Exhaustive:
    """Enumerates uniform plans; a ``Proposer``."""

    def __init__(self, look: Callable[[float | None], Survey] | None = None) -> None:
        """``look``: the survey of the same context until a deadline; made anew by default."""
        self._look = look

    @property
    def name(self) -> str:
        """``exhaustive``."""
        return "exhaustive"

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """The best uniform plans, fastest first; the one nearest to fitting where none fits."""
        start_s = time.monotonic()
        if self._look is None:
            found = survey(context, within=scope_of(context), deadline_s=deadline_s)
        else:
            found = self._look(deadline_s)
        fitting = found.fitting
        candidates: list[Candidate] = []
        for uniform in fitting[:_SHORTLIST]:
            for decision in with_schedules(context, uniform.decision):
                candidate = candidate_of_decision(context, decision, solver=self.name)
                if candidate.cost.fits:
                    candidates.append(candidate)
        candidates.sort(key=lambda candidate: candidate.time_s)
        status = SolveStatus.DONE if found.is_complete else SolveStatus.STOPPED
        if not candidates:
            status = SolveStatus.NOTHING_FITS
            for uniform in sorted(found.uniform, key=lambda u: u.excess)[:1]:
                candidates.append(
                    candidate_of_decision(context, uniform.decision, solver=self.name)
                )
        rest = [uniform.time_s for uniform in fitting[_SHORTLIST:]]
        best_s = [candidate.time_s for candidate in candidates[:1] if candidate.cost.fits]
        return SolveResult(
            candidates=tuple(candidates),
            evaluations=found.evaluations + len(candidates),
            seconds=time.monotonic() - start_s,
            status=status,
            notes=found.notes,
            # What was not priced exactly takes at least its estimate.
            bound_s=min(best_s + rest, default=None) if found.is_complete else found.bound_s,
        )
