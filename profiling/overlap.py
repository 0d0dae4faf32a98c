"""Compute beside communication: how much each slows the other down.

Each repeat takes turns on all ranks at once: products alone, calls alone, both together, calls
alone, products alone. Together means communication in a thread (on CUDA a stream of its own) and
products meanwhile until it is done. A slow-down is the time beside the other over the mean of the
two times alone around it, on the slowest rank; below 1 it is noise. What spreads wider than its
median says nothing and is left out by name.
"""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from meshwright.profiling.collectives import ready_call
from meshwright.profiling.figures import Emit, Figure, Note
from meshwright.profiling.sweeps import DTYPES, OverlapSweep, groups_of
from meshwright.profiling.timer import median_interval
from meshwright.profiling.together import Together, local_world_size
from meshwright.records.kinds import Kind
from meshwright.units import format_bytes

__all__ = ["measure_overlap", "spreads_too_wide"]

_PRODUCT_DIM = {"cpu": 256, "cuda": 4096}
_LEAST_WINDOW_S = 0.05
_LEAST_PRODUCTS = 10
"""In one window, so that the one cut off at its end does not matter."""

_ALONE_S = 0.2
_FEWEST_REPEATS = 10
_NARROW_FRACTION = 0.05
"""Half the width of the interval of the median, over the median, at which repeats end."""
_MAX_CALLS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """One collective and one product, ready to run, and how many of each last as long."""

    communicate: Callable[[], None]
    compute: Callable[[], object]
    num_calls: int
    num_products: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """Seconds of one product and of one call on the slowest rank; alone, the mean of two turns."""

    product_alone_s: float
    call_alone_s: float
    product_s: float
    call_s: float

    @property
    def slow_downs(self) -> tuple[float, float]:
        """Of the product and of the call, each beside the other."""
        return self.product_s / self.product_alone_s, self.call_s / self.call_alone_s


def measure_overlap(together: Together, sweep: OverlapSweep, emit: Emit) -> None:
    """Run ``sweep`` on all ranks; rank 0 emits two figures for each collective and size.

    A slow-down that spreads wider than its median is told in a Note instead.
    """
    deadline_s = time.monotonic() + sweep.budget_s
    ranks: tuple[int, ...] = ()
    group = None
    for members in groups_of(together.world_size, sweep.shape):
        made = together.new_group(members)
        if together.rank in members:
            ranks, group = members, made
    assert group is not None, "every rank is in one group of a shape"
    points = [(size, op) for size in sweep.sizes_bytes for op in sweep.ops]
    for done, (size_bytes, op) in enumerate(points):
        if together.agreed(deadline_s - time.monotonic()) <= 0:
            left = len(points) - done
            emit(Note(text=f"the budget is spent; overlap leaves out {left} of {len(points)}"))
            return
        call, payload_bytes = ready_call(
            op, group, ranks, size_bytes, dtype=sweep.dtype, device=together.device
        )
        pair = _pair(together, call, getattr(torch, DTYPES[sweep.dtype]))
        windows = _windows(together, pair, sweep.repeats, sweep.budget_s / len(points))
        for found in _as_figure(together, sweep, op, payload_bytes, windows):
            what = f"overlap {done + 1}/{len(points)}: {op} {format_bytes(payload_bytes)}"
            if spreads_too_wide(found.values):
                low, high = min(found.values), max(found.values)
                emit(
                    Note(
                        text=f"{what}: {found.name} left out: {low:.2g} to {high:.2g} times as "
                        f"long in {len(found.values)} repeats, a spread wider than its median"
                    )
                )
                continue
            emit(found)
            said = f"{found.name} takes {found.median:.2f} times as long beside the other"
            emit(Note(text=f"{what}: {said}"))


def spreads_too_wide(values: Sequence[float]) -> bool:
    """Whether p90 - p10 of ``values`` is more than their median."""
    low, high = np.quantile(values, (0.1, 0.9))
    return bool(high - low > statistics.median(values))


def _windows(together: Together, pair: _Pair, repeats: int, budget_s: float) -> list[_Window]:
    """Ends when the medians are known well or the budget is spent, after 10 at least."""
    start_s = time.monotonic()
    windows: list[_Window] = []
    while len(windows) < repeats:
        spent_s = together.agreed(time.monotonic() - start_s)
        if len(windows) >= _FEWEST_REPEATS and (spent_s > budget_s or _is_narrow(windows)):
            break
        windows.append(_beside(together, pair))
    return windows


def _is_narrow(windows: Sequence[_Window]) -> bool:
    """Alike on every rank, as the windows are."""
    for values in zip(*(window.slow_downs for window in windows), strict=True):
        interval = median_interval(values)
        if interval is None:
            return False
        low, high = interval
        if (high - low) / 2 > _NARROW_FRACTION * statistics.median(values):
            return False
    return True


