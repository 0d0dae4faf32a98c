"""Ranks x iterations: how long each step took, and how much of it was compute and waiting."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import BadRequest
from meshwright.records.record import Record
from meshwright.strict_json import one_line

__all__ = ["Cells", "StepTable", "step_table", "step_table_of_records"]

Cells = NDArray[np.float64]

_MAX_CELLS = 20_000_000
_MAX_NAMED = 8
_MAX_SOURCE = 120
_SHA256 = re.compile(r"(?<=sha256:[0-9a-f]{8})[0-9a-f]+")
_Job = tuple[str, str]
"""Source and model of Records."""
_Row = tuple[int, int, float | None, float | None, float | None]
_ROUNDING = 1e-6
"""By which a part may be longer than its step, as share of the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTable:
    """What every rank did in every iteration; NaN where it is not known.

    Each array has one row for each rank and one column for each iteration.
    """

    ranks: tuple[int, ...]
    iterations: tuple[int, ...]
    step_s: Cells
    compute_s: Cells | None
    """Seconds not spent in communication; None where only step times are known."""
    wait_s: Cells | None
    """Seconds in communication, waiting for others included."""
    notes: tuple[str, ...] = ()
    """What was left out, and what else the files tell of slow ranks; one sentence each."""

    def __post_init__(self) -> None:
        shape = (len(self.ranks), len(self.iterations))
        for cells in (self.step_s, self.compute_s, self.wait_s):
            assert cells is None or shape == cells.shape, f"{cells.shape} is not {shape}"

    @property
    def num_ranks(self) -> int:
        """Rows."""
        return len(self.ranks)

    @property
    def num_iterations(self) -> int:
        """Columns."""
        return len(self.iterations)


def step_table(rows: Iterable[_Row], *, name: str) -> StepTable:
    """The table of rows ``(rank, iteration, step_s, wait_s, compute_s)``.

    Of the three times one may be missing (None) where the other two give it; a step without
    waiting and compute times is kept, but then only its length can be judged. Iterations that
    some rank lacks are left out: ranks can be compared only where all were seen.

    Raises:
        BadRequest: fewer than two ranks or no iteration all of them have, the same cell twice, or
            a time that is negative or not finite. ``name`` begins the message.
    """
    cells: dict[tuple[int, int], tuple[float, float, float]] = {}
    for rank, iteration, *times in rows:
        where = f"{name}: rank {rank}, iteration {iteration}"
        if (rank, iteration) in cells:
            raise BadRequest(f"{where}: there twice; give each rank's iteration once")
        if len(cells) >= _MAX_CELLS:
            raise BadRequest(f"{name}: over {_MAX_CELLS} rows; give fewer iterations")
        cells[rank, iteration] = _completed(*times, where=where)
    ranks = tuple(sorted({rank for rank, _ in cells}))
    if len(ranks) < 2:
        raise BadRequest(
            f"{name}: has {len(ranks)} rank{'s' if not ranks else ''}; "
            "diagnosis compares ranks, give the times of two or more"
        )
    seen: dict[int, int] = {}
    for _, iteration in cells:
        seen[iteration] = seen.get(iteration, 0) + 1
    iterations = tuple(sorted(at for at, count in seen.items() if count == len(ranks)))
    if not iterations:
        raise BadRequest(f"{name}: no iteration has a time of each of the {len(ranks)} ranks")
    times_3RI = np.array(
        [[cells[rank, iteration] for iteration in iterations] for rank in ranks], dtype=np.float64
    ).transpose(2, 0, 1)
    step_s, wait_s, compute_s = times_3RI
    return StepTable(
        ranks=ranks,
        iterations=iterations,
        step_s=step_s,
        compute_s=None if np.isnan(compute_s).any() else compute_s,
        wait_s=None if np.isnan(wait_s).any() else wait_s,
        notes=_left_out(seen, len(ranks)),
    )


def _left_out(seen: Mapping[int, int], num_ranks: int) -> tuple[str, ...]:
    """Which iterations are no columns, for some rank lacks them."""
    lacking = sorted(at for at, count in seen.items() if count < num_ranks)
    if not lacking:
        return ()
    shown = ", ".join(map(str, lacking[:_MAX_NAMED]))
    more = f" and {len(lacking) - _MAX_NAMED} more" if len(lacking) > _MAX_NAMED else ""
    return (
        f"left out, for not all ranks have them: iteration{'s'[: len(lacking) > 1]} {shown}{more}",
    )


