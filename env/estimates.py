"""A glance at rows: what they may take, by the cost tables of segments and closed forms.

Tables (``env.tabled``) say what segments take of each part of the batch under each degree of tensor
parallelism. What rows do with it is summed over stages of equal time: the bubble in closed form,
gradients and parameters by the collectives' own prices, contexts and experts by textbook
communication, level by level as hierarchical collectives go. As much is computed again as it takes
to fit. Segments all do the same, and nothing is simulated.
It ranks rows and says which may be too full; it is no price.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cluster.model import Cluster
from meshwright.cost.framework import with_framework_s
from meshwright.cost.stage_work import exposed_s
from meshwright.env.instance import ROW_DECISIONS, ROW_FEATURES, Float32Array, FloatArray, IntArray
from meshwright.env.rows import SCHEDULES
from meshwright.env.tabled import PARAMETERS, Staged, Tabled, experts, tabled
from meshwright.plans.plan import Recompute, ScheduleName
from meshwright.space.decision import Skeleton, Strategy
from meshwright.space.evaluate import PlanSpace
from meshwright.space.search import SearchContext
from meshwright.space.segment_costs import TIMES
from meshwright.space.skeletons import shardings_for
from meshwright.spmd.program import CollectiveKind

__all__ = ["Glance", "Totals", "glance", "totals_of"]

_LEAST_LOG, _MOST_LOG = -10.0, 10.0
"""Features are cut off here."""
_TP, _EP, _PP = (ROW_DECISIONS.index(name) for name in ("tp", "ep", "pp"))


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
    links = _Links(context.cluster)
    seconds, fullness = _looked(context, totals, rows, row, links)
    step_s = seconds["step"]
    state, kept, without, fullest = fullness
    least_s = step_s.min() if len(step_s) else 1.0
    bubble = seconds["step"] / np.maximum(seconds["step"] - seconds["bubble"], 1e-30) - 1
    idle = context.cluster.num_devices / (row.tokens * row.tp * row.pp) - 1
    tokens = context.batch * context.sequence_size / (row.tokens * row.micro)
    columns = (
        *(_log(seconds[name] / least_s) for name in ("compute", "tp", "cp", "ep", "dp")),
        np.log1p(np.maximum(bubble, 0.0)),
        *(_log(seconds[name] / least_s) for name in ("step", "none", "full")),
        *(_log(share) for share in (state, kept, without, fullest)),
        _log(tokens / 1024),
        np.log1p(np.maximum(idle, 0.0)),
        np.log(np.maximum(seconds["imbalance"], 1.0)),
    )
    assert len(ROW_FEATURES) == len(columns), "a column for each feature"
    return Glance(
        step_s=step_s, fullness=fullest, features=np.stack(columns, axis=1).astype(np.float32)
    )


_SECONDS = ("compute", "tp", "cp", "ep", "dp", "bubble", "step", "none", "full", "imbalance")
_STEP = _SECONDS.index("step")


def _looked(
    context: SearchContext, totals: Totals, rows: IntArray, row: _Rows, links: _Links
) -> tuple[dict[str, FloatArray], FloatArray]:
    """Seconds by ``_SECONDS``, and (4, K) shares of memory.

    These are state, activations, then all of it with nothing and with everything computed again.
    Of the ways of sharding that seen to be fastest, none of which fits last.
    """
    seconds = np.full((len(_SECONDS), len(rows)), np.inf)
    fullness = np.full((4, len(rows)), np.inf)
    least = rows[:, _EP][rows[:, _EP] > 1].min(initial=1 << 30)
    least = 1 if least == 1 << 30 else least
    expert = experts(context, int(least))
    # Their exchanges in closed form are as far off as those of the fewest ranks are.
    one = _talk_of_experts(totals, links, *(np.array([x]) for x in (least, 1.0, least, 1.0, 1.0)))
    talk = expert.talking_s / max(float(one[0]), 1e-30)
    data_s = _data_lines(context, rows)
    parts = row.tokens * row.micro
    keys = np.stack([rows[:, _TP], rows[:, _PP], parts.astype(np.int64)], axis=1)
    kinds, of = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(of.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(of.ravel(), minlength=len(kinds)))
    for (tp, pp, part), end, start in zip(
        kinds.tolist(), ends.tolist(), [0, *ends.tolist()], strict=False
    ):
        mine = order[start:end]
        # Where the tensors cannot be cut, every rank does everything.
        for found in tabled(context, tp) or tabled(context, 1):
            staged = found.staged(float(part), pp, expert.share)
            look = _Look(context, totals, found, staged, row.of(mine), links)
            now, full = look.seconds(data_s[:, :, mine], talk)
            worse = np.maximum(full[3], 1.0) * now["step"]
            better = worse < seconds[_STEP, mine] * np.maximum(fullness[3, mine], 1.0)
            seconds[:, mine[better]] = np.stack([now[name] for name in _SECONDS])[:, better]
            fullness[:, mine[better]] = full[:, better]
    return dict(zip(_SECONDS, seconds, strict=True)), fullness


def _talk_of_experts(
    totals: Totals,
    links: _Links,
    ep: FloatArray,
    tp: FloatArray,
    tokens: FloatArray,
    pp: FloatArray,
    micro: FloatArray,
) -> FloatArray:
    """(n,) seconds of a step if all that passes between segments is exchanged twice each way."""
    passed = totals.boundary_bytes.sum() / (tokens * pp)
    return links.seconds(ep, tp, 4 * passed, len(totals.work_s) * micro / pp)


def _data_lines(context: SearchContext, rows: IntArray) -> FloatArray:
    """(3, 2, K) seconds, and seconds a byte, of data parallel collectives.

    Reducing among all, among those that share state, and gathering among these.
    """
    used = [_TP, 1, _EP, _PP, 4, 5]
    meshes, of = np.unique(rows[:, used], axis=0, return_inverse=True)
    lines = np.zeros((3, 2, len(meshes)))
    payload = np.array([1e6, 1e8])
    ways = (
        (CollectiveKind.ALL_REDUCE, ("dp_replicate", "dp_shard", "cp", "ep")),
        (CollectiveKind.REDUCE_SCATTER, ("dp_shard", "cp", "ep")),
        (CollectiveKind.ALL_GATHER, ("dp_shard", "cp", "ep")),
    )
    prices = context.model.pricer.prices
    for number, (tp, cp, ep, pp, dp, shard) in enumerate(meshes.tolist()):
        sizes = dict(Skeleton.of({"tp": tp, "cp": cp, "ep": ep, "dp_shard": shard}).sizes)
        sizes["dp_replicate"] = dp // shard
        for place, (kind, axes) in enumerate(ways):
            named = [axis for axis in axes if sizes[axis] > 1]
            if named:
                few, many = prices.time_s(
                    kind, payload, axes=named, axis_sizes=sizes, num_stages=pp
                )
                slope = max(many - few, 0.0) / (payload[1] - payload[0])
                lines[place, :, number] = max(few - slope * payload[0], 0.0), slope
    return lines[:, :, of.ravel()]


class _Look:
    """Rows that share a table, a number of stages and a part of the batch: n of them."""

    def __init__(
        self,
        context: SearchContext,
        totals: Totals,
        table: Tabled,
        staged: Staged,
        row: _Rows,
        links: _Links,
    ) -> None:
        self._context, self._totals, self._row, self._links = context, totals, row, links
        self._segments, self._parameters = staged.segments, staged.parameters
        self._roofline = table.roofline
        # (n, P) bytes; experts lie on one of ep ranks.
        amounts = self._parameters
        whole = np.maximum(amounts["parameters"], 1.0)
        share = 1 - amounts["expert_parameters"] / whole * (1 - 1 / row.ep[:, None])
        self._bytes = {name: share * amounts[name] for name in PARAMETERS[:-1]}

    def seconds(
        self, data_s: FloatArray, experts_talk: float
    ) -> tuple[dict[str, FloatArray], FloatArray]:
        """(n,) by ``_SECONDS``, and (4, n) shares of memory."""
        row, of = self._row, self._segments
        extra = self._talk(experts_talk)
        each = (extra["cp"] + extra["ep"]) / row.micro
        both = of["forward"] + of["backward"]
        tail, often = self._data(data_s)
        both_s = both[None] + each[:, None] + often
        step_s = {}
        for name, again in (("none", 0.0), ("full", of["again"])):
            stage_s = both_s + again
            bottleneck = stage_s.max(axis=1)
            through = stage_s.sum(axis=1) + (row.micro - 1) * bottleneck
            step_s[name] = with_framework_s(
                self._context.model.pricer.calibration,
                through + tail.max(axis=1) + extra["pp"],
                num_microbatches=row.micro,  # type: ignore[arg-type]
                num_devices=int(row.tokens[0] * row.tp[0] * row.pp[0]),
            )
        full = self._fullness()
        # As much is computed again as it takes to fit.
        share = np.clip((full[2] - 1) / np.maximum(full[2] - full[3], 1e-9), 0.0, 1.0)
        share = np.where(full[2] <= 1, 0.0, share)
        bottleneck = both_s.max(axis=1)
        found = {
            "compute": row.micro * (both - of["talking"]).max(),
            "tp": row.micro * of["talking"].max(),
            "cp": extra["cp"],
            "ep": extra["ep"],
            "dp": tail.max(axis=1) + row.micro * often.max(axis=1),
            "bubble": both_s.sum(axis=1) - bottleneck,
            "step": step_s["none"] + share * (step_s["full"] - step_s["none"]),
            "imbalance": bottleneck / both_s.mean(axis=1),
            **step_s,
        }
        return found, full

    def _talk(self, experts_talk: float) -> dict[str, FloatArray]:
        """(n,) of a step: among contexts, experts and stages."""
        row, totals, links = self._row, self._totals, self._links
        count = float(len(totals.work_s))
        passed = totals.boundary_bytes.sum() / (row.tokens * row.pp)
        times = count * row.micro / row.pp
        one = totals.boundary_bytes.max() / (row.tokens * row.micro)
        two, apart = np.full(len(row.pp), 2.0), row.tokens * row.tp
        hop_s = links.seconds(two, apart, 2 * one, np.ones(len(one)))
        return {
            "cp": links.seconds(row.cp, row.ep * row.tp, 6 * passed, times),
            "ep": experts_talk
            * _talk_of_experts(totals, links, row.ep, row.tp, row.tokens, row.pp, row.micro),
            "pp": 2 * (row.pp - 1) * hop_s,
        }

    def _data(self, data_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(n, P) seconds of data parallelism and the optimizer: once, and in each micro-batch."""
        row, of, held = self._row, self._segments, self._bytes
        calibration = self._context.model.pricer.calibration
        bucket = self._context.pins.communication.bucket_bytes

        def line(way: int, num_bytes: FloatArray) -> FloatArray:
            latency, slope = data_s[way, :, :, None]
            return np.asarray(latency * np.ceil(num_bytes / bucket) + slope * num_bytes)

        def exposed(talk_s: FloatArray, beside_s: FloatArray) -> FloatArray:
            hides = np.array(self._roofline.queue_runs_ahead)
            return exposed_s(talk_s, beside_s, hides, calibration)

        zero = row.zero[:, None]
        shard = np.maximum(row.shard * row.cp * row.ep, 1.0)[:, None]
        replicas = (row.dp / row.shard)[:, None]
        gradients, parameters = held["gradients"], held["parameters"]
        across = np.where(replicas > 1, line(0, gradients / shard), 0.0)
        reduce_s = np.where(zero == 0, line(0, gradients), line(1, gradients) + across)
        backward_s = of["backward"][None]
        often_s = np.where(zero >= 2, exposed(reduce_s, backward_s), 0.0)
        once_s = np.where(zero < 2, exposed(reduce_s, backward_s), 0.0)
        gather_s = line(2, parameters)
        once_s = once_s + np.where((zero > 0) & (zero < 3), gather_s, 0.0)
        forward_s = of["forward"][None]
        gathered_s = exposed(gather_s, forward_s) + exposed(gather_s, backward_s)
        often_s = often_s + np.where(zero == 3, gathered_s, 0.0)
        traffic = held["step_traffic"] / np.where(zero >= 1, row.shard[:, None], 1.0)
        return once_s + traffic / self._roofline.bytes_per_s, often_s

    def _fullness(self) -> FloatArray:
        """(4, n) shares of memory of the fullest stage, as ``_looked`` has them."""
        row, of, held = self._row, self._segments, self._bytes

        def over(least_stage: int) -> FloatArray:
            return np.where(row.zero >= least_stage, row.shard, 1.0)[:, None]

        state = held["parameters"] / over(3) + held["gradients"] / over(2)
        state = state + held["optimizer"] / over(1)
        left = row.pp[:, None] - np.arange(len(of["forward"]))
        is_gpipe = row.schedule == SCHEDULES.index(ScheduleName.GPIPE)
        micro = row.micro[:, None]
        flight = np.where(is_gpipe[:, None], micro, np.minimum(micro, left))
        slack = 1 + self._context.model.pricer.allocator_share
        none = state + slack * (flight * of["kept"] + of["transient"])
        full = state + slack * (flight * of["least_kept"] + of["most_transient"])
        shares = np.stack([state, flight * of["kept"], none, full]).max(axis=2)
        return np.asarray(shares / self._totals.capacity_bytes)


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
        self._rows = rows

    def of(self, which: IntArray) -> _Rows:
        """Some of them."""
        return _Rows(self._rows[which])


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