def _pair(together: Together, call: Callable[[], None], dtype: torch.dtype) -> _Pair:
    """``call`` and a product, and how many of each fill a window."""
    dim = _PRODUCT_DIM[together.device.type]
    left = torch.ones(dim, dim, dtype=dtype, device=together.device)
    right = torch.ones(dim, dim, dtype=dtype, device=together.device)
    out = torch.empty(dim, dim, dtype=dtype, device=together.device)

    def compute() -> object:
        return torch.mm(left, right, out=out)

    product_s = together.measure(compute, budget_s=_ALONE_S).timing.median_s
    call_s = together.measure(call, budget_s=_ALONE_S).timing.median_s
    window_s = max(_LEAST_WINDOW_S, _LEAST_PRODUCTS * product_s)
    num_calls = min(_MAX_CALLS, math.ceil(window_s / max(call_s, 1e-9)))
    return _Pair(
        communicate=call,
        compute=compute,
        num_calls=num_calls,
        num_products=max(_LEAST_PRODUCTS, math.ceil(num_calls * call_s / product_s)),
    )


def _beside(together: Together, pair: _Pair) -> _Window:
    """Seconds of one product and of one call, alone and beside each other, on the slowest rank.

    In turns within a moment, so that whatever else the machine does falls on all of them.
    """
    run = _window_on_cuda if together.device.type == "cuda" else _window_on_host

    def product() -> tuple[float, float]:
        return _one_s(together, pair.compute, pair.num_products), 0.0

    def call() -> tuple[float, float]:
        return 0.0, _one_s(together, pair.communicate, pair.num_calls)

    found: list[list[float]] = []
    for part in (product, call, lambda: run(pair), call, product):
        together.synchronize()
        together.barrier()
        found.append(together.largest(part()))
    return _Window(
        product_alone_s=(found[0][0] + found[4][0]) / 2,
        call_alone_s=(found[1][1] + found[3][1]) / 2,
        product_s=found[2][0],
        call_s=found[2][1],
    )


def _one_s(together: Together, call: Callable[[], object], num_calls: int) -> float:
    start_s = time.perf_counter()
    for _ in range(num_calls):
        call()
    together.synchronize()
    return (time.perf_counter() - start_s) / num_calls


def _window_on_host(pair: _Pair) -> tuple[float, float]:
    """Seconds of one product and of one call while both run."""
    spent: list[float] = []

    def communicate() -> None:
        start_s = time.perf_counter()
        for _ in range(pair.num_calls):
            pair.communicate()
        spent.append(time.perf_counter() - start_s)

    thread = threading.Thread(target=communicate, daemon=True)
    products = 0
    start_s = time.perf_counter()
    thread.start()
    while thread.is_alive() or not products:
        pair.compute()
        products += 1
    product_s = (time.perf_counter() - start_s) / products
    thread.join()
    if not spent:
        raise RuntimeError("communication failed beside compute; see the lines above")
    return product_s, spent[0] / pair.num_calls


def _window_on_cuda(pair: _Pair) -> tuple[float, float]:
    """As on the host, with events; the product is timed beside three times the communication."""
    cuda: Any = torch.cuda
    stream = cuda.Stream()
    found = []
    for calls, products in (
        (3 * pair.num_calls, pair.num_products),
        (pair.num_calls, 3 * pair.num_products),
    ):
        compute_events = [cuda.Event(enable_timing=True) for _ in range(2)]
        call_events = [cuda.Event(enable_timing=True) for _ in range(2)]
        cuda.synchronize()
        with cuda.stream(stream):
            call_events[0].record()
            for _ in range(calls):
                pair.communicate()
            call_events[1].record()
        compute_events[0].record()
        for _ in range(products):
            pair.compute()
        compute_events[1].record()
        cuda.synchronize()
        found.append(
            (
                float(compute_events[0].elapsed_time(compute_events[1])) * 1e-3 / products,
                float(call_events[0].elapsed_time(call_events[1])) * 1e-3 / calls,
            )
        )
    return found[0][0], found[1][1]


def _as_figure(
    together: Together,
    sweep: OverlapSweep,
    op: str,
    payload_bytes: int,
    windows: list[_Window],
) -> list[Figure]:
    dim = _PRODUCT_DIM[together.device.type]
    pairs = {
        "compute": [(window.product_alone_s, window.product_s) for window in windows],
        "communication": [(window.call_alone_s, window.call_s) for window in windows],
    }
    method = (
        "calls in a row, products beside them until they are done, over the mean of each alone on "
        "all ranks just before and just after; slowest rank"
    )
    cores = len(os.sched_getaffinity(0))
    if together.device.type == "cpu" and local_world_size() > cores:
        method += f"; {local_world_size()} ranks share {cores} cores, and wait for them"
    found = []
    for name, times_s in pairs.items():
        found.append(
            Figure(
                kind=Kind.OVERLAP,
                name=name,
                unit="ratio",
                values=tuple(together_s / alone_s for alone_s, together_s in times_s),
                method=method,
                extra={
                    "collective": op,
                    "bytes": payload_bytes,
                    "group_size": sweep.shape.size,
                    "operator": "linear",
                    "backend": together.backend,
                    "dtype": sweep.dtype,
                    "num_threads": torch.get_num_threads(),
                    "m": dim,
                    "n": dim,
                    "k": dim,
                    "alone_s": statistics.median(alone_s for alone_s, _ in times_s),
                    "together_s": statistics.median(both_s for _, both_s in times_s),
                },
            )
        )
    return found
