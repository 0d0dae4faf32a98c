"""One episode on one instance, whose rooms may be opened as it goes.

The mask keeps a candidate where some row that agrees with it fits: rows are tried by how full a
glance expects them, the emptiest first, and what was found out of a row is remembered.

S variants, C cuts, F_C = NUM_CANDIDATE.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.env.decode import Placed
from meshwright.env.instance import (
    CUTS,
    DECISIONS,
    MAX_CANDIDATES,
    MAX_GROUPS,
    ROW_DECISIONS,
    ROW_FEATURES,
    Float32Array,
    Instance,
    IntArray,
)
from meshwright.env.observation import (
    NUM_CANDIDATE,
    cut_candidates,
    kinds_of,
    log_host_size,
    row_candidates,
    states,
    variant_candidates,
)
from meshwright.env.rows import SCHEDULES
from meshwright.errors import BadRequest, NoFeasiblePlan

__all__ = ["Choice", "Episode"]

_NUM_ROW = len(ROW_DECISIONS)
_CUT = len(DECISIONS) - 1
_FULLEST = ROW_FEATURES.index("log_fullest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One decision that was made."""

    decision: int
    slot: int
    """The candidate chosen."""
    valid: tuple[bool, ...]
    """For each candidate whether it could be."""
    label: str
    """What was chosen, for people."""