def _completed(
    step_s: float | None, wait_s: float | None, compute_s: float | None, *, where: str
) -> tuple[float, float, float]:
    for key, time_s in (("step_s", step_s), ("wait_s", wait_s), ("compute_s", compute_s)):
        if time_s is not None and not 0 <= time_s < float("inf"):
            raise BadRequest(f"{where}: {key} is {time_s}; a time is finite and not negative")
    if step_s is None:
        if wait_s is None or compute_s is None:
            raise BadRequest(f"{where}: needs step_s, or both wait_s and compute_s")
        step_s = wait_s + compute_s
    for key, part_s in (("wait_s", wait_s), ("compute_s", compute_s)):
        if part_s is not None and part_s > step_s * (1 + _ROUNDING):
            raise BadRequest(
                f"{where}: {key} is {part_s:g}, longer than its step of {step_s:g}; give step_s "
                "with its waiting, all in the same unit"
            )
    if compute_s is None and wait_s is not None:
        compute_s = max(step_s - wait_s, 0.0)
    elif wait_s is None and compute_s is not None:
        wait_s = max(step_s - compute_s, 0.0)
    unknown = float("nan")
    return (
        step_s,
        unknown if wait_s is None else wait_s,
        unknown if compute_s is None else compute_s,
    )


def step_table_of_records(records: Iterable[Record], *, name: str, choice: str = "") -> StepTable:
    """The table of Records of kind ``step_time`` that say their rank and iteration.

    Waiting is communication that no compute ran beside; the rest of the step, its idle time too,
    is the rank's own doing. Where only compute is known, waiting is what it leaves of the step.
    A Record that is there twice, from a file that was imported twice, counts once.

    Args:
        records: Of one job; of several where ``choice`` tells which.
        name: Begins messages.
        choice: Part of the source, or the model, of the Records that are meant.

    Raises:
        BadRequest: no such Record, Records of several jobs, or as ``step_table``.
    """
    jobs: dict[_Job, dict[tuple[int, int, str, float], _Row]] = {}
    for record in records:
        row = _row_of(record.kind, record.median, record.extra)
        if row is not None:
            of_job = jobs.setdefault((record.source, record.name), {})
            of_job[row[0], row[1], record.measured_utc, record.median] = row
    if not jobs:
        raise BadRequest(
            f"{one_line(name)}: holds no step_time Record with a rank and an iteration; "
            "import the traces of all ranks first, or give a table of rank, iteration, step_s, "
            "wait_s"
        )
    chosen = {job: rows for job, rows in jobs.items() if choice in job[0] or choice == job[1]}
    if not chosen:
        raise BadRequest(
            f"{one_line(name)}: no job of {one_line(choice)!r}; there are {_named(jobs)}"
        )
    if _are_several(chosen, is_choice=bool(choice)):
        raise BadRequest(
            f"{one_line(name)}: holds the steps of {len(chosen)} jobs; choose one with --source, "
            f"which takes a part of its source or its model: {_named(chosen)}"
        )
    return step_table([row for rows in chosen.values() for row in rows.values()], name=name)


def _are_several(jobs: Mapping[_Job, Mapping[Any, _Row]], *, is_choice: bool) -> bool:
    """Whether they cannot be one job: its files have a rank each, or were chosen together."""
    cells = [row[:2] for rows in jobs.values() for row in rows.values()]
    if len(set(cells)) < len(cells):
        return True
    ranks = [rank for rows in jobs.values() for rank in {row[0] for row in rows.values()}]
    models = {model for _, model in jobs}
    return not is_choice and (len(models) > 1 or len(set(ranks)) < len(ranks))


def _named(jobs: Iterable[_Job]) -> str:
    named = [
        f"{model} of {_SHA256.sub('', source)[:_MAX_SOURCE] or 'a run here'}"
        for source, model in jobs
    ]
    more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
    return one_line("; ".join(named[:_MAX_NAMED])) + more


def _row_of(kind: str, step_s: float, extra: Mapping[str, object]) -> _Row | None:
    rank, iteration = extra.get("rank"), extra.get("iteration")
    if kind != "step_time" or not isinstance(rank, int) or not isinstance(iteration, int):
        return None
    compute_s, communication_s, overlap_s = (
        float(value) if isinstance(value := extra.get(key), int | float) else None
        for key in ("compute_s", "communication_s", "overlap_s")
    )
    if communication_s is not None:
        return rank, iteration, step_s, max(communication_s - (overlap_s or 0.0), 0.0), None
    return rank, iteration, step_s, None, compute_s
