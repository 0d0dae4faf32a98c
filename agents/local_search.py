"""Local search among the plans of one instance.

Every look-up goes to the row that promises the least time. A row without a known time promises what
a glance says of it, corrected by how far the glance is off on rows like it, less twice the doubt in
that (a Gaussian process and its lower confidence bound: Srinivas et al. 2010, arXiv 0912.3995). A
row with known times promises the least of them less what is hoped of its next plan, and the next
one is the nearest to the row's best: in what groups recompute, in sharding, in cut. The farther it
is, the less is hoped. So a row is searched around its best as long as no other promises more.

What cannot help comes last, for in a row more recomputation takes longer and less needs more bytes:
what recomputes all that a plan that fits does and more, or no more than one that does not fit; cuts
without a pipeline, another sharding without tensor parallelism, groups sharded unlike each other.
Nothing is left out, and no plan is looked up twice. What is counted are distinct plans looked up.

K rows, N plans of a row, G groups, S variants, D decisions of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.env.decode import Placed
from meshwright.env.instance import ROW_DECISIONS, ROW_FEATURES, Instance
from meshwright.plans.plan import Recompute

__all__ = ["Improved", "improve"]

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_GLANCE = ROW_FEATURES.index("log_step_s")
_FULLEST_NONE = ROW_FEATURES.index("log_fullest_none")
_TP, _PP = ROW_DECISIONS.index("tp"), ROW_DECISIONS.index("pp")
_LEVELS = tuple(Recompute)
"""From nothing computed again to everything."""

# Times are compared in logarithms.
_HOPE, _FADE = 0.04, 0.25
"""Hoped of a plan one change away, and what is left of that for each change more."""
_UNLIKELY, _LAST = 100.0, 1000.0
"""Changes that it seems farther away: groups sharded unlike each other; what cannot help."""
_DOUBTS = 2.0
"""Standard deviations that a row may be better than expected."""
_REACH = 12.0
"""Doublings of sizes over which what is known of a row says exp(-1) of another."""
_PRIOR, _PRIOR_COUNT = 0.1, 4
"""How far off a glance is before anything is known, and how many rows that counts."""
_NOISE = 0.01
"""Share of the variance that no other row tells of."""
_FAILED = 0.05
"""What a row promises less for each plan of it that did not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Improved:
    """The best plan found."""

    placed: Placed
    time_s: float
    """Infinite where none that fits was found."""
    evaluations: int
    """Distinct plans looked up."""


class _Plans:
    """The plans that every row has, by number."""

    def __init__(self, instance: Instance) -> None:
        self.shape = instance.room_shape
        self._place_NP = np.indices(self.shape).reshape(len(self.shape), -1).T
        names = list(dict.fromkeys(variant.sharding for variant in instance.variants))
        level_S = np.array([_LEVELS.index(variant.recompute) for variant in instance.variants])
        sharding_S = np.array([names.index(variant.sharding) for variant in instance.variants])
        self.level_NG: IntArray = level_S[self._place_NP[:, :-1]]
        self.sharding_NG: IntArray = sharding_S[self._place_NP[:, :-1]]
        self.sharding_N: IntArray = self.sharding_NG[:, 0]
        self.cut_N: IntArray = self._place_NP[:, -1]
        unlike_N = (self.sharding_NG != self.sharding_NG[:, :1]).any(axis=1)
        # Of plans equally far away the one that recomputes least.
        self._extra_N: FloatArray = _UNLIKELY * unlike_N + 1e-3 * self.level_NG.sum(axis=1)

    def number(self, placed: Placed) -> int:
        return int(np.ravel_multi_index((*placed.variants, placed.cut), self.shape))

    def placed(self, row: int, number: int) -> Placed:
        *variants, cut = self._place_NP[number].tolist()
        return Placed(row=row, variants=tuple(variants), cut=cut)

    def changes(self, levels_G: IntArray, sharding: int, cut: int) -> FloatArray:
        """(N,) how far away plans are."""
        found: FloatArray = np.abs(self.level_NG - levels_G).sum(axis=1) + self._extra_N
        return found + (self.sharding_N != sharding) + (self.cut_N != cut)

    def hopeless(self, number: int, is_fitting: bool) -> BoolArray:
        """(N,) plans of the same sharding and cut that cannot be better, once this one is known."""
        level_G = self.level_NG[number]
        more_NG = self.level_NG >= level_G if is_fitting else self.level_NG <= level_G
        is_same_N = (self.sharding_NG == self.sharding_NG[number]).all(axis=1)
        found: BoolArray = is_same_N & (self.cut_N == self.cut_N[number]) & more_NG.all(axis=1)
        return found


