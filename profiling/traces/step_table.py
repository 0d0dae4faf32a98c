"""Ranks x iterations: how long each step took, and how much of it was compute and waiting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import BadRequest
from meshwright.records.record import Record
from meshwright.strict_json import one_line

__all__ = ["Cells", "StepTable", "step_table", "step_table_of_records"]

Cells = NDArray[np.float64]

_MAX_CELLS = 20_000_000


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


def step_table(
    rows: Iterable[tuple[int, int, float | None, float | None, float | None]], *, name: str
) -> StepTable:
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


def step_table_of_records(records: Sequence[Record], *, name: str) -> StepTable:
    """The table of Records of kind ``step_time`` that say their rank and iteration.

    Waiting is communication that no compute ran beside; the rest of the step, its idle time too,
    is the rank's own doing. Where only compute is known, waiting is what it leaves of the step.

    Raises:
        BadRequest: no such Record, or as ``step_table``.
    """
    rows = [row for record in records if (row := _row_of(record.kind, record.median, record.extra))]
    if not rows:
        raise BadRequest(
            f"{one_line(name)}: holds no step_time Record with a rank and an iteration; "
            "import the traces of all ranks first, or give a table of rank, iteration, step_s, "
            "wait_s"
        )
    return step_table(rows, name=name)


def _row_of(
    kind: str, step_s: float, extra: Mapping[str, object]
) -> tuple[int, int, float | None, float | None, float | None] | None:
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
