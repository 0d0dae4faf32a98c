"""All runs of a table, predicted by one or several cost models, on one process or more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

from meshwright.bench.outcomes import Outcome
from meshwright.bench.predict import Predictor, RunPrediction
from meshwright.bench.pricings import fitted_on, pricing_of
from meshwright.bench.regret import rule_scores
from meshwright.bench.run_table import RunTable
from meshwright.bench.runs import MeasuredRun, Skipped
from meshwright.errors import BadRequest

__all__ = ["Evaluation", "evaluate", "outcome_of"]

_Answers = tuple[RunPrediction | Skipped, ...]
"""Of one run, by each cost model."""
_Told = Callable[[int, int, float], None]
"""Runs done, runs in all, seconds spent."""

_USUAL_HOST = 8
"""GPUs of a host where the table does not tell."""
_MOST_OF_A_PART = 32
"""Runs that go to a process together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What became of a table."""

    outcomes: Mapping[str, tuple[Outcome, ...]]
    """By cost model, each the same runs in the order of the table."""
    labels: Mapping[str, str]
    """Of each cost model, by its name: what it calls itself, with the start of its hash."""
    in_sample: frozenset[str]
    """Cost models that were fitted on this very table."""
    skipped: tuple[Skipped, ...]
    """Rows without a prediction by all cost models, and why."""
    seconds: float


def evaluate(
    table: RunTable, names: Sequence[str], *, num_processes: int = 1, tell: _Told | None = None
) -> Evaluation:
    """Predict the measured runs of a table.

    Args:
        table: of ``read_runs``.
        names: of cost models, as ``pricing_of`` takes them.
        num_processes: that share the work.
        tell: called now and then with what is done.

    Raises:
        BadRequest: there is no such cost model.
    """
    start_s = time.monotonic()
    pricings = {name: pricing_of(name) for name in names}
    wanted = [i for i, run in enumerate(table.runs) if _is_measured(run)]
    answers: dict[int, _Answers] = {}
    parts = _parts(table.runs, wanted)
    made = _made_here if num_processes <= 1 or len(parts) < 2 else _made_by(num_processes)
    for part, answered in made(parts, table.runs, tuple(names)):
        answers.update(zip(part, answered, strict=True))
        if tell is not None:
            tell(len(answers), len(wanted), time.monotonic() - start_s)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    skipped = list(table.skipped)
    for index, run in enumerate(table.runs):
        found = answers.get(index)
        if found is None:
            reason = "nothing was measured: no step time, no peak memory, not out of memory"
            skipped.append(Skipped(run_id=run.run_id, reason=reason))
            continue
        made_of = [outcome_of(run, answer, table.labels[index]) for answer in found]
        missing = next((one for one in made_of if isinstance(one, Skipped)), None)
        if missing is not None:
            skipped.append(missing)
            continue
        for name, one in zip(names, made_of, strict=True):
            assert isinstance(one, Outcome), "a row is skipped by all or none"
            outcomes[name].append(one)
    return Evaluation(
        outcomes={name: tuple(found) for name, found in outcomes.items()},
        labels={name: pricing.label for name, pricing in pricings.items()},
        in_sample=fitted_on(table.sha256, pricings),
        skipped=tuple(skipped),
        seconds=time.monotonic() - start_s,
    )


def _is_measured(run: MeasuredRun) -> bool:
    return bool(run.oom or run.measured_s or run.peak_memory_bytes)


def outcome_of(
    run: MeasuredRun, answer: RunPrediction | Skipped, labels: Mapping[str, str]
) -> Outcome | Skipped:
    """A run beside its prediction; a prediction that is no finite time above zero is none."""
    if isinstance(answer, Skipped):
        return answer
    figures = (answer.step_time_s, *answer.step_time_interval_s, float(answer.peak_memory_bytes))
    if not all(math.isfinite(x) for x in figures) or answer.step_time_s <= 0:
        return Skipped(
            run_id=run.run_id, reason=f"cannot be modeled: predicted {answer.step_time_s} s"
        )
    return Outcome(
        run_id=run.run_id,
        source=run.source or "unknown",
        gpu=run.gpu,
        group=run.job_key,
        plan=run.plan_key,
        measured_s=None if run.oom else run.measured_s,
        predicted_s=answer.step_time_s,
        interval_s=answer.step_time_interval_s,
        measured_bytes=None if run.oom else run.peak_memory_bytes,
        predicted_bytes=answer.peak_memory_bytes,
        capacity_bytes=answer.memory_capacity_bytes,
        fits=answer.fits,
        ran=not run.oom,
        rules=rule_scores(
            dp=run.dp or 1,
            tp=run.tp or 1,
            pp=run.pp or 1,
            micro_batch=run.micro_batch or 1,
            gpus_per_host=run.gpus_per_host or _USUAL_HOST,
        ),
        breakdown=dict(answer.breakdown),
        memory_breakdown=dict(answer.memory_breakdown),
        trust=tuple(answer.source),
        assumptions=tuple(answer.assumptions),
        labels=labels,
    )


_Part = tuple[int, ...]
_Made = Iterator[tuple[_Part, list[_Answers]]]


def _parts(runs: Sequence[MeasuredRun], wanted: Sequence[int]) -> list[_Part]:
    """Places of runs, those of one model together, so that it is captured once."""
    by_model: dict[tuple[object, ...], list[int]] = {}
    for index in wanted:
        run = runs[index]
        key = (run.arch, run.hidden, run.layers, run.heads, run.seq_len, run.vocab, run.experts)
        by_model.setdefault((*key, run.ffn_hidden, run.precision), []).append(index)
    return [
        tuple(places[first : first + _MOST_OF_A_PART])
        for places in by_model.values()
        for first in range(0, len(places), _MOST_OF_A_PART)
    ]


_predictors: dict[str, Predictor] = {}
"""Of a process that was started for it, by cost model."""


def _predict(runs: Sequence[MeasuredRun], predictors: Sequence[Predictor]) -> list[_Answers]:
    return [tuple(predictor.predict(run) for predictor in predictors) for run in runs]


def _predictors_of(names: Sequence[str]) -> list[Predictor]:
    first = Predictor(pricing_of(names[0]))
    return [first, *(first.beside(pricing_of(name)) for name in names[1:])]


def _made_here(parts: Sequence[_Part], runs: Sequence[MeasuredRun], names: Sequence[str]) -> _Made:
    predictors = _predictors_of(names)
    for part in parts:
        yield part, _predict([runs[i] for i in part], predictors)


def _made_by(
    num_processes: int,
) -> Callable[[Sequence[_Part], Sequence[MeasuredRun], Sequence[str]], _Made]:
    def made(parts: Sequence[_Part], runs: Sequence[MeasuredRun], names: Sequence[str]) -> _Made:
        # Spawned: a process that was forked may hold a lock of torch's threads.
        with ProcessPoolExecutor(
            num_processes, get_context("spawn"), initializer=_start, initargs=(tuple(names),)
        ) as pool:
            futures = {pool.submit(_work, tuple(runs[i] for i in part)): part for part in parts}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise BadRequest(
                    "a process that predicts runs ended, for want of memory perhaps; use --jobs 1"
                ) from error

    return made


def _start(names: Sequence[str]) -> None:
    import torch

    torch.set_num_threads(1)
    _predictors.update(zip(names, _predictors_of(names), strict=True))


def _work(runs: Sequence[MeasuredRun]) -> list[_Answers]:
    return _predict(runs, list(_predictors.values()))