class _Search:
    """What was looked up, and what rows promise."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.plans = plans = _Plans(instance)
        num_rows, num_plans = len(instance.rows), len(plans.cut_N)
        self.evaluations = 0
        self.best: Placed | None = None
        self.best_s = np.inf
        self._is_seen_KN = np.zeros((num_rows, num_plans), dtype=np.bool_)
        self._is_last_KN: BoolArray = (instance.rows[:, [_PP]] == 1) & (plans.cut_N > 0)
        self._is_last_KN |= (instance.rows[:, [_TP]] == 1) & (plans.sharding_N > 0)
        self._least_K = np.full(num_rows, np.inf)
        """Logarithm of the least time known."""
        self._at_K = np.zeros(num_rows, dtype=np.int64)
        """Number of the plan that takes it."""
        self._failed_K = np.zeros(num_rows)
        self._is_done_K = np.zeros(num_rows, dtype=np.bool_)
        self._promise_K = np.full(num_rows, np.inf)
        self._next_K = np.zeros(num_rows, dtype=np.int64)
        """The plan to look up next, where a time is known."""
        size_KD = np.log2(instance.rows + 1.0)
        apart_KK = np.abs(size_KD[:, None] - size_KD).sum(axis=2)
        self._likeness_KK: FloatArray = np.exp(-apart_KK / _REACH)

    def look_up(self, row: int, number: int) -> bool:
        """Whether the row's least time is another now."""
        if self._is_seen_KN[row, number]:
            return False
        placed = self.plans.placed(row, number)
        time_s = float(self.instance.rooms.open(row).time_s.flat[number])
        is_fitting = bool(np.isfinite(time_s))
        self.evaluations += 1
        self._is_seen_KN[row, number] = True
        self._is_last_KN[row] |= self.plans.hopeless(number, is_fitting)
        self._failed_K[row] += not is_fitting
        if self.best is None or time_s < self.best_s:
            self.best, self.best_s = placed, time_s
        if np.log(time_s) >= self._least_K[row]:
            return False
        self._least_K[row], self._at_K[row] = np.log(time_s), number
        return True

    def run(self, max_evaluations: int) -> None:
        """Look plans up until so many are known, or all."""
        for row in np.flatnonzero(np.isfinite(self._least_K)).tolist():
            self._aim(row)
        has_news = True
        while self.evaluations < max_evaluations:
            if has_news:
                self._expect()
            row = int(self._promise_K.argmin())
            if not np.isfinite(self._promise_K[row]):
                return
            if np.isfinite(self._least_K[row]):
                has_news = self.look_up(row, int(self._next_K[row]))
            elif self.instance.rooms.fits(row):
                has_news = self.look_up(row, self._aim(row))
            else:
                self._is_done_K[row] = True
            if np.isfinite(self._least_K[row]):
                self._aim(row)
            else:
                has_news = True

    def _aim(self, row: int) -> int:
        """The plan of the row to look up next; tells what it promises where a time is known."""
        is_known = bool(np.isfinite(self._least_K[row]))
        if is_known:
            at = self._at_K[row]
            levels_G, cut = self.plans.level_NG[at], int(self.plans.cut_N[at])
            sharding = int(self.plans.sharding_N[at])
        else:
            levels_G, sharding, cut = self._like_best(row)
        far_N = self.plans.changes(levels_G, sharding, cut) + _LAST * self._is_last_KN[row]
        far_N[self._is_seen_KN[row]] = np.inf
        number = int(far_N.argmin())
        self._next_K[row] = number
        self._is_done_K[row] = is_done = bool(np.isinf(far_N[number]))
        if is_done:
            self._promise_K[row] = np.inf
        elif is_known:
            changes = np.floor(far_N[number])
            late = changes / _UNLIKELY if changes >= _UNLIKELY else 0.0
            self._promise_K[row] = self._least_K[row] + late - _HOPE * _FADE ** (changes - 1)
        return number

    def _like_best(self, row: int) -> tuple[IntArray, int, int]:
        """Recomputation, sharding and cut to begin a row with."""
        assert self.best is not None, "one start was looked up"
        at = self.plans.number(self.best)
        levels_G = self.plans.level_NG[at]
        if self._failed_K[row]:
            levels_G = np.full_like(levels_G, len(_LEVELS) - 1)
        elif self.instance.row_features[row, _FULLEST_NONE] < 0:
            levels_G = np.zeros_like(levels_G)
        has_tp, has_pp = self.instance.rows[row, [_TP, _PP]] > 1
        sharding = int(self.plans.sharding_N[at]) if has_tp else 0
        return levels_G, sharding, int(self.plans.cut_N[at]) if has_pp else 0

    def _expect(self) -> None:
        """What rows without a known time promise."""
        is_new_K = np.isinf(self._least_K)
        expected_K = self.instance.row_features[:, _GLANCE].astype(np.float64)
        known = np.flatnonzero(~is_new_K)
        if len(known) and is_new_K.any():
            off = self._least_K[known] - expected_K[known]
            likeness = self._likeness_KK[np.ix_(known, known)]
            inverse = np.linalg.inv(likeness + _NOISE * np.eye(len(known)))
            mean = float(inverse.sum(axis=0) @ off) / float(inverse.sum())
            off -= mean
            count = len(known) + _PRIOR_COUNT
            variance = (float(off @ inverse @ off) + _PRIOR_COUNT * _PRIOR**2) / count
            across = self._likeness_KK[:, known]
            open_K = 1.0 - ((across @ inverse) * across).sum(axis=1)
            doubt_K = np.sqrt(variance * np.maximum(open_K, 0.0))
            expected_K += mean + across @ (inverse @ off) - _DOUBTS * doubt_K
        expected_K += _FAILED * self._failed_K
        self._promise_K[is_new_K] = np.where(self._is_done_K, np.inf, expected_K)[is_new_K]


def improve(instance: Instance, starts: Sequence[Placed], *, max_evaluations: int) -> Improved:
    """The best plan that local search finds from ``starts``, or the best of these.

    Deterministic. ``starts`` count as evaluations; one at least is needed. Ends early only when all
    plans of all rows on which something fits were looked up.

    Args:
        instance: what to plan.
        starts: plans to begin with; the first ones where evaluations run out.
        max_evaluations: distinct plans to look up at most, 1 or more.
    """
    search = _Search(instance)
    for start in starts:
        if search.evaluations < max_evaluations:
            search.look_up(start.row, search.plans.number(start))
    search.run(max_evaluations)
    assert search.best is not None, "one start was looked up"
    return Improved(placed=search.best, time_s=search.best_s, evaluations=search.evaluations)
