"""Unequal token slices of a causal sequence for a pipeline (TeraPipe, arXiv 2102.07988, 3.4).

K stages run the slices of a sequence one after the other; a slice of l tokens after c takes
``t(l, c)`` on the slowest stage. The last slice leaves the pipeline after::

    sum over slices of t_i + (K - 1) max over slices of t_i

Later slices attend to more tokens, so the best ones get shorter. For a bound on the largest time
the least sum is found by dynamic programming over prefixes (``_least_sum``), and every time a slice
can have is tried as the bound, ascending, until the bound alone costs too much. Exact for lengths
that are multiples of the granularity; O(n^2) for each bound, n the number of granules.

With M micro-batches the same slices serve each of them: they stand for the stages' first filling
and last draining, so that ``(K - 1) max`` is weighed against M sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.choice import Choice, StepCost
from meshwright.cost.slices import slice_time_s
from meshwright.cost.step import StepPricer
from meshwright.cost.table import CostTable
from meshwright.errors import BadRequest

__all__ = ["Slicing", "best_slicing", "sliced_choice"]

FloatArray = NDArray[np.float64]

SliceTime = Callable[[FloatArray, FloatArray], FloatArray]
"""Seconds of slices on the slowest stage, from their lengths and the tokens before them."""

_NUM_GRANULES = 64
"""A sequence is cut into at most so many by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slicing:
    """Slices of a sequence and what they cost."""

    lengths: tuple[int, ...]
    """Tokens of each slice, in order."""
    pipeline_s: float
    """The objective of the module docstring."""


def best_slicing(
    time_s: SliceTime,
    *,
    num_tokens: int,
    num_stages: int,
    num_sequences: int = 1,
    granularity: int = 1,
) -> Slicing:
    """The slices with the least ``num_sequences`` sums plus ``num_stages - 1`` maxima.

    Args:
        time_s: seconds of slices, element by element.
        num_tokens: tokens of the sequence.
        num_stages: stages of the pipeline.
        num_sequences: sequences (micro-batches) that follow one another.
        granularity: every slice is a multiple of so many tokens.

    Raises:
        BadRequest: the granularity does not divide the sequence.
    """
    if granularity < 1 or num_tokens < 1 or num_tokens % granularity:
        raise BadRequest(
            f"granularity {granularity} does not divide {num_tokens} tokens; use a divisor"
        )
    count = num_tokens // granularity
    end, start = np.meshgrid(np.arange(1.0, count + 1), np.arange(float(count)), indexing="ij")
    # (end, start) seconds of the slice between; infinite where it would be empty.
    length = np.maximum(end - start, 1.0) * granularity
    each_s = np.where(end > start, time_s(length, start * granularity), np.inf)
    least_s = num_sequences * _least_sum(each_s)[0]
    best: tuple[float, tuple[int, ...]] | None = None
    for bound_s in np.unique(each_s[np.isfinite(each_s)]).tolist():
        if best is not None and least_s + (num_stages - 1) * bound_s >= best[0]:
            break
        sum_s, cuts = _least_sum(np.where(each_s <= bound_s, each_s, np.inf))
        if not cuts:
            continue
        largest_s = max(each_s[stop - 1, first] for first, stop in itertools.pairwise(cuts))
        total_s = num_sequences * sum_s + (num_stages - 1) * float(largest_s)
        if best is None or total_s < best[0]:
            best = (total_s, cuts)
    assert best is not None, "the whole sequence is a slice"
    lengths = np.diff(best[1]) * granularity
    return Slicing(lengths=tuple(lengths.tolist()), pipeline_s=best[0])


def _least_sum(each_s: FloatArray) -> tuple[float, tuple[int, ...]]:
    """Least sum of slices that cover the sequence, and their ends with 0 in front.

    least(b) = min over a < b of least(a) + each_s[b - 1, a]; no ends where nothing covers it.
    """
    count = len(each_s)
    least = np.full(count + 1, np.inf)
    least[0] = 0.0
    came = np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        through = least[:end] + each_s[end - 1, :end]
        came[end] = through.argmin()
        least[end] = through[came[end]]
    if not np.isfinite(least[count]):
        return float("inf"), ()
    cuts = [count]
    while cuts[-1]:
        cuts.append(int(came[cuts[-1]]))
    return float(least[count]), tuple(reversed(cuts))


def sliced_choice(
    pricer: StepPricer,
    table: CostTable,
    choice: Choice,
    *,
    num_tokens: int,
    granularity: int | None = None,
) -> tuple[Choice, StepCost]:
    """``choice`` with the token slices that make its step shortest, whole sequences included.

    The slices of the dynamic program and some equal ones are priced with the schedule simulated.
    The sequence must be sliceable (``graph.attention.is_sliceable``), and the runtime does not run
    slices yet (``plans.runnable``).

    Args:
        pricer: what prices.
        table: the cost table of the choice.
        choice: what else is decided.
        num_tokens: tokens of a sequence.
        granularity: every slice is a multiple of so many; left out, a 64th of the sequence or what
            divides it next.

    Raises:
        BadRequest: the granularity does not divide the sequence.
        PlanRefused: the choice cannot be priced.
    """
    if granularity is None:
        granularity = next(
            size
            for size in range(max(num_tokens // _NUM_GRANULES, 1), num_tokens + 1)
            if num_tokens % size == 0
        )
    whole = replace(choice, token_slices=())
    found = [(whole, pricer.price(table, whole))]
    for lengths in _slicings(pricer, table, choice, num_tokens, granularity):
        variant = replace(choice, token_slices=lengths)
        found.append((variant, pricer.price(table, variant)))
    return min(found, key=lambda item: item[1].time_s)


def _slicings(
    pricer: StepPricer, table: CostTable, choice: Choice, num_tokens: int, granularity: int
) -> Iterator[tuple[int, ...]]:
    work = pricer.work(table, replace(choice, token_slices=(num_tokens,)))

    def time_s(length: FloatArray, before: FloatArray) -> FloatArray:
        shares = (length.ravel() / num_tokens, before.ravel() / num_tokens)
        return np.asarray(slice_time_s(work, *shares).max(axis=0).reshape(length.shape))

    micro = choice.split.num_microbatches
    seen: set[tuple[int, ...]] = set()
    for num_sequences in {1, micro}:
        best = best_slicing(
            time_s,
            num_tokens=num_tokens,
            num_stages=len(choice.starts),
            num_sequences=num_sequences,
            granularity=granularity,
        )
        seen.add(best.lengths)
    granules = num_tokens // granularity
    for count in (2, 4, 8, 16, 32):
        if granules % count == 0:
            seen.add((num_tokens // count,) * count)
    yield from sorted(lengths for lengths in seen if len(lengths) > 1)