class Episode:
    """Decides one plan; the mutable state of an environment."""

    def __init__(self, instance: Instance) -> None:
        """Begin; decisions without a choice are made.

        Raises:
            NoFeasiblePlan: nothing fits.
            BadRequest: a decision has more candidates than ``MAX_CANDIDATES``.
        """
        self.instance = instance
        self._low, self._high = 0, len(instance.rows)
        self._values = [instance.values(decision) for decision in range(_NUM_ROW)]
        widest = max(len(instance.variants), *(len(values) for values in self._values))
        if widest > MAX_CANDIDATES:
            raise BadRequest(
                f"{instance.name}: {widest} candidates of a decision; {MAX_CANDIDATES} at most"
            )
        self.depth = 0
        """Row decisions made."""
        self.variants: list[int] = []
        self.cut: int | None = None
        self.history: list[Choice] = []
        self.valid: NDArray[np.bool_] = np.zeros(0, dtype=bool)
        """For each candidate of the decision whether it may be chosen."""
        if not self._any_fits(range(self._high)):
            raise NoFeasiblePlan(f"{instance.name}: nothing fits; use more devices or more memory")
        self._advance()

    @property
    def is_done(self) -> bool:
        """The plan is complete."""
        return self.cut is not None

    @property
    def decision(self) -> int:
        """What is asked; its place in ``DECISIONS``."""
        if self.depth < _NUM_ROW:
            return self.depth
        if self.is_done or len(self.variants) == self.instance.num_groups:
            return _CUT
        return _NUM_ROW + len(self.variants)

    @property
    def placed(self) -> Placed | None:
        """The plan once it is complete."""
        if self.cut is None:
            return None
        return Placed(row=self._low, variants=tuple(self.variants), cut=self.cut)

    @property
    def time_s(self) -> float:
        """Step time of the complete plan."""
        assert self.cut is not None, "asked of complete plans"
        return float(self._room()[self.cut])

    def choose(self, slot: int) -> None:
        """Make the decision, and those after it that leave no choice.

        Raises:
            BadRequest: the candidate is masked, or nothing is left to decide.
        """
        if self.is_done or not 0 <= slot < len(self.valid) or not self.valid[slot]:
            raise BadRequest(f"candidate {slot} of {DECISIONS[self.decision]} is masked")
        self._choose(slot)
        self._advance()

    def after(self, slot: int) -> Episode:
        """Another episode that has made the decision; this one stays where it is.

        Raises:
            BadRequest: as ``choose``.
        """
        found = copy.copy(self)
        found.variants, found.history = list(self.variants), list(self.history)
        found.choose(slot)
        return found

    def _choose(self, slot: int) -> None:
        decision = self.decision
        self.history.append(
            Choice(
                decision=decision,
                slot=slot,
                valid=tuple(self.valid.tolist()),
                label=self.label(decision, slot),
            )
        )
        if decision < _NUM_ROW:
            self._low, self._high = self._range(int(self._values[decision][slot]))
            self.depth += 1
        elif decision < _CUT:
            self.variants.append(slot)
        else:
            self.cut = slot

    def _advance(self) -> None:
        while not self.is_done:
            self.valid = self._valid()
            if self.valid.sum() > 1:
                return
            self._choose(int(self.valid.argmax()))
        self.valid = np.zeros(0, dtype=bool)

    def label(self, decision: int, slot: int) -> str:
        """What a candidate is called."""
        if decision == _CUT:
            return CUTS[slot]
        if decision >= _NUM_ROW:
            variant = self.instance.variants[slot]
            return f"{variant.sharding}, recompute {variant.recompute}"
        value = int(self._values[decision][slot])
        return str(SCHEDULES[value]) if decision == _NUM_ROW - 1 else str(value)

    # What may be chosen ------------------------------------------------------------------------

    def _range(self, value: int) -> tuple[int, int]:
        column = self.instance.rows[self._low : self._high, self.depth]
        low, high = np.searchsorted(column, [value, value + 1])
        return self._low + int(low), self._low + int(high)

    def _any_fits(self, rows: Iterable[int]) -> bool:
        fullest = self.instance.row_features[:, _FULLEST]
        tried = sorted(rows, key=lambda row: (fullest[row], row))
        return any(self.instance.rooms.fits(row) for row in tried)

    def _room(self) -> Float32Array:
        found: Float32Array = self.instance.rooms.open(self._low).time_s[tuple(self.variants)]
        return found

    def _valid(self) -> NDArray[np.bool_]:
        if self.depth < _NUM_ROW:
            ranges = [self._range(int(value)) for value in self._values[self.depth]]
            return np.array([self._any_fits(range(*each)) for each in ranges])
        room = np.isfinite(self._room())
        return np.asarray(room.reshape(len(room), -1).any(axis=1))

    # What is seen ------------------------------------------------------------------------------

    def candidates(self) -> Float32Array:
        """(candidates, F_C); zeros where masked."""
        decision, instance = self.decision, self.instance
        if decision >= _NUM_ROW:
            found = (
                cut_candidates(instance.num_cuts)
                if decision == _CUT
                else variant_candidates(instance.variants, decision - _NUM_ROW)
            )
            return np.asarray(found * self.valid[:, None])
        slots = np.flatnonzero(self.valid)
        values: IntArray = self._values[decision][slots]
        ranges = [self._range(int(value)) for value in values]
        features = instance.row_features
        found = np.zeros((len(self.valid), NUM_CANDIDATE), dtype=np.float32)
        found[slots] = row_candidates(
            decision,
            values,
            row_share=np.diff(ranges, axis=1)[:, 0] / (self._high - self._low),
            least=np.stack([features[low:high].min(axis=0) for low, high in ranges]),
            mean=np.stack(
                [features[low:high].mean(axis=0, dtype=np.float64) for low, high in ranges],
                dtype=np.float32,
                casting="same_kind",
            ),
            log_host=log_host_size(instance.graph),
        )
        return found

    def state(self) -> Float32Array:
        """(F_S,) numbers."""
        instance = self.instance
        kinds = kinds_of(instance.variants)
        chosen = np.zeros((1, MAX_GROUPS, kinds.shape[1]), dtype=np.float32)
        chosen[0, : len(self.variants)] = kinds[self.variants]
        found = states(
            num_decided=np.array([self.depth]),
            values=instance.rows[self._low : self._low + 1],
            row_share=np.array([(self._high - self._low) / len(instance.rows)]),
            least=instance.row_features[self._low : self._high].min(axis=0)[None],
            num_groups=np.array([instance.num_groups]),
            group_kinds=chosen,
            groups_decided=np.array([len(self.variants)]),
        )
        return np.asarray(found[0])
