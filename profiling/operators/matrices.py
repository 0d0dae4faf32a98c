"""Matrix products: linear layers, batched products, products grouped by expert."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.profiling.operators.candidate import Dims, Direction, DtypeName, Work
from meshwright.profiling.operators.family import (
    ALL_FLOATS,
    FLOATS,
    MATRIX_FLOATS,
    Built,
    Family,
    Maker,
    doubled,
    log_int,
    size,
)

__all__ = ["MATRICES"]

_BOTH = (Direction.FWD, Direction.BWD)


def _product_work(rows: int, columns: int, inner: int, item_bytes: int) -> Work:
    moved = rows * inner + inner * columns + rows * columns
    return Work(2 * rows * columns * inner, moved * item_bytes)


def _linear(dims: Dims, make: Maker) -> Built:
    m, n, k = size(dims, "m"), size(dims, "n"), size(dims, "k")
    if make.dtype_name is DtypeName.FP8:
        return _scaled_linear(m, n, k, make)
    return Built(call=F.linear, inputs=(make.normal(m, k), make.normal(n, k)))


def _scaled_linear(m: int, n: int, k: int, make: Maker) -> Built:
    """One scale for each tensor, bf16 result."""
    scale = torch.ones((), device=make.device)

    def call(x_MK: Tensor, w_NK: Tensor) -> Tensor:
        return torch._scaled_mm(x_MK, w_NK.t(), scale, scale, out_dtype=torch.bfloat16)

    return Built(call=call, inputs=(make.normal(m, k, grad=False), make.normal(n, k, grad=False)))


def _linear_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    m, n, k = size(dims, "m"), size(dims, "n"), size(dims, "k")
    work = _product_work(m, n, k, item_bytes)
    if item_bytes == 1:
        work = Work(work.flop, work.bytes + m * n)  # the result has two bytes
    return doubled(work, direction)


def _sample_linear(rng: np.random.Generator) -> Dims:
    hidden = log_int(rng, 256, 16384, 64)
    other = int(hidden * rng.choice([0.25, 0.5, 1, 1, 1.5, 3, 4]))
    n, k = (hidden, other) if rng.random() < 0.5 else (other, hidden)
    return {"m": log_int(rng, 32, 65536, 16), "n": max(64, n), "k": max(64, k)}


def _bmm(dims: Dims, make: Maker) -> Built:
    b, m, n, k = (size(dims, name) for name in ("b", "m", "n", "k"))
    return Built(call=torch.bmm, inputs=(make.normal(b, m, k), make.normal(b, k, n)))


def _bmm_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    one = _product_work(size(dims, "m"), size(dims, "n"), size(dims, "k"), item_bytes)
    b = size(dims, "b")
    return doubled(Work(b * one.flop, b * one.bytes), direction)


def _sample_bmm(rng: np.random.Generator) -> Dims:
    length, head_dim = log_int(rng, 64, 4096, 64), int(rng.choice([32, 64, 80, 96, 128]))
    inner_is_length = rng.random() < 0.5
    return {
        "b": log_int(rng, 4, 1024),
        "m": length,
        "n": head_dim if inner_is_length else length,
        "k": length if inner_is_length else head_dim,
    }


def _grouped(dims: Dims, make: Maker) -> Built:
    """Rows sorted by expert, equally many for each (the last takes the rest)."""
    m, n, k, experts = (size(dims, name) for name in ("m", "n", "k", "experts"))
    ends = [m * (expert + 1) // experts for expert in range(experts)]
    inputs = (make.normal(m, k), make.normal(experts, k, n))
    if make.device.startswith("cuda") and not _has_grouped_product(make.dtype):
        starts = [0, *ends[:-1]]

        def loop(x_MK: Tensor, w_EKN: Tensor) -> Tensor:
            parts = zip(starts, ends, w_EKN, strict=True)
            return torch.cat([x_MK[start:end] @ w_KN for start, end, w_KN in parts])

        return Built(call=loop, inputs=inputs)
    offsets = torch.tensor(ends, dtype=torch.int32, device=make.device)
    return Built(call=lambda x, w: torch._grouped_mm(x, w, offs=offsets), inputs=inputs)


def _has_grouped_product(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (9, 0)


def _grouped_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    m, n, k, experts = (size(dims, name) for name in ("m", "n", "k", "experts"))
    return doubled(Work(2 * m * n * k, (m * k + experts * k * n + m * n) * item_bytes), direction)


def _sample_grouped(rng: np.random.Generator) -> Dims:
    experts = int(rng.choice([4, 8, 16, 32, 64, 128]))
    k, n = log_int(rng, 512, 8192, 128), log_int(rng, 512, 16384, 128)
    if rng.random() < 0.5:
        k, n = n, k
    return {"m": experts * log_int(rng, 16, 4096, 16), "n": n, "k": k, "experts": experts}


MATRICES = (
    Family(
        name="linear",
        dims=("k", "m", "n"),
        directions=_BOTH,
        dtypes=ALL_FLOATS,
        build=_linear,
        work=_linear_work,
        sample=_sample_linear,
        note="fp8: one scale for each tensor, bf16 result, forward only",
    ),
    Family(
        name="bmm",
        dims=("b", "k", "m", "n"),
        directions=_BOTH,
        dtypes=MATRIX_FLOATS,
        build=_bmm,
        work=_bmm_work,
        sample=_sample_bmm,
    ),
    Family(
        name="grouped_mm",
        dims=("experts", "k", "m", "n"),
        directions=_BOTH,
        dtypes=FLOATS,
        build=_grouped,
        work=_grouped_work,
        sample=_sample_grouped,
        note="rows spread evenly over experts; on GPUs without the grouped kernel a loop",
    ),
)
