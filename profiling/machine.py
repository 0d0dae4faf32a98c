"""What one device reaches: products, memory by working set, launches, copies to the host.

All ranks measure at the same time and the slowest one counts, so that cores and memory channels
that ranks share are shared here as they are in training.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from meshwright.profiling.figures import Emit, Figure, Note
from meshwright.profiling.sweeps import TORCH_NAMES, MachineSweep
from meshwright.profiling.together import Together
from meshwright.records.kinds import Kind
from meshwright.records.record import Scalar
from meshwright.units import format_bytes

__all__ = ["measure_machine"]

_DTYPES = {
    "cpu": ("fp32", "fp64", "bf16", "fp16"),
    "cuda": ("fp32", "tf32", "bf16", "fp16", "fp64"),
}
"""As the sweeps of operators name them."""
_FIRST_DIM = {"cpu": 128, "cuda": 1024}
_LAST_DIM = {"cpu": 1024, "cuda": 8192}
_LONG_ENOUGH_S = {"cpu": 0.02, "cuda": 0.003}
"""A product that takes this long is large enough to show the peak."""

_FIRST_ARRAY_BYTES = 2**14
_LAUNCHES = 1000
_POINT_S = 0.3
_COPY_BYTES = 2**28


def measure_machine(together: Together, sweep: MachineSweep, emit: Emit) -> None:
    """Run ``sweep`` on all ranks; rank 0 emits each figure as it comes."""
    deadline_s = time.monotonic() + sweep.budget_s
    parts = (_launches, _products, _memory, _host_copies)
    for part in parts:
        for figure in part(together, sweep):
            emit(figure)
            emit(Note(text=_words(figure)))
            if together.agreed(deadline_s - time.monotonic()) <= 0:
                emit(Note(text="the budget is spent; further figures of this machine are left out"))
                return


def _words(figure: Figure) -> str:
    extra = figure.extra
    size = f" {format_bytes(float(extra['bytes'] or 0))}" if "bytes" in extra else ""
    what = " ".join(str(extra[key]) for key in ("operator", "dtype") if key in extra)
    return f"{figure.name} {what}{size}: {figure.median:.4g} {figure.unit}"


def _figure(
    together: Together,
    call: Callable[[], object],
    *,
    name: str,
    unit: str,
    amount: float,
    method: str,
    extra: dict[str, Scalar],
) -> Figure:
    """The rate ``amount`` over the time of ``call``; in seconds, the time over ``amount``."""
    measured = together.measure(call, budget_s=_POINT_S)
    values = (
        [time_s / amount for time_s in measured.timing.times_s]
        if unit == "s"
        else [amount / time_s for time_s in measured.timing.times_s]
    )
    return Figure(
        kind=Kind.MACHINE,
        name=name,
        unit=unit,
        values=tuple(values),
        method=f"{method}; {measured.method}; load of the machine {os.getloadavg()[0]:.1f}",
        extra={
            **extra,
            "num_ranks": together.world_size,
            "num_threads": torch.get_num_threads(),
        },
    )


def _launches(together: Together, sweep: MachineSweep) -> Iterator[Figure]:
    """Host time of one eager operator that has next to nothing to do."""
    left = torch.ones(1, device=together.device)
    right = torch.ones(1, device=together.device)

    def call() -> None:
        with torch.no_grad():
            for _ in range(_LAUNCHES):
                torch.add(left, right)

    yield _figure(
        together,
        call,
        name="launch_latency",
        unit="s",
        amount=_LAUNCHES,
        method=f"mean of {_LAUNCHES} additions of one element, results dropped",
        extra={"operator": "add", "dtype": "fp32"},
    )


def _products(together: Together, sweep: MachineSweep) -> Iterator[Figure]:
    """Square matrix products, large enough to show the peak of each element type."""
    kind = together.device.type
    for name in _DTYPES[kind]:
        with _float32_precision(name):
            call, dim = _large_product(together, name)
            if call is None:
                continue
            yield _figure(
                together,
                call,
                name="matmul_peak",
                unit="flop/s",
                amount=2.0 * dim**3,
                method=f"product of square matrices of dim {dim}",
                extra={"operator": "linear", "dtype": name, "m": dim, "n": dim, "k": dim},
            )


def _large_product(together: Together, name: str) -> tuple[Callable[[], object] | None, int]:
    """A product that takes long enough and its dim; None where the device has no such product."""
    kind = together.device.type
    dtype: torch.dtype = getattr(torch, TORCH_NAMES["fp32" if name == "tf32" else name])
    dim = _FIRST_DIM[kind]
    while True:
        try:
            call = _product(dim, dtype, together.device)
            call()
            together.synchronize()
            start_s = time.perf_counter()
            call()
            together.synchronize()
            took_s = time.perf_counter() - start_s
        except RuntimeError:  # no kernel for this element type
            took_s = -1.0
        took_s = together.agreed(took_s)
        if took_s < 0:
            return None, 0
        if took_s >= _LONG_ENOUGH_S[kind] or dim >= _LAST_DIM[kind]:
            return call, dim
        dim *= 2


def _product(dim: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left = torch.ones(dim, dim, device=device).to(dtype)
    right = torch.ones(dim, dim, device=device).to(dtype)
    out = torch.empty(dim, dim, dtype=dtype, device=device)
    return lambda: torch.mm(left, right, out=out)


@contextlib.contextmanager
def _float32_precision(name: str) -> Iterator[None]:
    """float32 products in full precision, or rounded for matrix units for ``tf32``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _memory(together: Together, sweep: MachineSweep) -> Iterator[Figure]:
    """Copy and triad over working sets from the innermost cache to memory.

    Bytes are those the operators read and write, as the cost model counts them.
    """
    array_bytes = _FIRST_ARRAY_BYTES
    while array_bytes <= sweep.largest_bytes:
        arrays = [torch.ones(array_bytes // 4, device=together.device) for _ in range(3)]
        is_largest = array_bytes * 8 > sweep.largest_bytes
        for operator, call, num_arrays in (
            ("copy", _copy(arrays), 2),
            ("triad", _triad(arrays), 3),
        ):
            yield _figure(
                together,
                call,
                name="memory_bandwidth" if is_largest else "cache_bandwidth",
                unit="bytes/s",
                amount=num_arrays * array_bytes,
                method="a = b" if operator == "copy" else "a = b + 3 c",
                extra={
                    "operator": operator,
                    "dtype": "fp32",
                    "bytes": num_arrays * array_bytes,
                },
            )
        if is_largest:
            return
        array_bytes = array_bytes * 8


def _copy(arrays: list[Tensor]) -> Callable[[], object]:
    return lambda: arrays[0].copy_(arrays[1])


def _triad(arrays: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.add(arrays[1], arrays[2], alpha=3.0, out=arrays[0])


def _host_copies(together: Together, sweep: MachineSweep) -> Iterator[Figure]:
    """Between the host's page-locked memory and the device; nothing on a CPU."""
    if together.device.type == "cpu":
        return
    host: Any = torch.ones(_COPY_BYTES // 4, pin_memory=True)
    device = torch.ones(_COPY_BYTES // 4, device=together.device)
    for operator, call in (
        ("to_device", lambda: device.copy_(host, non_blocking=True)),
        ("to_host", lambda: host.copy_(device, non_blocking=True)),
    ):
        yield _figure(
            together,
            call,
            name="host_copy_bandwidth",
            unit="bytes/s",
            amount=_COPY_BYTES,
            method="copy between page-locked host memory and the device",
            extra={"operator": operator, "bytes": _COPY_BYTES},
        )
