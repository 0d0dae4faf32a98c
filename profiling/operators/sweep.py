"""A sweep over candidates: the least certain next, until all are measured or time is up.

Every Record is handed on as soon as it is made, so that whatever ends the sweep loses at most the
measurement it interrupts.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meshwright.errors import PlannerError
from meshwright.profiling.operators.candidate import Candidate, key_of_record
from meshwright.profiling.operators.catalog import DIM_NAMES, FAMILIES
from meshwright.profiling.operators.uncertainty import NeighborUncertainty, Uncertainty
from meshwright.records import Machine, Record, Scalar, Software
from meshwright.strict_json import one_line

__all__ = ["Skipped", "SweepPlan", "SweepResult", "measured_here", "run_sweep"]

_STARTING_RATES = {"cpu": (2e10, 5e9), "cuda": (2e13, 5e11)}
"""Operations and bytes per second assumed of operators of which nothing was measured yet."""
_CALLS = 6
"""At least: those of warming up, repeats and memory."""
_RESCORE_EVERY = 16
"""Measurements after which an injected uncertainty is asked again about every candidate."""
_FATAL = ("CUDA error", "device-side assert")
"""After these nothing runs on the device any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A candidate that was not measured, and why."""

    candidate: Candidate
    reason: str


class SweepProgress(Protocol):
    """Told how a sweep goes on."""

    def __call__(self, text: str, *, num_done: int, num_total: int, spent_s: float) -> None:
        """One line about what is measured next, and how far the sweep is."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """What a sweep is to do; see ``run_sweep``."""

    candidates: Sequence[Candidate]
    measure: Callable[[Candidate], Record]
    sink: Callable[[Record], None]
    device: str
    budget_s: float
    known: Sequence[tuple[Candidate, Record]] = ()
    """What the store holds already of this device and software."""
    problem: Callable[[Candidate], str] = lambda _: ""
    """Why a candidate cannot be measured here; empty where it can be tried."""
    uncertainty: Uncertainty | None = None
    """None means distance to and disagreement of what is measured."""
    progress: SweepProgress | None = None
    now_s: Callable[[], float] = time.monotonic


@dataclass(slots=True, kw_only=True)
class SweepResult:
    """What a sweep did."""

    num_measured: int = 0
    num_known: int = 0
    """Candidates the store held already."""
    num_left: int = 0
    """Candidates there was no time for."""
    skipped: list[Skipped] = field(default_factory=list)
    seconds: float = 0.0
    is_interrupted: bool = False
    stopped_by: str = ""
    """An error after which nothing runs any more; else empty."""


def run_sweep(plan: SweepPlan) -> SweepResult:
    """Measure the candidates, the least certain first; Ctrl-C ends it like the budget does.

    A candidate whose measurement fails is skipped with the error's first line. One that could not
    be over before the budget, judged by those of its operator measured so far, is left.
    """
    sweep = _Sweep(plan)
    try:
        sweep.run()
    except KeyboardInterrupt:
        sweep.result.is_interrupted = True
    result = sweep.result
    result.num_left = len(sweep.waiting)
    result.seconds = plan.now_s() - sweep.start_s
    return result


@dataclass(slots=True, kw_only=True, eq=False)
class _Waiting:
    """A candidate that is not measured yet, and what is thought of it."""

    candidate: Candidate
    group: tuple[object, ...]
    nominal_s: float
    """Of a call at rates taken for granted; only ratios count once something was measured."""
    call_s: float | None = None
    """What a call may take; None: to be worked out again."""
    score: float | None = None
    """How uncertain it is, likewise."""


class _Sweep:
    """The state of one sweep."""

    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan
        self.result = SweepResult()
        self.start_s = plan.now_s()
        self.waiting: dict[_Waiting, None] = {}
        """In the order given."""
        self._neighbors = NeighborUncertainty()
        self._uncertainty = plan.uncertainty or self._neighbors
        self._members: dict[tuple[object, ...], list[_Waiting]] = defaultdict(list)
        self._times_s: dict[tuple[object, ...], list[tuple[float, float]]] = defaultdict(list)
        for candidate, record in plan.known:
            self._learn(candidate, record)
        self._add(plan.candidates)

    def _add(self, candidates: Iterable[Candidate]) -> None:
        known = {candidate.key for candidate, _ in self.plan.known}
        seen: set[object] = set()
        for candidate in candidates:
            key = candidate.key
            if key in seen:
                continue
            seen.add(key)
            if key in known:
                self.result.num_known += 1
            elif reason := self.plan.problem(candidate):
                self.result.skipped.append(Skipped(candidate=candidate, reason=reason))
            else:
                item = _Waiting(
                    candidate=candidate,
                    group=candidate.group,
                    nominal_s=self._nominal_s(candidate),
                )
                self.waiting[item] = None
                self._members[item.group].append(item)

    def run(self) -> None:
        num_total = len(self.waiting)
        while item := self._next():
            candidate = item.candidate
            if self.plan.progress is not None:
                self.plan.progress(
                    str(candidate),
                    num_done=num_total - len(self.waiting),
                    num_total=num_total,
                    spent_s=self.plan.now_s() - self.start_s,
                )
            try:
                record = self.plan.measure(candidate)
            except PlannerError:
                raise
            except Exception as error:  # operators and compilers raise whatever they like
                reason = _first_line(error)
                self.result.skipped.append(Skipped(candidate=candidate, reason=reason))
                del self.waiting[item]
                if any(word in reason for word in _FATAL):
                    self.result.stopped_by = reason
                    return
                continue
            self.plan.sink(record)
            del self.waiting[item]
            self.result.num_measured += 1
            self._learn(candidate, record)

    def _next(self) -> _Waiting | None:
        """The least certain of those there is time for; the first of equals."""
        left_s = self.plan.budget_s - (self.plan.now_s() - self.start_s)
        if left_s <= 0:
            return None
        best: _Waiting | None = None
        best_rank = (0.0, 0.0)
        for item in self.waiting:
            if item.call_s is None:
                item.call_s = self._call_s(item)
            if _CALLS * item.call_s > left_s:
                continue
            if item.score is None:
                item.score = self._uncertainty(item.candidate)
            # Among equals, such as all of a group of which nothing is known, the smallest: how slow
            # a large one would be is not known either.
            rank = (item.score, -item.call_s)
            if best is None or rank > best_rank:
                best, best_rank = item, rank
        return best

    def _call_s(self, item: _Waiting) -> float:
        """What one call may take: scaled from the nearest of its group in work."""
        measured = self._times_s.get(item.group)
        if not measured or item.nominal_s <= 0:
            return item.nominal_s
        near_s, near_call_s = min(
            measured, key=lambda pair: abs(math.log(pair[0] / item.nominal_s))
        )
        return near_call_s * max(1.0, item.nominal_s / near_s)

    def _nominal_s(self, candidate: Candidate) -> float:
        work = FAMILIES[candidate.op].work_of(candidate)
        flop_per_s, bytes_per_s = _STARTING_RATES[self.plan.device.split(":")[0]]
        return max(work.flop / flop_per_s, work.bytes / bytes_per_s)

    def _learn(self, candidate: Candidate, record: Record) -> None:
        nominal_s = self._nominal_s(candidate)
        if nominal_s > 0:
            self._times_s[candidate.group].append((nominal_s, record.median))
        self._neighbors.observe(candidate, record)
        group = self._members[candidate.group]
        injected = self.plan.uncertainty is not None
        for item in group:
            item.call_s = None
            item.score = item.score if injected else None
        if injected and self.result.num_measured % _RESCORE_EVERY == 0:
            for item in self.waiting:
                item.score = None


def measured_here(
    records: Iterable[Record],
    candidates: Collection[Candidate],
    *,
    device: str,
    machine: Machine,
    software: Software,
    conditions: Mapping[str, Scalar],
) -> list[tuple[Candidate, Record]]:
    """Those of ``candidates`` that ``records`` hold, measured on such a machine in such a way.

    Processor, accelerators, torch and ``conditions`` (of the bench) must be the same; of several
    Records the last counts.
    """
    by_key = {candidate.key: candidate for candidate in candidates}
    found: dict[object, tuple[Candidate, Record]] = {}
    for record in records:
        key = key_of_record(record, DIM_NAMES)
        if (
            key in by_key
            and record.device == device
            and record.machine.processor == machine.processor
            and record.machine.accelerators == machine.accelerators
            and record.software.packages.get("torch") == software.packages.get("torch")
            and all(record.extra.get(name) == value for name, value in conditions.items())
        ):
            found[key] = (by_key[key], record)
    return list(found.values())


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")
