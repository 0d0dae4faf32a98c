"""Thousands of episodes at once: a step is a few gathers in ``env.compiled``.

Environments in blocks of ``group_size`` play the same instance. The price may be randomized, so
that learning the errors of one cost model does not pay: every block draws weights w ~ N(0, sigma)
and its plans take ``time_s * exp(w . phi)``, phi telling what kind of plan it is
(``RANDOMIZED``). Which plans fit stays as it is.

B environments, A = MAX_CANDIDATES, I instances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshwright.env.compiled import NUM_DECIDED, Compiled, compile_instances
from meshwright.env.decode import Placed
from meshwright.env.instance import (
    DECISIONS,
    MAX_CANDIDATES,
    MAX_GROUPS,
    ROW_DECISIONS,
    Float32Array,
    FloatArray,
    Instance,
    IntArray,
)
from meshwright.env.observation import NUM_CANDIDATE, states
from meshwright.env.rows import SCHEDULES
from meshwright.errors import BadRequest
from meshwright.plans.plan import ScheduleName

__all__ = ["RANDOMIZED", "BatchedPlacement", "Transition"]

_CUT = len(DECISIONS) - 1
_COLUMN = {name: place for place, name in enumerate(ROW_DECISIONS)}

RANDOMIZED = (
    *("log_tp", "log_cp", "log_ep", "log_pp", "log_dp", "log_num_microbatches"),
    *("is_zero_1", "is_zero_2", "is_zero_3", "is_gpipe"),
    *("sequence_share", "selective_share", "full_share"),
)
"""What a randomized cost model may find cheaper or dearer: logarithms to base 8, and shares of the
groups."""


class Transition(NamedTuple):
    """What a step of every environment gives, here and in any other that ``agents.ppo`` plays."""

    observation: Mapping[str, NDArray[Any]]
    """Of the next step; of a new episode where one has ended."""
    reward_B: FloatArray
    terminated_B: NDArray[np.bool_]
    truncated_B: NDArray[np.bool_]
    final_observation: Mapping[str, NDArray[Any]] | None = None
    """(B, ...) last observation of episodes that were truncated, other rows unused; ``None`` where
    no episode is ever truncated."""
    is_valid_B: NDArray[np.bool_] | None = None
    """False where the episode had ended before: the environment waits for the others; ``None``
    where none ever waits."""


class BatchedPlacement:
    """B episodes over compiled instances; what ended waits for the others, or begins anew."""

    def __init__(
        self,
        instances: Sequence[Instance] | Compiled,
        num_envs: int,
        *,
        group_size: int = 1,
        randomization: float = 0.0,
        restarts: bool = False,
    ) -> None:
        """Nothing is drawn yet.

        Args:
            instances: compiled here where they are not.
            num_envs: B
            group_size: environments in a row that play the same instance.
            randomization: sigma of the module docstring.
            restarts: an episode that ended begins anew in the same step, each by itself.

        Raises:
            BadRequest: the environments do not make whole groups, or restart in groups.
        """
        if num_envs < 1 or num_envs % group_size:
            raise BadRequest(f"{num_envs} environments do not make groups of {group_size}")
        if restarts and group_size > 1:
            raise BadRequest("groups wait for one another; restarts needs group_size 1")
        if not isinstance(instances, Compiled):
            instances = compile_instances(instances)
        self.compiled = instances
        self.num_envs, self.group_size = num_envs, group_size
        self.randomization, self.restarts = randomization, restarts
        self.drawn_from: IntArray = np.arange(len(self.compiled.instances))
        """Numbers of the instances that ``reset`` draws from; may be set."""
        self._rng = np.random.default_rng(0)
        self._every = np.arange(num_envs)
        self._instance = np.zeros(num_envs, np.int64)
        self._weights = np.zeros((num_envs, len(RANDOMIZED)))
        self._node = np.zeros(num_envs, np.int64)
        self._level = np.zeros(num_envs, np.int64)
        """Groups decided, and after them the cut; only where the node is a row."""
        self._code = np.zeros(num_envs, np.int64)
        """Choices of variants as one number to the base S."""
        self._chosen = np.zeros((num_envs, MAX_GROUPS), np.int64)
        self._cut = np.zeros(num_envs, np.int64)
        self._time_s = np.full(num_envs, np.nan)
        self._is_done = np.zeros(num_envs, dtype=bool)
        self._child = np.zeros((num_envs, MAX_CANDIDATES), np.int64)
        self._best = np.full((num_envs, MAX_CANDIDATES), np.inf, dtype=np.float32)
        self._observation: dict[str, NDArray[Any]] = {}

    @property
    def instances(self) -> tuple[Instance, ...]:
        """What episodes are drawn from; ``instance`` of an observation counts in it."""
        return self.compiled.instances

    @property
    def max_decisions(self) -> int:
        """So many steps end every episode."""
        return self.compiled.max_decisions

    # Episodes ----------------------------------------------------------------------------------

    def reset(self, *, seed: int) -> dict[str, NDArray[Any]]:
        """First observations of episodes on drawn instances."""
        self._rng = np.random.default_rng(seed)
        self._begin(self._every)
        return self._observe()

    def reset_to(self, instance_B: IntArray) -> dict[str, NDArray[Any]]:
        """First observations of episodes on given instances, nothing randomized."""
        self._begin(self._every, np.asarray(instance_B, dtype=np.int64))
        return self._observe()

    def _begin(self, which: IntArray, given: IntArray | None = None) -> None:
        if given is None:
            blocks = len(which) // self.group_size
            drawn = self.drawn_from[self._rng.integers(len(self.drawn_from), size=blocks)]
            weights = self._rng.normal(size=(blocks, len(RANDOMIZED))) * self.randomization
            given = np.repeat(drawn, self.group_size)
            self._weights[which] = np.repeat(weights, self.group_size, axis=0)
        else:
            self._weights[which] = 0.0
        self._instance[which] = given
        self._node[which] = self.compiled.root[given]
        for array in (self._level, self._code, self._cut):
            array[which] = 0
        self._chosen[which] = 0
        self._time_s[which] = np.nan
        self._is_done[which] = False
        self._advance(which)

    def step(self, action_B: NDArray[np.int64]) -> Transition:
        """Act in every environment; what those that wait are told does not count.

        Raises:
            BadRequest: an action is masked.
        """
        valid = ~self._is_done
        action = np.asarray(action_B, dtype=np.int64)
        wrong = valid & ~self._observation["action_mask"][self._every, action]
        if wrong.any():
            where = int(np.flatnonzero(wrong)[0])
            raise BadRequest(f"environment {where}: action {action[where]} is masked; take another")
        in_tree = valid & (self.compiled.depth[self._node] < NUM_DECIDED)
        moving = np.flatnonzero(in_tree)
        deciding = np.flatnonzero(valid & ~in_tree)
        self._node[moving] = self.compiled.target[self._child[moving, action[moving]]]
        self._choose(deciding, action[deciding])
        self._advance(np.flatnonzero(valid))
        ended = valid & self._is_done
        reward = np.zeros(self.num_envs)
        reward[ended] = self._rewards(np.flatnonzero(ended))
        if self.restarts and self._is_done.any():
            self._begin(np.flatnonzero(self._is_done))
        return Transition(
            observation=self._observe(),
            reward_B=reward,
            terminated_B=ended,
            truncated_B=np.zeros(self.num_envs, dtype=bool),
            final_observation=None,
            is_valid_B=valid,
        )

    def _choose(self, which: IntArray, choice: IntArray) -> None:
        """Write down a choice of a group or of the cut."""
        instance, level = self._instance[which], self._level[which]
        is_cut = level == self.compiled.num_groups[instance]
        groups = which[~is_cut]
        self._chosen[groups, level[~is_cut]] = choice[~is_cut]
        width = self.compiled.num_variants[instance[~is_cut]]
        self._code[groups] = self._code[groups] * width + choice[~is_cut]
        self._level[which] += 1
        self._cut[which[is_cut]] = choice[is_cut]
        self._is_done[which[is_cut]] = True

    def _advance(self, which: IntArray) -> None:
        """Make the choices of groups and cuts that leave one, and price what is complete."""
        found = self.compiled
        which = which[found.depth[self._node[which]] == NUM_DECIDED]
        open_ = which[~self._is_done[which]]
        while len(open_):
            fits = np.isfinite(self._table(open_))
            alone = fits.sum(axis=1) == 1
            self._choose(open_[alone], fits[alone].argmax(axis=1))
            open_ = open_[alone & ~self._is_done[open_]]
        done = which[self._is_done[which]]
        instance = self._instance[done]
        row = found.first_row[self._node[done]]
        place = found.offset[row, found.num_groups[instance]]
        place = place + self._code[done] * found.num_cuts[instance] + self._cut[done]
        self._time_s[done] = found.tables[place]

    def _table(self, which: IntArray) -> Float32Array:
        """(n, widest) least times by next choice of environments at a row; infinite beyond."""
        found = self.compiled
        instance, level = self._instance[which], self._level[which]
        is_cut = level == found.num_groups[instance]
        width = np.where(is_cut, found.num_cuts[instance], found.num_variants[instance])
        first = found.offset[found.first_row[self._node[which]], level] + self._code[which] * width
        across = np.arange(int(width.max()))
        inside = across < width[:, None]
        place = np.where(inside, first[:, None] + across, first[:, None])
        return np.where(inside, found.tables[place], np.float32(np.inf))

    def _rewards(self, which: IntArray) -> FloatArray:
        reward = np.log(self.compiled.reference_s[self._instance[which]] / self._time_s[which])
        if self.randomization:
            reward -= (self._weights[which] * self._traits(which)).sum(axis=1)
        return np.asarray(reward)

    def _traits(self, which: IntArray) -> FloatArray:
        """(n, ``RANDOMIZED``) of finished plans."""
        found = self.compiled
        row = found.values[found.first_row[self._node[which]]]
        instance = self._instance[which]
        groups = np.arange(MAX_GROUPS) < found.num_groups[instance][:, None]
        kinds = found.kinds[instance[:, None], self._chosen[which]] * groups[:, :, None]
        share = kinds.sum(axis=1) / found.num_groups[instance][:, None]
        sizes = ("tp", "cp", "ep", "pp", "dp", "num_microbatches")
        zero = row[:, _COLUMN["zero_stage"]]
        columns = [
            *(np.log2(row[:, _COLUMN[name]]) / 3 for name in sizes),
            *(zero == stage for stage in (1, 2, 3)),
            row[:, _COLUMN["schedule"]] == SCHEDULES.index(ScheduleName.GPIPE),
            *(share[:, place] for place in (1, 4, 5)),
        ]
        return np.stack(columns, axis=1).astype(np.float64)

    # What is seen ------------------------------------------------------------------------------

    def _observe(self) -> dict[str, NDArray[Any]]:
        found, num_envs = self.compiled, self.num_envs
        node = self._node
        mask = np.zeros((num_envs, MAX_CANDIDATES), dtype=bool)
        features = np.zeros((num_envs, MAX_CANDIDATES, NUM_CANDIDATE), dtype=np.float32)
        self._best.fill(np.inf)
        depth = found.depth[node]
        decision = depth.copy()
        in_tree = ~self._is_done & (depth < NUM_DECIDED)
        self._see_rows(np.flatnonzero(in_tree), mask, features)
        in_room = np.flatnonzero(~self._is_done & ~in_tree)
        if len(in_room):
            decision[in_room] = self._see_room(in_room, mask, features)
        mask[self._is_done, 0] = True
        decision[self._is_done] = _CUT
        at_row = depth == NUM_DECIDED
        instance = self._instance
        groups = np.where(at_row, np.minimum(self._level, found.num_groups[instance]), 0)
        decided = np.arange(MAX_GROUPS) < groups[:, None]
        kinds = found.kinds[instance[:, None], self._chosen] * decided[:, :, None]
        self._observation = {
            "decision": decision,
            "action_mask": mask,
            "candidates": features,
            "state": states(
                num_decided=depth,
                values=found.values[found.first_row[node]],
                row_share=found.rows_below[node] / found.num_rows[instance],
                least=found.least[node],
                num_groups=found.num_groups[instance],
                group_kinds=kinds,
                groups_decided=groups,
            ),
            "instance": instance.copy(),
        }
        return self._observation

    def _see_rows(self, which: IntArray, mask: NDArray[np.bool_], features: Float32Array) -> None:
        found = self.compiled
        node = self._node[which]
        count = found.num_children[node]
        begin = np.cumsum(count) - count
        child = np.arange(int(count.sum())) + np.repeat(found.first_child[node] - begin, count)
        env, slot = np.repeat(which, count), found.slot[child]
        fits = np.isfinite(found.best_s[child])
        env, slot, child = env[fits], slot[fits], child[fits]
        mask[env, slot] = True
        features[env, slot] = found.candidates[child]
        self._child[env, slot] = child
        self._best[env, slot] = found.best_s[child]

    def _see_room(
        self, which: IntArray, mask: NDArray[np.bool_], features: Float32Array
    ) -> IntArray:
        """Fill in choices of groups and cuts; which decision it is."""
        found = self.compiled
        table = self._table(which)
        width = table.shape[1]
        mask[which, :width] = np.isfinite(table)
        self._best[which, :width] = table
        instance, level = self._instance[which], self._level[which]
        is_cut = level == found.num_groups[instance]
        env, slot = np.nonzero(np.isfinite(table))
        place = np.where(is_cut, MAX_GROUPS, level)[env]
        features[which[env], slot] = found.room_candidates[instance[env], place, slot]
        return np.asarray(np.where(is_cut, _CUT, NUM_DECIDED + level))

    # What is known -----------------------------------------------------------------------------

    def best_time_s(self) -> Float32Array:
        """(B, A) least nominal time each candidate can still reach; infinite where masked."""
        return self._best.copy()

    def time_s(self) -> FloatArray:
        """(B,) nominal time of finished plans; NaN before."""
        return self._time_s.copy()

    def traits(self) -> FloatArray:
        """(B, ``RANDOMIZED``) of the plans as far as they are decided."""
        return self._traits(self._every)

    def placed(self) -> list[Placed | None]:
        """Finished plans; ``None`` before."""
        found = self.compiled
        plans: list[Placed | None] = []
        for env in range(self.num_envs):
            if not self._is_done[env]:
                plans.append(None)
                continue
            num_groups = int(found.num_groups[self._instance[env]])
            row = found.row_in_instance[found.first_row[self._node[env]]]
            plans.append(
                Placed(
                    row=int(row),
                    variants=tuple(self._chosen[env, :num_groups].tolist()),
                    cut=int(self._cut[env]),
                )
            )
        return plans
