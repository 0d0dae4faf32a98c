"""Cutting a run of segments into stages: the least possible time of the slowest stage.

``least_bottleneck`` bisects on that time. Whether a bound holds is decided by filling stages from
the last to the first, each with as many segments as time and memory allow. Later stages hold fewer
micro-batches in flight, so what fits an earlier stage fits a later one and filling from the end
leaves the least for the rest: the answer is exact for chains whose memory grows with every segment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

__all__ = ["StageBytes", "least_bottleneck"]

_BISECTIONS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBytes:
    """Memory that a segment brings to its stage."""

    fixed_bytes: Sequence[float]
    """(segments,) parameters and their state."""
    kept_bytes: Sequence[float]
    """(segments,) activations kept for one micro-batch."""
    in_flight: Sequence[int]
    """(stages,) micro-batches, never increasing."""
    capacity_bytes: float
    """What a stage may use for these."""


def least_bottleneck(
    times_s: Sequence[float], num_stages: int, memory: StageBytes | None = None
) -> tuple[int, ...] | None:
    """First segment of each stage, or ``None`` where nothing fits.

    Args:
        times_s: (segments,) of one micro-batch.
        num_stages: at most the number of segments.
        memory: what the stages may hold; without it only time counts.
    """
    if not 1 <= num_stages <= len(times_s):
        return None
    before = [0.0, *accumulate(times_s)]
    fixed = [0.0, *accumulate(memory.fixed_bytes)] if memory else None
    kept = [0.0, *accumulate(memory.kept_bytes)] if memory else None

    def fill(bound_s: float) -> tuple[int, ...] | None:
        end = len(times_s)
        starts = []
        for stage in range(num_stages - 1, -1, -1):
            # Every earlier stage needs a segment of its own.
            start = max(bisect_left(before, before[end] - bound_s), stage)
            if memory is not None and fixed is not None and kept is not None:
                flight = memory.in_flight[stage]
                while start < end and (
                    fixed[end] - fixed[start] + flight * (kept[end] - kept[start])
                    > memory.capacity_bytes
                ):
                    start += 1
            if start >= end:
                return None
            starts.append(start)
            end = start
        return tuple(reversed(starts)) if end == 0 else None

    low_s, high_s = max(max(times_s), before[-1] / num_stages), before[-1]
    # The bound is widened a little, so that rounding does not lose the exact solution.
    best = fill(high_s * (1 + 1e-9))
    if best is None:
        return None
    for _ in range(_BISECTIONS):
        middle_s = (low_s + high_s) / 2
        found = fill(middle_s * (1 + 1e-12))
        if found is None:
            low_s = middle_s
        else:
            best, high_s = found, middle_s
    return best
