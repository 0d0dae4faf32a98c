"""Rules of thumb: the plans people write by hand, as baselines and as a floor for every search.

data-parallel   one copy on every device, micro-batches as large as fit
zero3           the same with parameters, gradients and optimizer state cut over all devices
megatron        tensor parallel within a host, as little as fits; then pipeline stages; the rest
                data parallel (Narayanan et al. 2021, arXiv 2104.04473, takeaways 1 to 3)
naive-layers    layers in order on all devices, one batch walking through: one device works
                at a time
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from meshwright.errors import PlanRefused
from meshwright.plans.plan import Recompute, ScheduleName
from meshwright.space.partition import least_bottleneck
from meshwright.space.search import Candidate, Proposer, SearchContext, SolveResult, SolveStatus
from meshwright.space.uniform import (
    UniformChoice,
    candidate_of,
    divisors,
    largest_divisor,
    price,
    stage_times_s,
    tensor_parallel_sizes,
)

__all__ = ["RULES", "Rule"]

Choices = Callable[[SearchContext], Iterator[UniformChoice]]


class Rule:
    """Takes the first of its choices that fits; a ``Proposer``."""

    def __init__(self, name: str, choices: Choices) -> None:
        self._name = name
        self._choices = choices

    @property
    def name(self) -> str:
        """``data-parallel``, ``zero3``, ``megatron`` or ``naive-layers``."""
        return self._name

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """The first choice the pins allow that fits, or else the last one, which does not."""
        start_s = time.monotonic()
        evaluations = 0
        last: UniformChoice | None = None
        is_late = False
        refusal = ""
        for choice in self._choices(context):
            is_late = deadline_s is not None and time.monotonic() > deadline_s
            if is_late and last is not None:
                break
            if not _is_allowed(context, choice):
                continue
            try:
                cost = price(context, choice, simulate=False)
            except PlanRefused as error:
                refusal = str(error)
                continue
            evaluations += 1
            last = choice
            if cost.fits:
                break
        candidates: tuple[Candidate, ...] = ()
        if last is not None:
            candidates = (candidate_of(context, last, solver=self._name),)
        if not candidates:
            status = SolveStatus.NOT_APPLICABLE
        elif candidates[0].cost.fits:
            status = SolveStatus.DONE
        else:
            status = SolveStatus.STOPPED if is_late else SolveStatus.NOTHING_FITS
        return SolveResult(
            candidates=candidates,
            evaluations=evaluations,
            seconds=time.monotonic() - start_s,
            status=status,
            notes={} if last is not None or not refusal else {self._name: refusal},
        )


def _is_allowed(context: SearchContext, choice: UniformChoice) -> bool:
    pins = context.pins
    sizes = {"dp_replicate": choice.dp_replicate, "dp_shard": choice.dp_shard, "tp": choice.tp}
    return (
        pins.allows_sizes(sizes, num_stages=choice.pp)
        and pins.num_microbatches in (None, choice.num_microbatches)
        and pins.zero_stage in (None, choice.zero_stage)
        and pins.recompute in (None, choice.recompute)
    )


def _microbatches(context: SearchContext, data_parallel: int) -> tuple[int, ...]:
    """Possible numbers of micro-batches, fewest first."""
    if not context.can_split_step:
        return (1,)
    return divisors(context.batch // data_parallel)


def _data_parallel(context: SearchContext) -> Iterator[UniformChoice]:
    ways = largest_divisor(context.batch, at_most=context.cluster.num_devices)
    for count in _microbatches(context, ways):
        yield UniformChoice(dp_replicate=ways, num_microbatches=count)


def _zero3(context: SearchContext) -> Iterator[UniformChoice]:
    ways = largest_divisor(context.batch, at_most=context.cluster.num_devices)
    if ways == 1:
        return
    for recompute in (Recompute.NONE, Recompute.FULL):
        for count in _microbatches(context, ways):
            yield UniformChoice(
                dp_shard=ways, zero_stage=3, num_microbatches=count, recompute=recompute
            )


def _megatron(context: SearchContext) -> Iterator[UniformChoice]:
    num_devices = context.cluster.num_devices
    sizes = tensor_parallel_sizes(context)
    count = len(context.model.segmentation.segments)
    stages = [s for s in divisors(num_devices // sizes[-1]) if s <= count]
    for tp, pp in [*((tp, 1) for tp in sizes), *((sizes[-1], pp) for pp in stages[1:])]:
        ways = largest_divisor(context.batch, at_most=num_devices // (tp * pp))
        # The smallest micro-batch keeps both memory and the pipeline's bubble small.
        base = UniformChoice(
            dp_replicate=ways,
            tp=tp,
            num_microbatches=_microbatches(context, ways)[-1],
            recompute=Recompute.SELECTIVE,
        )
        starts = least_bottleneck(stage_times_s(context, base), pp)
        if starts is not None:
            yield _replaced(base, starts=starts)


def _naive_layers(context: SearchContext) -> Iterator[UniformChoice]:
    count = min(context.cluster.num_devices, len(context.model.segmentation.segments))
    if count < 2:
        return
    starts = least_bottleneck(stage_times_s(context, UniformChoice()), count)
    if starts is not None:
        yield UniformChoice(starts=starts, schedule=ScheduleName.GPIPE)


def _replaced(choice: UniformChoice, *, starts: tuple[int, ...]) -> UniformChoice:
    return UniformChoice(
        dp_replicate=choice.dp_replicate,
        tp=choice.tp,
        num_microbatches=choice.num_microbatches,
        recompute=choice.recompute,
        starts=starts,
    )


RULES: tuple[Proposer, ...] = (
    Rule("data-parallel", _data_parallel),
    Rule("zero3", _zero3),
    Rule("megatron", _megatron),
    Rule("naive-layers", _naive_layers),
)
