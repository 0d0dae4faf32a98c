"""What computes next to nothing: copies, casts, random numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from meshwright.profiling.operators.candidate import Dims, Direction, DtypeName, Work
from meshwright.profiling.operators.family import FLOATS, Built, Family, Maker, log_int, size

__all__ = ["MOVING"]

_FWD = (Direction.FWD,)


def _copy(dims: Dims, make: Maker) -> Built:
    """Into memory that is there: in order, transposed, or over the link to the host."""
    m, n, variant = size(dims, "m"), size(dims, "n"), str(dims["variant"])
    here = make.normal(m, n, grad=False)
    if variant in {"host_to_device", "device_to_host"}:
        if not make.device.startswith("cuda"):
            raise NotImplementedError("the CPU has no memory of its own beside the host's")
        there = torch.empty((m, n), dtype=make.dtype, pin_memory=True)
        source, target = (there, here) if variant == "host_to_device" else (here, there)
        return Built(
            call=lambda: target.copy_(source, non_blocking=True), inputs=(), can_compile=False
        )
    source = here.t() if variant == "strided" else here
    target = torch.empty(source.shape, dtype=make.dtype, device=make.device)
    return Built(call=lambda: target.copy_(source), inputs=(), can_compile=False)


def _copy_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    """Read and written; between host and device the bytes on the link, once."""
    del direction  # there is only one
    ways = 1 if dims["variant"] in {"host_to_device", "device_to_host"} else 2
    return Work(0, ways * size(dims, "m", "n") * item_bytes)


def _sample_copy(rng: np.random.Generator) -> Dims:
    variant = str(rng.choice(["contiguous", "strided", "host_to_device", "device_to_host"]))
    most_rows = 65536 if variant in {"contiguous", "strided"} else 4096  # pinning takes long
    return {
        "m": log_int(rng, 32, most_rows, 16),
        "n": log_int(rng, 64, 16384, 64),
        "variant": variant,
    }


_CAST_TO = {
    "to_fp32": torch.float32,
    "to_bf16": torch.bfloat16,
    "to_fp16": torch.float16,
    "to_fp8": torch.float8_e4m3fn,
}


def _cast(dims: Dims, make: Maker) -> Built:
    target = _CAST_TO[str(dims["variant"])]
    x_MN = make.normal(size(dims, "m"), size(dims, "n"), grad=False)
    if x_MN.dtype == target:
        raise NotImplementedError(f"a cast of {make.dtype_name} {dims['variant']} does nothing")

    def call(x: Tensor) -> Tensor:
        return x.to(target)

    return Built(call=call, inputs=(x_MN,))


def _cast_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    del direction  # there is only one
    target_bytes = _CAST_TO[str(dims["variant"])].itemsize
    return Work(0, size(dims, "m", "n") * (item_bytes + target_bytes))


def _sample_cast(rng: np.random.Generator) -> Dims:
    return {
        "m": log_int(rng, 32, 65536, 16),
        "n": log_int(rng, 64, 16384, 64),
        "variant": str(rng.choice(["to_fp32", "to_bf16"])),
    }


def _random(dims: Dims, make: Maker) -> Built:
    """Fills memory that is there."""
    target = torch.empty(size(dims, "numel"), dtype=make.dtype, device=make.device)
    fill = {
        "normal": target.normal_,
        "uniform": target.uniform_,
        "bernoulli": lambda: target.bernoulli_(0.9),
    }[str(dims["variant"])]
    return Built(call=fill, inputs=(), can_compile=False)


def _random_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    del direction  # there is only one
    return Work(0, size(dims, "numel") * item_bytes)


def _sample_random(rng: np.random.Generator) -> Dims:
    variant = str(rng.choice(["normal", "uniform", "bernoulli"]))
    return {"numel": log_int(rng, 1024, 2**28, 1024), "variant": variant}


MOVING = (
    Family(
        name="copy",
        dims=("m", "n", "variant"),
        directions=_FWD,
        dtypes=FLOATS,
        build=_copy,
        work=_copy_work,
        sample=_sample_copy,
        note="strided: reads the transposed of (m, n); host copies from and to pinned memory",
    ),
    Family(
        name="cast",
        dims=("m", "n", "variant"),
        directions=_FWD,
        dtypes=FLOATS | {DtypeName.FP8},
        build=_cast,
        work=_cast_work,
        sample=_sample_cast,
        note="dtype is the one read",
    ),
    Family(
        name="random",
        dims=("numel", "variant"),
        directions=_FWD,
        dtypes=FLOATS,
        build=_random,
        work=_random_work,
        sample=_sample_random,
        note="numbers drawn count as no operation",
    ),
)
