"""Idle waves: one rank's delay that travels from neighbor to neighbor as waiting.

Where ranks wait only for their neighbors (a pipeline, an exchange of halos), a delay of one rank
makes its neighbors wait an iteration later, theirs after that, and so on. Where every step ends
with a collective of all ranks they all wait at once, and there is no wave.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.profiling.traces.step_table import Cells

__all__ = ["IdleWave", "trace_wave"]

_LONGEST_LAG_ITERATIONS = 4
"""Between a rank's waiting and its neighbor's; slower fronts are not followed."""
_LONGEST_GAP_RANKS = 1
"""Ranks in a row that may show no waiting: noise of their own can swallow it."""
_MIN_RANKS = 2
"""In one direction, with waiting that came later at the far one."""
_MIN_AT_ONCE = 0.3
"""Of the delay: where nine of ten ranks wait as long at once, the step is synchronous."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleWave:
    """Waiting that began beside one rank and traveled."""

    source_rank: int
    iteration: int
    """When its source was late."""
    delay_s: float
    speed_ranks_per_iteration: float
    """Mean over its directions."""
    num_ranks_reached: int
    last_wait_s: float
    """What was left of the delay at the farthest rank it reached."""


def trace_wave(
    waits: Cells, *, row: int, column: int, delay_s: float, threshold_s: float
) -> tuple[IdleWave, frozenset[tuple[int, int]]] | None:
    """The wave a delay of ``delay_s`` at (row, column) sent out, and the cells it passed.

    Args:
        waits: (ranks, iterations) seconds waited beyond what is usual for the rank.
        row: Of the late rank; the wave's ``source_rank`` and ``iteration`` are row and column.
        column: Its iteration.
        delay_s: By how much it was late.
        threshold_s: Waiting above this is no noise.

    Returns:
        None where waiting did not travel: nobody waited, or all waited at once.
    """
    others_s = np.delete(waits[:, column : column + 2].max(axis=1), row)
    if len(others_s) > 2 and float(np.quantile(others_s, 0.1)) > _MIN_AT_ONCE * delay_s:
        return None  # a collective: everybody waits for the late rank
    fronts = [
        front
        for direction in (1, -1)
        if len(front := _front(waits, row, column, direction, threshold_s)) >= _MIN_RANKS
    ]
    slopes = []
    for front in fronts:
        # Beyond the last rank the same waiting may have come the other way round.
        straight = [item for item in front if abs(item[2] - row) == item[0]]
        timed = straight if len(straight) >= _MIN_RANKS else front
        hops, columns, _ = (np.array(part, dtype=np.float64) for part in zip(*timed, strict=True))
        if columns[-1] > columns[0]:
            slopes.append(float(np.polyfit(hops, columns, 1)[0]))
    if not slopes or min(slopes) <= 0:
        return None
    cells = frozenset((at_row, int(at)) for front in fronts for _, at, at_row in front)
    last = max((front[-1] for front in fronts), key=lambda item: item[0])
    wave = IdleWave(
        source_rank=row,
        iteration=column,
        delay_s=delay_s,
        speed_ranks_per_iteration=float(np.mean([1.0 / slope for slope in slopes])),
        num_ranks_reached=len({at_row for at_row, _ in cells}),
        last_wait_s=float(waits[last[2], last[1]]),
    )
    return wave, cells


def _front(
    waits: Cells, row: int, column: int, direction: int, threshold_s: float
) -> list[tuple[int, int, int]]:
    """(hop, column, row) of the first long wait of each rank in one direction.

    Beyond the last rank it goes on with the first, as in a ring, for half the ring at most.
    """
    num_ranks, num_iterations = waits.shape
    front: list[tuple[int, int, int]] = []
    at, missed = column, 0
    for hop in range(1, num_ranks):
        next_row = row + direction * hop
        if not 0 <= next_row < num_ranks and hop > num_ranks // 2:
            break
        next_row %= num_ranks
        stop = min(num_iterations, at + 1 + _LONGEST_LAG_ITERATIONS * (1 + missed))
        late = np.flatnonzero(waits[next_row, at:stop] > threshold_s)
        if len(late) == 0:
            missed += 1
            if missed > _LONGEST_GAP_RANKS:
                break
            continue
        at, missed = at + int(late[0]), 0
        front.append((hop, at, next_row))
    return front
