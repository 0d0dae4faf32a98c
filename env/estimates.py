"""A glance at rows: what they may take, by closed forms over all rows at once.

Nothing is sharded for it. What the whole batch takes on one device is known by segment
(``Totals``); a row divides it by its devices and adds textbook communication, level by level as
hierarchical collectives go: two all-reduces of what passes between segments in each direction for
tensor parallelism, two exchanges of it for contexts and for experts, for data parallelism the
gradients once or, from ZeRO 2 on, in every micro-batch, with ZeRO 3 the parameters in every
micro-batch, the bubble of the pipeline.
It ranks rows and says which may be too full; it is no price.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cluster.model import Cluster
from meshwright.env.instance import ROW_DECISIONS, ROW_FEATURES, Float32Array, FloatArray, IntArray
from meshwright.env.rows import SCHEDULES
from meshwright.plans.plan import Recompute, ScheduleName
from meshwright.space.decision import Skeleton, Strategy
from meshwright.space.evaluate import PlanSpace
from meshwright.space.search import SearchContext
from meshwright.space.segment_costs import TIMES
from meshwright.space.skeletons import shardings_for

__all__ = ["Glance", "Totals", "glance", "totals_of"]

_LEAST_LOG, _MOST_LOG = -10.0, 10.0
"""Features are cut off here."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Totals:
    """The whole batch at once on one device, by segment; arrays of shape (V,)."""

    work_s: FloatArray
    """Forward and backward."""
    launch_s: FloatArray
    """The part of starting operators, whatever their size."""
    parameter_bytes: FloatArray
    gradient_bytes: FloatArray
    optimizer_bytes: FloatArray
    kept_bytes: FloatArray
    """Nothing computed again."""
    least_kept_bytes: FloatArray
    """Everything computed again."""
    boundary_bytes: FloatArray
    """From the segment before."""
    capacity_bytes: float
    """What a device may use."""


