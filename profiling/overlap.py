"""Compute beside communication: how much each slows the other down.

Each repeat runs both alone, on all ranks at once, then together: communication in a thread (on CUDA
a stream of its own), matrix products meanwhile until it is done. A slow-down is the time beside the
other over the time alone, on the slowest rank; below 1 it is noise.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from meshwright.profiling.collectives import ready_call
from meshwright.profiling.figures import Emit, Figure, Note
from meshwright.profiling.sweeps import DTYPES, OverlapSweep, groups_of
from meshwright.profiling.together import Together
from meshwright.records.kinds import Kind
from meshwright.units import format_bytes

__all__ = ["measure_overlap"]

_PRODUCT_DIM = {"cpu": 256, "cuda": 4096}
_LEAST_WINDOW_S = 0.05
_LEAST_PRODUCTS = 10
"""In one window, so that the one cut off at its end does not matter."""

_ALONE_S = 0.2
_FEWEST_REPEATS = 3
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
    """Seconds of one product and of one call on the slowest rank."""

    product_alone_s: float
    call_alone_s: float
    product_s: float
    call_s: float


def measure_overlap(together: Together, sweep: OverlapSweep, emit: Emit) -> None:
    """Run ``sweep`` on all ranks; rank 0 emits two figures for each collective and size."""
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
            emit(found)
            emit(
                Note(
                    text=f"overlap {done + 1}/{len(points)}: {op} {format_bytes(payload_bytes)}: "
                    f"{found.name} takes {found.median:.2f} times as long beside the other"
                )
            )


def _windows(together: Together, pair: _Pair, repeats: int, budget_s: float) -> list[_Window]:
    """As many repeats as ``repeats`` and the budget allow, at least ``_FEWEST_REPEATS``."""
    start_s = time.monotonic()
    windows: list[_Window] = []
    while len(windows) < repeats:
        spent_s = together.agreed(time.monotonic() - start_s)
        if len(windows) >= _FEWEST_REPEATS and spent_s > budget_s:
            break
        windows.append(_beside(together, pair))
    return windows


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

    All within a moment, so that whatever else the machine does falls on all of them.
    """
    run = _window_on_cuda if together.device.type == "cuda" else _window_on_host
    parts = (
        lambda: (_one_s(together, pair.compute, pair.num_products), 0.0),
        lambda: (0.0, _one_s(together, pair.communicate, pair.num_calls)),
        lambda: run(pair),
    )
    found: list[float] = []
    for part in parts:
        together.synchronize()
        together.barrier()
        found += together.largest(part())
    return _Window(
        product_alone_s=found[0], call_alone_s=found[3], product_s=found[4], call_s=found[5]
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
    found = []
    for name, times_s in pairs.items():
        found.append(
            Figure(
                kind=Kind.OVERLAP,
                name=name,
                unit="ratio",
                values=tuple(together_s / alone_s for alone_s, together_s in times_s),
                method="calls in a row, products beside them until they are done, over each alone "
                "on all ranks just before; slowest rank",
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
