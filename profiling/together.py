"""Ranks that measure together: they start as one, agree on counts, and the slowest one counts.

A collective takes as long as its slowest rank. Every repeat starts behind a barrier of all ranks;
since ranks leave a barrier at slightly different times, what is short runs several times in a row
in one repeat, and the time of one call is the mean over the row.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from meshwright.profiling.timer import Effort, Measured, Timer
from meshwright.records.record import timing_of

__all__ = ["Together", "local_world_size"]

_REPEAT_S = 0.01
"""Least time of one repeat, so that the barrier before it does not matter."""

_FEWEST_REPEATS, _MAX_REPEATS = 3, 30


def local_world_size() -> int:
    """Ranks on this host, as torchrun says; all of them where nobody says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


class Together:
    """This rank among all; needs the default process group, and all ranks to come together."""

    def __init__(self, device: torch.device, *, timeout_s: float) -> None:
        """Makes a gloo group for agreement where the default group is another backend's."""
        self.device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.backend = dist.get_backend()
        self._timeout = timedelta(seconds=timeout_s)
        self._control: dist.ProcessGroup | None = None
        if self.backend != "gloo":
            self._control = dist.new_group(backend="gloo", timeout=self._timeout)

    def new_group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """A group of ``ranks``; every rank must come here, members or not."""
        return dist.new_group(list(ranks), timeout=self._timeout)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._control)

    def synchronize(self) -> None:
        """Wait for this rank's device; the host's own work needs no waiting."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def agreed(self, value: float) -> float:
        """Rank 0's ``value``, on every rank."""
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(tensor, 0, group=self._control)
        return float(tensor[0])

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest over the ranks of each of ``values``, on every rank."""
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._control)
        return [float(value) for value in tensor]

    def measure(self, call: Callable[[], object] | None, *, budget_s: float) -> Measured:
        """Time ``call`` on all ranks at once; alike on every rank, for the slowest one counts.

        A rank with nothing to do passes None; it waits for the others.
        """
        effort = Effort(
            budget_s=budget_s,
            min_repeats=6,
            max_repeats=_MAX_REPEATS,
            min_repeat_s=_REPEAT_S,
            warmup_s=0.0,
        )
        clock, step = _RanksClock(self), call or _nothing
        measured = Timer(clock, effort=effort).measure(step)
        times_s = list(measured.timing.times_s)
        while len(times_s) < _FEWEST_REPEATS:  # whatever the budget says
            together_s = clock.time_s(step, num_calls=measured.num_calls, before=None)
            times_s.append(together_s / measured.num_calls)
        return dataclasses.replace(measured, timing=timing_of(times_s))


class _RanksClock:
    """The host's clock behind a barrier of all ranks; gives every rank the slowest one's time.

    The moment is rank 0's, so that the Timer decides alike everywhere.
    """

    method = "perf_counter behind a barrier of all ranks, slowest rank of each repeat"

    def __init__(self, together: Together) -> None:
        self._together = together

    def now_s(self) -> float:
        """Seconds of rank 0's clock."""
        return self._together.agreed(time.perf_counter())

    def time_s(
        self, step: Callable[[], object], *, num_calls: int, before: Callable[[], object] | None
    ) -> float:
        """Seconds from this rank's leaving the barrier to the end of its work; of the slowest."""
        if before is not None:
            before()
        self._together.synchronize()
        self._together.barrier()
        start_s = time.perf_counter()
        for _ in range(num_calls):
            step()
        self._together.synchronize()
        (slowest_s,) = self._together.largest([time.perf_counter() - start_s])
        return slowest_s


def _nothing() -> None:
    """What a rank does that only waits."""