def totals_of(context: SearchContext) -> Totals:
    """The totals of a context's model on its first device."""
    skeleton = Skeleton.of({})
    sharding = shardings_for(context, skeleton)[0]
    space = PlanSpace(
        context,
        skeleton,
        [Strategy(sharding=sharding, recompute=how) for how in (Recompute.NONE, Recompute.FULL)],
    )
    costs = space.costs

    def column(name: str, strategy: int = 0) -> FloatArray:
        return np.asarray(costs.amounts[:, strategy, costs.column(name)])

    times = dict(zip(TIMES, costs.amounts[:, 0, : len(TIMES)].T, strict=True))
    return Totals(
        work_s=times["forward_s"] + times["backward_s"],
        launch_s=times["forward_launch_s"] + times["backward_launch_s"],
        parameter_bytes=column("parameters"),
        gradient_bytes=column("gradients"),
        optimizer_bytes=column("optimizer"),
        kept_bytes=column("kept"),
        least_kept_bytes=column("kept", 1),
        boundary_bytes=np.asarray(costs.cut_bytes[0, :, 0]),
        capacity_bytes=float(space.capacity_bytes.min()),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Glance:
    """What a glance at K rows tells."""

    step_s: FloatArray
    """(K,)"""
    fullness: FloatArray
    """(K,) of a device's memory, everything computed again; above 1 hardly fits."""
    features: Float32Array
    """(K, FR) ``ROW_FEATURES``"""

    @property
    def order_s(self) -> FloatArray:
        """(K,) by which rows are worth keeping: rows that hardly fit come after all others."""
        return np.where(self.fullness > 1.0, self.step_s.max() * self.fullness, self.step_s)


def glance(context: SearchContext, totals: Totals, rows: IntArray) -> Glance:
    """Look at (K, D) rows."""
    row = _Rows(rows)
    bubble = (row.pp - 1) / row.micro
    bubble = np.where(row.schedule == SCHEDULES.index(ScheduleName.ZB_H1), bubble / 3, bubble)
    seconds = _seconds(context.cluster, totals, row)
    compute_s, *talking_s, dp_s = seconds
    step_s = (compute_s + sum(talking_s)) * (1 + bubble) + dp_s
    state, kept, fullest = (found / totals.capacity_bytes for found in _bytes(totals, row))
    least_s = step_s.min() if len(step_s) else 1.0
    idle = context.cluster.num_devices / (row.tokens * row.tp * row.pp) - 1
    tokens = context.batch * context.sequence_size / (row.tokens * row.micro)
    columns = (
        *(_log(found / least_s) for found in seconds),
        np.log1p(bubble),
        _log(step_s / least_s),
        *(_log(share) for share in (state, kept, fullest)),
        _log(tokens / 1024),
        np.log1p(np.maximum(idle, 0.0)),
    )
    assert len(ROW_FEATURES) == len(columns), "a column for each feature"
    return Glance(
        step_s=step_s, fullness=fullest, features=np.stack(columns, axis=1).astype(np.float32)
    )


class _Rows:
    """Columns of rows, (K,) each."""

    def __init__(self, rows: IntArray) -> None:
        of = {name: rows[:, place].astype(np.float64) for place, name in enumerate(ROW_DECISIONS)}
        self.tp, self.cp, self.ep, self.pp = (of[name] for name in ("tp", "cp", "ep", "pp"))
        self.dp, self.shard, self.zero = of["dp"], of["dp_shard"], of["zero_stage"]
        self.micro = of["num_microbatches"]
        self.schedule = rows[:, -1]
        self.tokens = self.dp * self.cp * self.ep
        """Ways the batch and its sequences are cut."""


def _seconds(cluster: Cluster, totals: Totals, row: _Rows) -> tuple[FloatArray, ...]:
    """(K,) of a step each: computing, talk along tp, cp and ep, and of data parallelism."""
    links = _Links(cluster)
    count = float(len(totals.work_s))
    # Stages hold whole segments: the fullest has that many, or the heaviest one; others have less.
    fullest = np.maximum(np.ceil(count / row.pp) / count, totals.work_s.max() / totals.work_s.sum())
    stage = np.where(row.pp > 1, np.sqrt(fullest / row.pp), 1.0)
    work_s = totals.work_s.sum() * stage / (row.tokens * row.tp)
    compute_s = np.hypot(work_s, totals.launch_s.sum() * row.micro / row.pp)
    # What one rank passes on in a step, over all segments of its stage.
    passed = totals.boundary_bytes.sum() / (row.tokens * row.pp)
    times = count * row.micro / row.pp
    gradients = totals.gradient_bytes.sum() / (row.tp * row.pp)
    parameters = totals.parameter_bytes.sum() / (row.tp * row.pp)
    inner = row.cp * row.ep * row.tp
    # From ZeRO 2 on gradients are reduced after each micro-batch.
    rounds = np.where(row.zero >= 2, row.micro, 1.0)
    amount = gradients * (rounds + (row.zero < 3))
    reduce_s = links.seconds(row.tokens, row.tp, amount, rounds)
    gather_s = links.seconds(row.shard, inner, 2 * parameters * row.micro, times)
    # Gradients are reduced beside the last backward, parameters gathered beside everything.
    dp_s = _exposed(reduce_s, compute_s * rounds / row.micro * (2 / 3))
    dp_s += np.where(row.zero == 3, _exposed(gather_s, compute_s), 0.0)
    return (
        compute_s,
        links.seconds(row.tp, np.ones(len(row.tp)), 8 * passed, times),
        links.seconds(row.cp, row.ep * row.tp, 6 * passed, times),
        links.seconds(row.ep, row.tp, 4 * passed, times),
        dp_s,
    )


def _bytes(totals: Totals, row: _Rows) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(K,) of a device: state, activations, and all of it with everything computed again."""
    own = row.tp * row.pp
    state = (
        totals.parameter_bytes.sum() / own / np.where(row.zero >= 3, row.shard, 1.0)
        + totals.gradient_bytes.sum() / own / np.where(row.zero >= 2, row.shard, 1.0)
        + totals.optimizer_bytes.sum() / own / np.where(row.zero >= 1, row.shard, 1.0)
    )
    is_gpipe = row.schedule == SCHEDULES.index(ScheduleName.GPIPE)
    in_flight = np.where(is_gpipe, row.micro, np.minimum(row.micro, row.pp))
    part = in_flight / (row.tokens * row.tp * row.pp * row.micro)
    peak = totals.kept_bytes.max() / (row.tokens * row.tp * row.micro)
    return (
        state,
        totals.kept_bytes.sum() * part,
        state + totals.least_kept_bytes.sum() * part + peak,
    )


def _exposed(seconds: FloatArray, beside_s: FloatArray) -> FloatArray:
    """What other work does not hide, a twentieth at least."""
    return np.maximum(seconds - beside_s, seconds / 20)


def _log(share: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore"):
        return np.clip(np.log(share), _LEAST_LOG, _MOST_LOG)


class _Links:
    """What groups of devices talk over: the links of their hosts, then of each level above."""

    def __init__(self, cluster: Cluster) -> None:
        per_host = max(host.num_devices for host in cluster.hosts)
        slowest = min((host.link for host in cluster.hosts), key=lambda link: link.bytes_per_s)
        self._found = [(per_host, slowest), *((n * per_host, link) for n, link in cluster.levels)]

    def seconds(
        self, ways: FloatArray, stride: FloatArray, num_bytes: FloatArray, times: FloatArray
    ) -> FloatArray:
        """(K,) of ``num_bytes`` in so many messages among ``ways`` devices, ``stride`` apart.

        Level by level: what the devices of a host share, only one of them sends on.
        """
        total_s = np.zeros(len(ways))
        joined = np.ones(len(ways))
        for span, link in self._found:
            reached = np.maximum(joined, np.minimum(ways, np.floor(span / stride)))
            factor = reached / joined
            amount_s = num_bytes / joined * (factor - 1) / factor / link.bytes_per_s
            total_s += amount_s + np.where(factor > 1, times * link.latency_s, 0.0)
            joined = reached
        return total_s
