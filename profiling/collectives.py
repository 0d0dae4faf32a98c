"""Collectives over sizes, groups and axes, timed as training runs them (``sweeps`` says which)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.profiling.figures import Emit, Figure, Note
from meshwright.profiling.sweeps import (
    DTYPES,
    CollectiveSweep,
    GroupShape,
    buffer_elements,
    groups_of,
)
from meshwright.profiling.timer import Measured
from meshwright.profiling.together import Together, local_world_size
from meshwright.records.kinds import Kind
from meshwright.units import format_bytes, format_seconds

__all__ = ["make_call", "measure_collectives", "ready_call"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """The groups of one shape, as one rank sees them."""

    shape: GroupShape
    ranks: tuple[tuple[int, ...], ...]
    own: dist.ProcessGroup | None
    own_index: int


def make_call(
    op: str, group: dist.ProcessGroup, ranks: Sequence[int], *, sent: Tensor, got: Tensor
) -> Callable[[], None]:
    """One collective among ``ranks`` of ``group``, from ``sent`` into ``got`` or in place.

    A broadcast takes the next rank as its root each time, so that none runs ahead of the others; a
    ``send_recv`` is a message there and one back.
    """
    if op == "all_reduce":
        return lambda: _drop(dist.all_reduce(sent, group=group))
    if op == "all_gather":
        return lambda: _drop(dist.all_gather_into_tensor(got, sent, group=group))
    if op == "reduce_scatter":
        return lambda: _drop(dist.reduce_scatter_tensor(got, sent, group=group))
    if op == "all_to_all":
        return lambda: _drop(dist.all_to_all_single(got, sent, group=group))
    if op == "broadcast":
        turn = _turns(ranks)
        return lambda: _drop(dist.broadcast(sent, next(turn), group=group))
    assert op == "send_recv", f"no collective {op}"
    assert len(ranks) == 2, f"send_recv is between two ranks, not {len(ranks)}"
    is_first = dist.get_rank() == ranks[0]
    other = ranks[1] if is_first else ranks[0]

    def there_and_back() -> None:
        if is_first:
            dist.send(sent, other, group=group)
            dist.recv(got, other, group=group)
        else:
            dist.recv(got, other, group=group)
            dist.send(sent, other, group=group)

    return there_and_back


def ready_call(
    op: str,
    group: dist.ProcessGroup,
    ranks: Sequence[int],
    payload_bytes: int,
    *,
    dtype: str,
    device: torch.device,
) -> tuple[Callable[[], None], int]:
    """``make_call`` with buffers of its own; also the payload they really hold, in bytes."""
    element: torch.dtype = getattr(torch, DTYPES[dtype])
    num_sent, num_got = buffer_elements(
        op, payload_bytes, size=len(ranks), item_bytes=element.itemsize
    )
    call = make_call(
        op,
        group,
        ranks,
        sent=torch.zeros(num_sent, dtype=element, device=device),
        got=torch.zeros(num_got, dtype=element, device=device),
    )
    return call, max(num_sent, num_got) * element.itemsize


def _turns(ranks: Sequence[int]) -> Iterator[int]:
    while True:
        yield from ranks


def _drop(result: Any) -> None:
    """A blocking collective has nothing to say."""


def measure_collectives(together: Together, sweep: CollectiveSweep, emit: Emit) -> None:
    """Run ``sweep`` on all ranks; rank 0 emits a ``Figure`` for each figure as it comes.

    Small payloads come first, for every collective and shape, so that a budget that ends early
    leaves the large ones out.
    """
    deadline_s = time.monotonic() + sweep.budget_s
    shapes = [_make_groups(together, shape) for shape in sweep.shapes]
    points = [
        (size, groups, op, alone)
        for size in sweep.sizes_bytes
        for groups in shapes
        for op in sweep.ops
        for alone in ((False, True) if sweep.alone and len(groups.ranks) > 1 else (False,))
        if op != "send_recv" or groups.shape.size == 2
    ]
    for done, (size, groups, op, alone) in enumerate(points):
        left_s = deadline_s - time.monotonic()
        budget_s = together.agreed(min(sweep.point_s, left_s))
        if budget_s <= 0:
            left = f"{len(points) - done} of {len(points)} figures, the largest payloads"
            emit(Note(text=f"the budget is spent; left out: {left}"))
            return
        figure = _measure_point(together, sweep, op, size, groups, alone, budget_s)
        emit(figure)
        emit(Note(text=f"{done + 1}/{len(points)} {_words(figure)}", is_progress=True))


def _words(figure: Figure) -> str:
    extra = figure.extra
    return (
        f"{figure.name} {format_bytes(float(extra['bytes'] or 0))}, group of "
        f"{extra['group_size']} at stride {extra['stride']}, {extra['num_groups']} at a time: "
        f"{format_seconds(figure.median)}"
    )


def _make_groups(together: Together, shape: GroupShape) -> _Groups:
    all_ranks = groups_of(together.world_size, shape)
    own, own_index = None, 0
    for index, ranks in enumerate(all_ranks):
        group = together.new_group(ranks)
        if together.rank in ranks:
            own, own_index = group, index
    return _Groups(shape=shape, ranks=all_ranks, own=own, own_index=own_index)


def _measure_point(
    together: Together,
    sweep: CollectiveSweep,
    op: str,
    size_bytes: int,
    groups: _Groups,
    alone: bool,
    budget_s: float,
) -> Figure:
    call: Callable[[], None] | None = None
    payload_bytes = 0
    if not alone or groups.own_index == 0:
        assert groups.own is not None, "every rank is in one group of a shape"
        call, payload_bytes = ready_call(
            op,
            groups.own,
            groups.ranks[groups.own_index],
            size_bytes,
            dtype=sweep.dtype,
            device=together.device,
        )
    return _as_figure(
        together,
        sweep,
        op,
        groups,
        together.measure(call, budget_s=budget_s),
        payload_bytes=payload_bytes,
        num_groups=1 if alone else len(groups.ranks),
    )


def _as_figure(
    together: Together,
    sweep: CollectiveSweep,
    op: str,
    groups: _Groups,
    measured: Measured,
    *,
    payload_bytes: int,
    num_groups: int,
) -> Figure:
    per_host = local_world_size()
    hosts = len({rank // per_host for rank in groups.ranks[0]})
    times_s = measured.timing.times_s
    there_and_back = op == "send_recv"
    return Figure(
        kind=Kind.COLLECTIVE,
        name=op,
        unit="s",
        values=tuple(time_s / 2 for time_s in times_s) if there_and_back else times_s,
        method=f"{'half of there and back; ' if there_and_back else ''}{measured.method}",
        extra={
            "bytes": payload_bytes,
            "group_size": groups.shape.size,
            "stride": groups.shape.stride,
            "num_groups": num_groups,
            "world_size": together.world_size,
            "hosts": hosts,
            "ranks_per_host": groups.shape.size // hosts,
            "backend": together.backend,
            "fabric": "loopback" if together.backend == "gloo" and hosts == 1 else None,
            "dtype": sweep.dtype,
            "in_place": op in ("all_reduce", "broadcast"),
            "num_calls": measured.num_calls,
            "num_threads": torch.get_num_threads(),
        },
    )
